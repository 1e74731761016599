"""``flexsparse tune``: the fastest sizes of the kernels that gather on this GPU, kept for later calls."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import click

from flexsparse.cli import options as shared

if TYPE_CHECKING:
    from flexsparse.runtime.inputs import Shapes
    from flexsparse.tuning import Measure


@click.command("tune", short_help="Find the fastest kernel sizes on this GPU, and keep them.")
@click.option("--head-dim", type=shared.POSITIVE, multiple=True, default=(64, 128), help="May be given several times.")
@click.option("--dtype", default="bfloat16", show_default=True, help="bfloat16, float16 (found together) or float32.")
@click.option("--length", type=shared.POSITIVE, default=16384, show_default=True, help="Queries and keys.")
@click.option(
    "--heads", type=shared.POSITIVE, default=16, show_default=True, help="Query heads; --kv-heads divides it."
)
@click.option("--kv-heads", type=shared.POSITIVE, default=4, show_default=True, help="Key and value heads.")
@shared.device_option
@click.option("--out", metavar="FILE", help="Write all measurements there.")
@shared.json_option
def command(
    head_dim: tuple[int, ...],
    dtype: str,
    length: int,
    heads: int,
    kv_heads: int,
    device: str,
    out: str | None,
    as_json: bool,
) -> None:
    """Search tile sizes, warps and stages of the kernels that gather, and keep the fastest for this GPU.

    Some minutes a head_dim, most of them spent building kernels, with a process for each core. What is found is kept
    in FLEXSPARSE_CACHE_DIR (default ~/.cache/flexsparse), by GPU, version of triton, width of the dtype and head_dim;
    later calls read it once a process. Calls never measure anything by themselves. Ctrl-C keeps what was found for each
    whole head_dim.

    \b
    Examples:
      flexsparse tune
      flexsparse tune --head-dim 128 --dtype bf16 --out sizes.json
      FLEXSPARSE_CACHE_DIR=/shared/cache flexsparse tune --head-dim 64
    """
    from flexsparse import tuning
    from flexsparse.cli import render

    options = {"dtype": dtype, "length": length, "heads": heads, "kv_heads": kv_heads, "device": device}
    asked = [_shapes({**options, "head_dim": width}) for width in dict.fromkeys(head_dim)]
    shared.check_out("--out", out)
    found = []
    # Each is built, then timed.
    with render.progress("Tuning", 2 * tuning.count(asked)) as advance:
        for shapes in asked:
            found.append(_tuned(shapes, _measure(shapes, advance), advance))
            if out:
                shared.write_out("--out", out, json.dumps(shared.finite(found), indent=1) + "\n")
    if as_json:
        shared.print_json(found)
        return
    render.stdout().print(render.tuned(found))


def _shapes(options: dict[str, Any]) -> Shapes:
    """What is measured. Raises DeviceError without a GPU, BackendError where the kernels take no such call."""
    from flexsparse.compiler import compile
    from flexsparse.errors import DeviceError
    from flexsparse.tuning import PATTERN

    name = options["device"]
    where = shared.read_device(name)
    if where.type != "cuda":
        raise DeviceError(
            "--device",
            got=f"{where}, as this machine has no GPU" if name == "auto" else repr(name),
            expected="a GPU, whose kernels are measured",
            mend="Run it where the kernels will run; without it they have the sizes that were fastest on an H200.",
        )
    attention = compile(PATTERN, backend="gather")
    shapes: Shapes = shared.bind_from(attention, {**options, "batch": 1, "grad": True}).plan.shapes
    # A plan names no GPU of several.
    return replace(shapes, device=where)


def _measure(shapes: Shapes, advance: Any) -> Measure:
    """What times one choice of sizes, all of which are built before."""
    from concurrent.futures.process import BrokenProcessPool

    from flexsparse.tuning import OnGpu, build_ahead

    measure = OnGpu(shapes)
    failed = set()
    try:
        failed = build_ahead(shapes, measure, advance)
    except BrokenProcessPool as error:
        click.echo(f"note: a process that builds was ended ({error}); what is left is built one by one.", err=True)
    return lambda kernel, sizes: float("inf") if (kernel, sizes) in failed else measure(kernel, sizes)


def _tuned(shapes: Shapes, measure: Measure, advance: Any) -> dict[str, Any]:
    """Search and keep; what there is to say about it."""
    from flexsparse.runtime.tuned import KERNELS, keep_tuned, place_of
    from flexsparse.tuning import candidates, search

    place = place_of(shapes.device, shapes.dtype, shapes.head_dim, shapes.value_dim)
    assert place is not None
    before = {kernel: candidates(kernel, shapes)[0] for kernel in KERNELS}
    best, trials = search(shapes, measure, advance)
    try:
        kept: str | None = str(keep_tuned(place, best))
    except OSError as error:
        kept = None
        click.echo(f"note: not kept, {error}; FLEXSPARSE_CACHE_DIR names another folder.", err=True)
    took = {(trial.kernel, trial.sizes): trial.milliseconds for trial in trials}
    kernels = {
        kernel: {**asdict(sizes), "ms": took[kernel, sizes], "ms_before": took[kernel, before[kernel]]}
        for kernel, sizes in best.items()
    }
    measured = [{"kernel": t.kernel, **asdict(t.sizes), "ms": t.milliseconds} for t in trials]
    return {"place": asdict(place), "kept": kept, "kernels": kernels, "trials": measured}
