"""``flexsparse hardware``: the devices that the cost model knows, and this one, measured."""

from __future__ import annotations

import click

from flexsparse.cli import options as shared


@click.command("hardware", short_help="Show the devices of the cost model, or measure this one.")
@click.option("--measure", is_flag=True, help="Measure this machine's matrix rate and bandwidth.")
@click.option("--save", metavar="FILE", help="Measure, and write the measurement there.")
@shared.json_option
def command(measure: bool, save: str | None, as_json: bool) -> None:
    """Show what the cost model assumes of each device, or measure the one at hand.

    Rates are dense 16-bit matrix products; on a CPU, float32. `explain --hardware` takes a name from this list or a
    file that --save wrote.

    \b
    Examples:
      flexsparse hardware
      flexsparse hardware --measure --save here.json
      flexsparse explain "causal()" --length 65536 --hardware here.json
    """
    from dataclasses import asdict

    from flexsparse import hardware
    from flexsparse.cli import render

    shared.check_out("--save", save)
    devices = list(hardware.DEVICES.values())
    if measure or save:
        from flexsparse.measurement import measure_hardware

        with render.working("Measuring this device"):
            devices = [measure_hardware()]
        if save:
            shared.write_out("--save", save, hardware.json_text(devices[0]))
    if as_json:
        shared.print_json([asdict(d) for d in devices])
        return
    render.stdout().print(render.devices(devices))
