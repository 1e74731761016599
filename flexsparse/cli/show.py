"""``flexsparse show``: a picture of the mask."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from flexsparse.cli import options as shared

if TYPE_CHECKING:
    from flexsparse.cli.picture import Drawable, Picture


@click.command("show", short_help="Draw which keys each query sees.")
@shared.expression_argument
@click.option("--length", type=shared.POSITIVE, default=1024, show_default=True, help="Queries and keys.")
@click.option("--block", type=shared.POSITIVE, default=None, help="Tile size.  [default: some 32 tiles a side]")
@click.option("--zoom", metavar="Q0:Q1,KV0:KV1", help="Show single pairs of these queries and keys.")
@click.option("--heads", type=shared.POSITIVE, default=None, help="Query heads.  [default: 4, or as per_head needs]")
@click.option("--head", type=click.IntRange(min=0), default=0, show_default=True, help="The head to show.")
@shared.seed_option
@shared.json_option
def command(expression: str, as_json: bool, **given: Any) -> None:
    """Show which keys each query sees: tiles that are full, partial or empty, and the share that is computed.

    Queries run down, keys run right. Tiles are classified by the compiler as for a real call. Tensors that the
    pattern takes (scores, documents, lengths) are example data, made from --seed.

    \b
    Examples:
      flexsparse show "causal() & sliding_window(256)"
      flexsparse show "causal() & document()" --length 4096 --block 128
      flexsparse show "sparsek_window(8, 8)" --length 64 --zoom 0:64,0:64
    """
    from flexsparse.cli import render

    with render.working("Compiling the pattern"):
        drawn, picture, example = _draw(expression, given)
    if as_json:
        shared.print_json(_as_dict(expression, given, drawn, picture, example))
        return
    console = render.stdout()
    unit = "pairs" if given["zoom"] else "tiles"
    console.print(render.facts(*_caption(expression, given, drawn, picture)))
    console.print()
    console.print(render.mask(picture, console))
    console.print()
    console.print(render.legend(picture, unit, console))
    for line in (*_density(drawn, picture, unit), *example):
        console.print(line)


def _draw(expression: str, given: dict[str, Any]) -> tuple[Drawable, Picture, list[str]]:
    import flexsparse
    from flexsparse.cli import render
    from flexsparse.cli.picture import drawable, square_shapes
    from flexsparse.errors import SettingError
    from flexsparse.example_inputs import describe, example_captured, fitting_heads

    length = given["length"]
    zoom = None if given["zoom"] is None else shared.read_zoom(given["zoom"], length)
    attention = flexsparse.compile(expression, backend="chunked")
    heads = given["heads"] or fitting_heads(attention.pattern.node, 4)
    if given["head"] >= heads:
        raise SettingError("--head", got=str(given["head"]), expected=f"0 to {heads - 1}, as there are {heads} heads")
    shapes = square_shapes(length, heads)
    captured = example_captured(attention.ir, shapes, given["seed"])
    block = given["block"] or _fitting_block(length, render.WIDEST)
    drawn = drawable(attention, shapes, captured, block, given["seed"])
    cells = render.cells()
    picture = drawn.pairs(given["head"], *zoom, cells) if zoom else drawn.tiles(given["head"], cells)
    return drawn, picture, describe(attention.ir, captured, given["seed"])


def _fitting_block(length: int, tiles: int) -> int:
    """The least power of two from 16 to 128 that cuts the length into at most so many tiles."""
    return next((size for size in (16, 32, 64) if length <= size * tiles), 128)


def _caption(expression: str, given: dict[str, Any], drawn: Drawable, picture: Picture) -> list[tuple[str, Any]]:
    block, (high, wide) = drawn.bound.tiles.block, picture.cell
    if given["zoom"]:
        what = f"queries {picture.queries.start} to {picture.queries.stop - 1}"
        what += f", keys {picture.keys.start} to {picture.keys.stop - 1}"
        cells = "single pairs" if picture.cell == (1, 1) else f"a cell is {high} x {wide} pairs"
    else:
        what = f"{drawn.shapes.q_len} queries x {drawn.shapes.kv_len} keys, tiles of {block} x {block}"
        cells = "" if high == block == wide else f"a cell is {high // block} x {wide // block} tiles"
    head = f"head {given['head']} of {drawn.shapes.heads}" if drawn.heads_differ else "the same for every head"
    return [("pattern", expression), ("shown", ", ".join(part for part in (what, cells, head) if part))]


def _density(drawn: Drawable, picture: Picture, unit: str) -> list[str]:
    seen = (
        ""
        if picture.pairs is None
        else f"{picture.pairs:.1%} of the pairs {'shown ' if unit == 'pairs' else ''}are seen"
    )
    if unit == "pairs":
        return [seen + "."]
    lines = [f"{picture.computed:.1%} of the tiles are computed" + (f"; {seen}." if seen else ".")]
    if drawn.heads_differ:
        shares = [f"{share:.1%}" for share in drawn.computed()]
        shown = ", ".join(shares[:8]) + (", ..." if len(shares) > 8 else "")
        lines.append(f"Tiles computed, head by head: {shown}.")
    return lines


def _as_dict(
    expression: str, given: dict[str, Any], drawn: Drawable, picture: Picture, example: list[str]
) -> dict[str, Any]:
    empty, partial, full = picture.counts
    return {
        "pattern": expression,
        "length": drawn.shapes.q_len,
        "block": None if given["zoom"] else drawn.bound.tiles.block,
        "unit": "pairs" if given["zoom"] else "tiles",
        "head": given["head"],
        "heads": drawn.shapes.heads,
        "heads_differ": drawn.heads_differ,
        "queries": [picture.queries.start, picture.queries.stop],
        "keys": [picture.keys.start, picture.keys.stop],
        "cell": list(picture.cell),
        "counts": {"empty": empty, "partial": partial, "full": full},
        "computed": picture.computed,
        "computed_by_head": drawn.computed(),
        "pairs_seen": picture.pairs,
        "rows": ["".join("EPF"[kind] for kind in row) for row in picture.kinds],
        "seed": given["seed"],
        "example_data": example,
    }
