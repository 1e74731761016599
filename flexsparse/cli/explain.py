"""``flexsparse explain``: which backend would run a pattern, and why."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from flexsparse.cli import options as shared

if TYPE_CHECKING:
    from flexsparse.compiler import BoundAttention
    from flexsparse.hardware import Hardware
    from flexsparse.plan import TileCounts

# Beyond this length, tiles that depend on scores are left to the call: classifying them here would take long.
_LONGEST = 16384


@click.command("explain", short_help="Say which backend would run, and why.")
@shared.expression_argument
@shared.shape_options
@shared.backend_option
@shared.seed_option
@click.option("--hardware", "device_name", help="Predict the time on H100, A100, ... or a file of `hardware --save`.")
@shared.json_option
def command(expression: str, backend: str, seed: int, device_name: str | None, as_json: bool, **given: Any) -> None:
    """Explain what would run for given shapes: the backend, the others with their reasons, tiles, work, notes.

    No device is touched, so plans for a GPU can be made anywhere. Where tiles depend on scores or other tensors,
    their number is that of example data made from --seed.

    \b
    Examples:
      flexsparse explain "causal() & sliding_window(512)" --device cuda
      flexsparse explain "sparsek_window(512, 512)" --length 8192 --grad --device cuda
      flexsparse explain "causal()" --backend flex --dtype float32
      flexsparse explain "causal()" --length 65536 --device cuda --dtype bfloat16 --hardware H200
    """
    from flexsparse.cli import render

    with render.working("Making the plan"):
        import flexsparse

        attention = flexsparse.compile(expression, backend=backend)
        bound = shared.bind_from(attention, given)
        tiles = bound.plan.tiles or _example_tiles(bound, seed)
    found = bound.explain(_hardware(device_name))
    if as_json:
        shared.print_json(found.as_dict())
        return
    render.stdout().print(render.explanation(found, _tiles_text(bound, tiles, seed)))


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
    from dataclasses import replace

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
