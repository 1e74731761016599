"""Figures of ``flexsparse show`` in the terminal: grids, heat maps, numbers, curves, lifetimes and slots."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from flexsparse.cli import render
from flexsparse.pictures.curves import Curves, Line
from flexsparse.pictures.figure import Figure, Grid
from flexsparse.pictures.lifetimes import Lifetimes

_HEAT, _ASCII_HEAT = "░▒▓█", "-+*#"
_EIGHTHS, _ASCII_EIGHTHS = "▁▂▃▄▅▆▇█", ".:-=+*%#"
_BRIGHT, _DIM = "bright_cyan", "bright_black"
# Rows of characters of a curve, by how many curves there are; of more, each has one.
_TALL = {1: 8, 2: 5, 3: 4, 4: 4}
# Widths of a printed number, and rows of numbers that still fit on a screen.
_NUMBER, _NUMBER_ROWS = 8, 32


def print_figure(figure: Figure, console: Console) -> None:
    """Facts, panels, legends and notes."""
    console.print(render.facts(*figure.facts))
    grids = [panel for panel in figure.panels if isinstance(panel, Grid)]
    if len(grids) > 1 and all(grid.picture.values is None for grid in grids):
        console.print()
        console.print(_side_by_side(grids, console))
        console.print()
        console.print(_common_legend(grids, console))
    else:
        for panel in figure.panels:
            console.print()
            if panel.title:
                console.print(Text(panel.title, "bold"))
            console.print(_panel(panel, console))
    for line in figure.notes:
        console.print(line)


def _panel(panel: Grid | Curves | Lifetimes, console: Console) -> RenderableType:
    if isinstance(panel, Curves):
        return _curves(panel, console)
    if isinstance(panel, Lifetimes):
        return _lifetimes(panel, console)
    if panel.picture.values is not None:
        return _values(panel, console)
    return Group(render.mask(panel.picture, console), "", render.legend(panel.picture, panel.unit, console))


def _side_by_side(grids: Sequence[Grid], console: Console) -> Table:
    """Small multiples with their titles, as many in a row as fit."""
    wide = max(2 * len(grids[0].picture.kinds[0]), *(len(grid.title) for grid in grids))
    count = max(1, (console.width + 2) // (wide + 2))
    table = Table.grid(padding=(0, 2, 1, 0))
    small = [Group(Text(g.title, "bold"), render.thumbnail(g.picture, console, wide=2)) for g in grids]
    for first in range(0, len(small), count):
        table.add_row(*small[first : first + count])
    return table


def _common_legend(grids: Sequence[Grid], console: Console) -> Text:
    """The characters of several pictures; the counts are of the first, so they are left out."""
    grid = grids[0]
    return render.legend(grid.picture, grid.unit, console, counted=False)


def _values(panel: Grid, console: Console) -> RenderableType:
    """Numbers where they fit, else a heat map."""
    picture = panel.picture
    assert picture.values is not None
    columns = len(picture.values[0])
    side = len(str(picture.queries.stop - 1))
    fits = side + 2 + _NUMBER * columns <= console.width and len(picture.values) <= _NUMBER_ROWS
    return _numbers(panel, side, console) if fits else _heat(panel, side, console)


def _numbers(panel: Grid, side: int, console: Console) -> Text:
    picture = panel.picture
    assert picture.values is not None
    hidden = "." if render.is_plain(console) else "·"
    heads = [f"{picture.keys.start + n * picture.cell[1]:>{_NUMBER}}" for n in range(len(picture.values[0]))]
    lines = [Text(" " * side + "".join(heads) + "  keys", _DIM)]
    for number, row in enumerate(picture.values):
        line = Text(f"{picture.queries.start + number * picture.cell[0]:>{side}}", _DIM)
        for value, kind in zip(row, picture.kinds[number], strict=True):
            line.append(f"{_short(value) if kind else hidden:>{_NUMBER}}", style=_BRIGHT if kind else _DIM)
        lines.append(line)
    return Text("\n").join([*lines, Text(f"{hidden} hidden", _DIM)])


def _heat(panel: Grid, side: int, console: Console) -> RenderableType:
    picture = panel.picture
    plain = render.is_plain(console)
    glyphs, hidden = (_ASCII_HEAT, ".") if plain else (_HEAT, "·")
    lines = [Text(f"{'':>{side}}  keys {picture.keys.start} to {picture.keys.stop - 1}", _DIM)]
    for number, kinds in enumerate(picture.kinds):
        label = str(picture.queries.start + number * picture.cell[0]) if number % 4 == 0 else ""
        line = Text(f"{label:>{side}}  ", _DIM)
        for column in range(len(kinds)):
            shade = panel.shade(number, column)
            glyph = hidden if shade is None else glyphs[min(3, int(4 * shade))]
            line.append(2 * glyph, style=_DIM if shade is None else _BRIGHT)
        lines.append(line)
    low, high = panel.span
    legend = Text(f"{_short(low)} ").append(" ".join(2 * g for g in glyphs), _BRIGHT).append(f" {_short(high)}   ")
    return Group(Text("\n").join(lines), "", legend.append(2 * hidden, _DIM).append(" hidden"))


def _curves(panel: Curves, console: Console) -> RenderableType:
    """Few lines as tall curves, each over the same range; more as one row of characters each."""
    finite = [y for line in panel.lines for y in line.y if math.isfinite(y)]
    if not finite:
        return Text(f"{panel.y_name} is nowhere finite", _DIM)
    low, high = min(finite), max(finite)
    label = max(len(_short(low)), len(_short(high)))
    parts: list[RenderableType] = []
    if len(panel.lines) not in _TALL:
        side = max(len(line.name) for line in panel.lines)
        for line in panel.lines:
            (row,) = _bars(panel.x, line, console.width - side - 2, 1, low, high, console)
            parts.append(Text(f"{line.name:<{side}}  ").append_text(row))
        return Group(*parts, Text(f"{_axis(panel)}; heights from {_short(low)} to {_short(high)}", _DIM))
    for line in panel.lines:
        parts.append(Text(line.name, "bold"))
        rows = _bars(panel.x, line, console.width - label - 3, _TALL[len(panel.lines)], low, high, console)
        labels = [_short(high), *[""] * (len(rows) - 2), _short(low)]
        parts += [Text(f"{name:>{label}}  ", _DIM).append_text(row) for name, row in zip(labels, rows, strict=True)]
    return Group(*parts, Text(" " * (label + 2) + _axis(panel), _DIM))


def _axis(panel: Curves) -> str:
    return f"{panel.y_name} against {panel.x_name} from {_short(panel.x[0])} to {_short(panel.x[-1])}"


def _bars(
    x: Sequence[float], line: Line, width: int, tall: int, low: float, high: float, console: Console
) -> list[Text]:
    """A line as columns at its x that rise from ``low``, ``tall`` characters high; a gap where there is no value.

    Of points that share a column the first with a value is drawn; a column between two with values has the earlier's.
    """
    bars = _ASCII_EIGHTHS if render.is_plain(console) else _EIGHTHS
    rows = [Text() for _ in range(tall)]
    span = (x[-1] - x[0]) or 1.0
    least = min((later - one for one, later in itertools.pairwise(x)), default=span)
    columns = min(max(width, 8), round(span / least) + 1)
    times = max(1, width // columns)
    shown: dict[int, float] = {}
    at = [round((place - x[0]) / span * (columns - 1)) for place in x]
    for n, y in enumerate(line.y):
        until = at[n + 1] if n + 1 < len(at) and not math.isnan(line.y[n + 1]) else at[n] + 1
        for column in range(at[n], max(until, at[n] + 1)):
            if not math.isnan(y):
                shown.setdefault(column, y)
    for column in range(columns):
        y = shown.get(column, math.nan)
        part = 0.0 if high == low else (min(max(y, low), high) - low) / (high - low)
        level = 0 if math.isnan(y) else 1 + round(part * (8 * tall - 1))
        for number, row in enumerate(reversed(rows)):
            filled = min(8, max(0, level - 8 * number))
            row.append(times * (bars[filled - 1] if filled else " "), style=_BRIGHT)
    return rows


def _lifetimes(panel: Lifetimes, console: Console) -> RenderableType:
    """Bars by key, then slots by chunk, then the threshold."""
    plain = render.is_plain(console)
    inside, outside = ("#", ".") if plain else ("█", "·")
    side = max(3, *(len(str(bar.key)) for bar in panel.bars)) if panel.bars else 3
    width = max(8, min(64, console.width - side - 18))
    lines = [Text(f"{'key':>{side}}  queries 0 to {panel.length - 1}".ljust(side + 2 + width) + "  slot  score", _DIM)]
    for bar in panel.bars:
        line = Text(f"{bar.key:>{side}}  ", _DIM)
        first, last = bar.birth * width // panel.length, -(-bar.death * width // panel.length) - 1
        line.append(outside * first, _DIM).append(inside * (last - first + 1), _BRIGHT)
        line.append(outside * (width - 1 - last), _DIM).append(f"{bar.slot:>6}  {bar.score:.3g}", _DIM)
        lines.append(line)
    name = "slots as rows: the key in each at every chunk"
    return Group(
        Text("\n").join(lines), "", Text(name, "bold"), _slots(panel, console), "", _curves(panel.tau, console)
    )


def _slots(panel: Lifetimes, console: Console) -> Text:
    """One row a slot; a column shows which key stands in it at the start of a chunk of queries."""
    number = len(str(panel.length - 1)) + 1
    columns = max(1, (console.width - 8) // number)
    step = -(-len(panel.slots[0]) // columns)
    empty = "." if render.is_plain(console) else "·"
    heads = [f"{c * panel.chunk:>{number}}" for c in range(0, len(panel.slots[0]), step)]
    lines = [Text(f"{'query':>6}" + "".join(heads), _DIM)]
    for slot, row in enumerate(panel.slots):
        line = Text(f"{slot:>6}", _DIM)
        before = -1
        for key in row[::step]:
            line.append(f"{key if key >= 0 else empty:>{number}}", _BRIGHT if key != before and key >= 0 else _DIM)
            before = key
        lines.append(line)
    return Text("\n").join(lines)


def _short(value: float) -> str:
    """A number in at most seven characters."""
    if math.isinf(value) or math.isnan(value):
        return str(value)
    for digits in (4, 3, 2, 1):
        text = f"{value:.{digits}g}"
        if len(text) <= 7:
            return text
    return text
