"""``flexsparse explain``: which backend would run a pattern, and why."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from flexsparse.cli import options as shared
from flexsparse.errors import SettingError

if TYPE_CHECKING:
    from flexsparse.explanation import Explanation
    from flexsparse.hardware import Hardware
    from flexsparse.inspection import BoundAttention
    from flexsparse.plan import Plan, TileCounts

# Beyond this length, tiles that depend on scores are left to the call: classifying them here would take long.
_LONGEST = 16384
_EXAMPLE = "Tiles are those of example tensors, seed {}."


@click.command("explain", short_help="Say which backend would run, and why.")
@shared.expression_argument
@shared.shape_options
@shared.backend_option
@shared.seed_option
@click.option("--hardware", "device_name", help="Predict the time on H100, A100, ... or a file of `hardware --save`.")
@click.option("--png", metavar="FILE", help="Draw the roofline there; wants --hardware and the extra 'plots'.")
@click.option("--html", metavar="FILE", help="Write a page with the roofline and the facts there; wants --hardware.")
@shared.json_option
def command(
    expression: str,
    backend: str,
    seed: int,
    device_name: str | None,
    png: str | None,
    html: str | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Explain what would run for given shapes: the backend, the others with their reasons, tiles, work, notes.

    With --hardware it draws the roofline: the device's roof, the operations a byte of the forward pass in whole tiles
    with each operand moved once, the floor of the time that follows, and below it the cost model's prediction where
    there is one (FlexAttention).

    No device is touched, so plans for a GPU can be made anywhere. Where tiles depend on scores or other tensors,
    their number is that of example data made from --seed.

    \b
    Examples:
      flexsparse explain "causal() & sliding_window(512)" --device cuda
      flexsparse explain "sparsek_window(512, 512)" --length 8192 --grad --device cuda
      flexsparse explain "causal()" --backend flex --dtype float32
      flexsparse explain "causal()" --length 65536 --device cuda --dtype bfloat16 --hardware H200
      flexsparse explain "sparsek_window(512, 512)" --length 65536 --device cuda --hardware H200 --html roofline.html
    """
    from flexsparse.cli import render

    files = {"--png": png, "--html": html}
    _check_files(files, device_name)
    with render.working("Making the plan"):
        import flexsparse

        attention = flexsparse.compile(expression, backend=backend)
        bound = shared.bind_from(attention, given)
        tiles = bound.plan.tiles or _example_tiles(bound, seed)
    found = bound.explain(_hardware(device_name))
    drawn, under = found, found.roofline
    if found.plan.tiles is None and _reads_whole_mask(found.plan):
        drawn = replace(found, plan=replace(found.plan, tiles=tiles, notes=(*found.plan.notes, _EXAMPLE.format(seed))))
        under = drawn.roofline
    if device_name is not None and under is None:
        click.echo("note: no roofline: its operations depend on tensors of the call, or have no known rate", err=True)
    _draw_files(drawn, files)
    if as_json:
        shared.print_json(found.as_dict() | {"roofline": None if under is None else under.as_dict()})
        return
    console = render.stdout()
    console.print(render.explanation(found, _tiles_text(bound, tiles, seed)))
    if under is not None:
        from flexsparse.cli import roofline

        console.print(render.heading(f"Roofline of {under.hardware}"))
        console.print(roofline.terminal(under, console))
        console.print(f"{under}{'' if drawn is found else '. ' + _EXAMPLE.format(seed)}")


def _check_files(files: dict[str, str | None], device_name: str | None) -> None:
    for option, path in files.items():
        shared.check_out(option, path)
        if path is not None and device_name is None:
            raise SettingError(
                option, got="no --hardware", expected="a device whose roof to draw", mend="Such as --hardware H100."
            )
        if path is not None and not path.lower().endswith(f".{option[2:]}"):
            raise SettingError(option, got=repr(path), expected=f"a file ending in .{option[2:]}")


def _reads_whole_mask(plan: Plan) -> bool:
    """Whether the backend reads the tiles of the mask as it is, as example data are classified."""
    from flexsparse.backends import OVER_ROWS

    return plan.backend not in ("gather", *OVER_ROWS)


def _draw_files(found: Explanation, files: dict[str, str | None]) -> None:
    from flexsparse.cli import roofline

    for option, path in files.items():
        if path is None:
            continue
        under = found.roofline
        if under is None:
            raise SettingError(
                option, got="a plan whose operations are not known", expected="one that has a place under the roof"
            )
        facts = [(name, text.strip()) for name, _, text in (line.partition(" ") for line in str(found).splitlines())]
        drawn = roofline.png(under, found.pattern) if option == "--png" else roofline.html(under, found.pattern, facts)
        shared.write_out(option, path, drawn)
        click.echo(f"note: the roofline is in {path}", err=True)


def _hardware(name: str | None) -> Hardware | None:
    """A known device, or a measured one from its file."""
    if name is None:
        return None
    import pathlib

    from flexsparse.hardware import find, load

    path = pathlib.Path(name)
    return load(path) if path.suffix == ".json" else find(name)


def _example_tiles(bound: BoundAttention, seed: int) -> TileCounts | None:
    """The tiles of example data, None where classifying them would take too long."""
    import torch

    from flexsparse.example_inputs import example_captured
    from flexsparse.pictures.mask import drawable
    from flexsparse.plan import count_tiles

    shapes = replace(bound.plan.shapes, device=torch.device("cpu"))
    if shapes.q_len * shapes.kv_len > _LONGEST**2:
        return None
    attention = bound.attention
    return count_tiles(drawable(attention, shapes, example_captured(attention.ir, shapes, seed), seed=seed).bound.tiles)


def _tiles_text(bound: BoundAttention, tiles: TileCounts | None, seed: int) -> str:
    if tiles is None:
        return "depend on tensors of the call; too many to classify for an example"
    text = (
        f"{tiles.total:,} of {tiles.block} x {tiles.block}: {tiles.full:,} full, {tiles.partial:,} partial, "
        f"{tiles.empty:,} empty ({tiles.density:.1%} computed)"
    )
    return text if bound.plan.tiles is not None else f"{text} on example tensors, seed {seed}"
