"""What ``flexsparse show`` was asked for, as a figure: the data of its panels and the words around them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import flexsparse
from flexsparse.cli import options as shared
from flexsparse.cli import render
from flexsparse.cli.show_scores import given_scores
from flexsparse.errors import SettingError, nearest
from flexsparse.example_inputs import describe, example_captured, fitting_heads
from flexsparse.pictures.curves import head_names, score_curves
from flexsparse.pictures.elements import gate_pictures, score_picture
from flexsparse.pictures.figure import Figure, Grid, Panel
from flexsparse.pictures.lifetimes import check_selects, lifetimes
from flexsparse.pictures.mask import Drawable, check_window, drawable, square_shapes
from flexsparse.pictures.reasons import reasons

VIEWS = ("tiles", "heads", "score", "gate", "selection")
_LENGTH = 1024
_FILE_CELLS, _PAGE_POINTS = 256, 512
# Tiles of the size that FlexAttention uses, at most so many a side; longer sequences have larger tiles.
_TILE, _SIDE = 128, 1024
# Pictures of heads that stand side by side, and their rows of cells.
_HEADS, _SMALL = 32, 12


@dataclass(frozen=True)
class Shown:
    """A figure, with what JSON says of the request besides."""

    figure: Figure
    request: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """The request, then the one panel of tiles or pairs by itself, or all panels of another view."""
        made = self.figure.as_dict()
        panel = self.figure.panels[0]
        if self.request["view"] == "tiles" and isinstance(panel, Grid):
            return {**self.request, **made["panels"][0], "computed": panel.picture.computed}
        return {**self.request, **made}


def draw(expression: str, given: dict[str, Any], *, with_reasons: bool) -> Shown:
    """The figure of a request, from the options of ``show`` by name. Raises what a call with its tensors would."""
    view = given["view"]
    if view not in VIEWS:
        hint = nearest(view, VIEWS)
        raise SettingError("--view", got=repr(view), expected=", ".join(VIEWS), mend=hint)
    _refuse_unused(given)
    given = given | {"raw": given["raw"] or 0.0, "head": given["head"] or 0}
    if not math.isfinite(given["raw"]):
        raise SettingError("--raw", got=str(given["raw"]), expected="a finite score")
    drawn, example = _drawable(expression, given)
    head, cells = given["head"], _cells(given)
    panels, notes = _PANELS[view](drawn, given, cells, with_reasons)
    shapes, block = drawn.shapes, drawn.bound.tiles.block
    facts = [("pattern", expression), ("shown", _caption(given, drawn, panels[0]))]
    request = {
        "pattern": expression,
        "view": view,
        "length": shapes.q_len,
        "block": block if _in_tiles(given) else None,
        "head": head,
        "heads": shapes.heads,
        "heads_differ": drawn.heads_differ,
        "computed_by_head": drawn.computed() if _in_tiles(given) else None,
        "seed": given["seed"],
        "example_data": example,
    }
    return Shown(Figure(expression, tuple(facts), tuple(panels), (*notes, *example)), request)


def _refuse_unused(given: dict[str, Any]) -> None:
    """Raises SettingError for an option that the view would ignore."""
    view, in_pairs = given["view"], given["zoom"] is not None
    curves = view == "score" and not in_pairs
    wanted = {
        "zoom": (view != "selection", "another view, as this one has no pairs"),
        "query": (curves, "--view score without --zoom"),
        "raw": (view == "score", "--view score, which starts from it"),
        "block": (_in_tiles(given), "--view tiles or heads, without --zoom"),
        "head": (view != "heads" and not curves, "a view of one head: this one has all of them"),
    }
    for name, (used, expected) in wanted.items():
        if given[name] is not None and not used:
            got = f"one for --view {view}" + (" with --zoom" if in_pairs and name != "zoom" else "")
            raise SettingError(f"--{name}", got=got, expected=expected)


def _drawable(expression: str, given: dict[str, Any]) -> tuple[Drawable, list[str]]:
    """The pattern bound to example tensors and given scores, and a line about each of them."""
    attention = flexsparse.compile(expression, backend="chunked")
    scores = given_scores(given["scores"], attention.ir, given["length"])
    length = given["length"] or next((s.shape[-1] for s in scores.values()), _LENGTH)
    least = max([1, *(s.shape[1] for s in scores.values())]) if scores else 4
    heads = given["heads"] or fitting_heads(attention.pattern.node, least)
    if given["head"] >= heads:
        raise SettingError("--head", got=str(given["head"]), expected=f"0 to {heads - 1}, as there are {heads} heads")
    if given["query"] is not None and given["query"] >= length:
        raise SettingError("--query", got=str(given["query"]), expected=f"0 to {length - 1}")
    kv_heads = next((s.shape[1] for s in scores.values() if s.shape[1] > 1), heads)
    if heads % kv_heads:
        raise SettingError("--heads", got=f"{heads} for scores of {kv_heads} heads", expected="a multiple of them")
    shapes = square_shapes(length, heads, kv_heads)
    captured = example_captured(attention.ir, shapes, given["seed"])
    made_up = describe(attention.ir, {n: t for n, t in captured.items() if n not in scores}, given["seed"])
    if given["zoom"] is not None or given["view"] == "gate":
        check_window(shapes, *_zoom(given, length))
    # A view of something else than tiles needs none of them, so there is only one.
    block = given["block"] or (_fitting_block(length) if _in_tiles(given) else -(-length // 16) * 16)
    return drawable(attention, shapes, {**captured, **scores}, block, given["seed"]), made_up


def _in_tiles(given: dict[str, Any]) -> bool:
    return given["zoom"] is None and given["view"] in ("tiles", "heads")


def _fitting_block(length: int) -> int:
    """The least power of two from 16 on that gives at most 32 tiles a side; from 128 on, at most 1024."""
    block = next((size for size in (16, 32, 64) if length <= size * render.WIDEST), _TILE)
    while length > block * _SIDE:
        block *= 2
    return block


def _cells(given: dict[str, Any]) -> tuple[int, int]:
    """Rows and columns of cells: as many as were asked for, in a terminal at most as wide as it is."""
    if given["out"] is not None:
        return (given["cells"] or _FILE_CELLS,) * 2
    rows, columns = render.cells(given["cells"])
    return rows, columns


def _zoom(given: dict[str, Any], length: int) -> tuple[range, range]:
    return (range(length),) * 2 if given["zoom"] is None else shared.read_zoom(given["zoom"], length)


def _tiles(
    drawn: Drawable, given: dict[str, Any], cells: tuple[int, int], with_reasons: bool
) -> tuple[list[Panel], list[str]]:
    head = given["head"]
    if given["zoom"]:
        picture = drawn.pairs(head, *_zoom(given, drawn.shapes.q_len), cells)
        why = reasons(drawn, head, picture, pairs=True) if with_reasons else None
        return [Grid("", picture, "pairs", why)], [f"{picture.pairs:.1%} of the pairs shown are seen."]
    picture = drawn.tiles(head, cells)
    why = reasons(drawn, head, picture) if with_reasons else None
    panel = Grid("", picture, "tiles", why, block=drawn.bound.tiles.block)
    seen = "" if picture.pairs is None else f"; {picture.pairs:.1%} of the pairs are seen"
    notes = [f"{picture.computed:.1%} of the tiles are computed{seen}.", *_by_head(drawn), *_undecided(drawn)]
    return [panel], notes


def _heads(
    drawn: Drawable, given: dict[str, Any], cells: tuple[int, int], with_reasons: bool
) -> tuple[list[Panel], list[str]]:
    groups = drawn.heads_alike()
    small = cells if given["out"] else (min(cells[0], given["cells"] or _SMALL),) * 2
    panels: list[Panel] = []
    for heads in groups[:_HEADS]:
        pairs = given["zoom"] is not None
        picture = (
            drawn.pairs(heads[0], *_zoom(given, drawn.shapes.q_len), small) if pairs else drawn.tiles(heads[0], small)
        )
        why = reasons(drawn, heads[0], picture, pairs=pairs) if with_reasons else None
        block = 0 if pairs else drawn.bound.tiles.block
        panels.append(Grid(head_names(heads), picture, "pairs" if pairs else "tiles", why, block=block))
    notes = [] if len(groups) <= _HEADS else [f"The first {_HEADS} of {len(groups)} heads that differ are shown."]
    if len(groups) == 1 and drawn.shapes.heads > 1:
        notes.append("The mask does not depend on the head.")
    return panels, notes if given["zoom"] else [*notes, *_by_head(drawn), *_undecided(drawn)]


def _score(
    drawn: Drawable, given: dict[str, Any], cells: tuple[int, int], with_reasons: bool
) -> tuple[list[Panel], list[str]]:
    if given["zoom"]:
        picture = score_picture(drawn, given["head"], *_zoom(given, drawn.shapes.q_len), cells, given["raw"])
        return [Grid(f"score of a raw {given['raw']:g}", picture, "pairs")], _of_cells(picture.cell)
    points = _PAGE_POINTS if given["out"] else 2 * cells[1]
    found = score_curves(drawn, given["query"], given["raw"], points)
    if not found.x_name.startswith("distance"):
        return [found], []
    count = sum(not all(map(math.isnan, values)) for values in zip(*(line.y for line in found.lines), strict=True))
    return [found], [f"{count} of the keys that the query sees are evaluated, evenly chosen among them."]


def _gate(
    drawn: Drawable, given: dict[str, Any], cells: tuple[int, int], with_reasons: bool
) -> tuple[list[Panel], list[str]]:
    found = gate_pictures(drawn, given["head"], *_zoom(given, drawn.shapes.q_len), cells)
    panels: list[Panel] = [
        Grid(f"gate on {name}", picture, "pairs", scale=(0.0, 1.0)) for name, picture in found.items()
    ]
    through = any(gate.through for gate in drawn.compiled.program.gates)
    notes = ["The gate is straight through: 1 in the forward pass, soft in the backward pass."] if through else []
    return panels, notes + _of_cells(next(iter(found.values())).cell)


def _selection(
    drawn: Drawable, given: dict[str, Any], cells: tuple[int, int], with_reasons: bool
) -> tuple[list[Panel], list[str]]:
    check_selects(drawn)
    in_file = given["out"] is not None
    rows = given["cells"] or (_FILE_CELLS if in_file else render.WIDEST)
    columns = _PAGE_POINTS if in_file else 2 * cells[1]
    panels: list[Panel] = []
    notes = []
    for number in range(len(drawn.compiled.program.selections)):
        found = lifetimes(drawn, number, given["head"], bars=rows, slots=rows, columns=columns)
        panels.append(found)
        if len(found.bars) < found.selected:
            notes.append(f"The {len(found.bars)} keys that live longest of {found.selected:,} selected are shown.")
        if len(found.slots) < min(found.k, found.length):
            notes.append(f"The first {len(found.slots)} of {found.k:,} slots are shown.")
    return panels, notes


_PANELS = {"tiles": _tiles, "heads": _heads, "score": _score, "gate": _gate, "selection": _selection}


def _caption(given: dict[str, Any], drawn: Drawable, panel: Panel) -> str:
    length, block, heads = drawn.shapes.q_len, drawn.bound.tiles.block, drawn.shapes.heads
    cells = ""
    what = f"{length:,} queries x {length:,} keys"
    if isinstance(panel, Grid):
        high, wide = panel.picture.cell
        if panel.unit == "pairs":
            queries, keys = panel.picture.queries, panel.picture.keys
            what = f"queries {queries.start} to {queries.stop - 1}, keys {keys.start} to {keys.stop - 1}"
            cells = "single pairs" if high == wide == 1 else f"a cell is {high} x {wide} pairs"
        else:
            what += f", tiles of {block} x {block}"
            cells = "" if high == block else f"a cell is {high // block} x {wide // block} tiles"
    head = f"head {given['head']} of {heads}" if _differs(drawn, given["view"]) else "the same for every head"
    several = given["view"] == "heads" or (given["view"] == "score" and not given["zoom"])
    return ", ".join(part for part in (what, cells, "" if several else head) if part)


def _differs(drawn: Drawable, view: str) -> bool:
    return drawn.heads_differ or view in ("gate", "score")


def _by_head(drawn: Drawable) -> list[str]:
    if not drawn.heads_differ:
        return []
    shares = [f"{share:.1%}" for share in drawn.computed()]
    shown = ", ".join(shares[:8]) + (", ..." if len(shares) > 8 else "")
    return [f"Tiles computed, head by head: {shown}."]


def _undecided(drawn: Drawable) -> list[str]:
    count = drawn.bound.tiles.undecided
    return (
        [f"{count:,} tiles (all heads) count as partial by bounds alone; some may be empty or full."] if count else []
    )


def _of_cells(cell: tuple[int, int]) -> list[str]:
    return [] if cell == (1, 1) else ["A cell shows the greatest value of its pairs that are seen."]
