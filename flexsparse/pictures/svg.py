"""A figure as SVG: text and shapes alone, nothing from the network."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from flexsparse.pictures import colours
from flexsparse.pictures.curves import Curves
from flexsparse.pictures.figure import Figure, Grid, Panel
from flexsparse.pictures.lifetimes import Lifetimes

_MARGIN, _LINE = 24, 20
_LARGE, _SMALL = 480, 220
_CHART = (560, 200)
_BARS, _SLOT_ROW = 560, 12
# Characters of a line of words, and of its pixels.
_WRAP, _CHARACTER = 92, 6.7


def svg(figure: Figure) -> str:
    """The whole picture; its size follows from the panels."""
    head = [line for name, value in figure.facts for line in _wrapped(f"{name}: {value}")]
    y = float(_MARGIN + _LINE * len(head))
    parts = [_text(_MARGIN, _MARGIN + 10 + _LINE * n, line, bold=n == 0) for n, line in enumerate(head)]
    small = len(figure.panels) > 2 and all(isinstance(panel, Grid) for panel in figure.panels)
    x, row_height, width = float(_MARGIN), 0.0, 0.0
    for panel in figure.panels:
        body, wide, high = _panel(panel, small)
        if x > _MARGIN and (not small or x + wide > 3.5 * _LARGE):
            x, y, row_height = _MARGIN, y + row_height + _MARGIN, 0.0
        parts.append(f'<g transform="translate({x:g} {y:g})">{body}</g>')
        width, row_height, x = max(width, x + wide), max(row_height, high), x + wide + _MARGIN
    y += row_height + 1.5 * _LINE
    if small and isinstance(figure.panels[0], Grid):
        body, high = _legend(figure.panels[0], _MARGIN, y - _LINE, counted=False)
        parts.append(body)
        y = high + 1.5 * _LINE
    for line in (part for note in figure.notes for part in _wrapped(note)):
        parts.append(_text(_MARGIN, y, line, colour=colours.FAINT))
        y += _LINE
    words = [*head, *(part for note in figure.notes for part in _wrapped(note))]
    width = max(width, _MARGIN + _CHARACTER * max(map(len, words))) + _MARGIN
    size = f'width="{width:g}" height="{y:g}" viewBox="0 0 {width:g} {y:g}"'
    style = 'font-family="system-ui, sans-serif" font-size="13"'
    paper = f'<rect width="100%" height="100%" rx="8" fill="{colours.PAPER}"/>'
    title = f"<title>{escape(figure.title)}</title>"
    return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>', title, paper, *parts, "</svg>\n"])


def _panel(panel: Panel, small: bool) -> tuple[str, float, float]:
    """The shapes of a panel with its upper left corner at 0, its width and its height."""
    if isinstance(panel, Grid):
        return _grid(panel, _SMALL if small else _LARGE, legend=not small)
    return _curves(panel) if isinstance(panel, Curves) else _lifetimes(panel)


def _grid(panel: Grid, side: int, *, legend: bool) -> tuple[str, float, float]:
    picture = panel.picture
    rows, columns = len(picture.kinds), len(picture.kinds[0])
    cell = side / max(rows, columns)
    left, top = 10 + _CHARACTER * len(str(picture.queries.stop - 1)), (2.2 if panel.title else 1.2) * _LINE
    parts = [_text(left, 14, panel.title, bold=True)] if panel.title else []
    keys = f"keys {picture.keys.start} to {picture.keys.stop - 1}"
    parts.append(_text(left, top - 6, keys, colour=colours.FAINT))
    for number in range(0, rows, max(1, rows // 8)):
        label = str(picture.queries.start + number * picture.cell[0])
        parts.append(_text(left - 6, top + number * cell + 10, label, anchor="end", colour=colours.FAINT))
    place = f'transform="translate({left:g} {top:g}) scale({cell:g})" shape-rendering="crispEdges"'
    parts.append(f"<g {place}>{_cells(panel, rows, columns)}</g>")
    y = top + rows * cell
    if legend:
        body, y = _legend(panel, left, y)
        parts.append(body)
    return "".join(parts), left + columns * cell, y + 6


def _legend(panel: Grid, x: float, y: float, *, counted: bool = True) -> tuple[str, float]:
    """A line for each class below y, and where the last one ends."""
    parts = []
    for colour, words in colours.entries(panel, counted=counted):
        y += _LINE
        parts += [_swatch(x + 15 * n, y - 9, one) for n, one in enumerate(colour)]
        parts.append(_text(x + 15 * len(colour) + 4, y + 1, words))
    return "".join(parts), y


def _cells(panel: Grid, rows: int, columns: int) -> str:
    """One path a colour, of runs along the rows, over a ground of the colour of nothing."""
    paths: dict[int, list[str]] = {}
    for number, row in enumerate(colours.colour_numbers(panel)):
        start = 0
        for column in range(1, columns + 1):
            if column == columns or row[column] != row[start]:
                paths.setdefault(row[start], []).append(f"M{start} {number}h{column - start}v1H{start}z")
                start = column
    shades = colours.palette(panel)
    ground = f'<rect width="{columns}" height="{rows}" fill="{shades[0]}"/>'
    return ground + "".join(
        f'<path fill="{shades[number]}" d="{"".join(runs)}"/>' for number, runs in paths.items() if number
    )


def _curves(panel: Curves) -> tuple[str, float, float]:
    wide, high = _CHART
    left, top = 60.0, 2.2 * _LINE
    finite = [y for line in panel.lines for y in line.y if math.isfinite(y)] or [0.0]
    low, up = min(finite), max(finite)
    first, last = panel.x[0], panel.x[-1]

    def at(x: float, y: float) -> str:
        across = (x - first) / (last - first) if last > first else 0.5
        rise = (min(max(y, low), up) - low) / (up - low) if up > low else 0.5
        return f"{left + across * wide:.1f},{top + (1 - rise) * high:.1f}"

    parts = [_text(left, 14, panel.title, bold=True)]
    parts.append(_text(left, top - 6, panel.y_name, colour=colours.FAINT))
    parts.append(f'<path fill="none" stroke="{colours.FAINT}" d="M{left:g} {top:g}v{high}h{wide}"/>')
    parts += [_text(left - 6, y, f"{value:.4g}", anchor="end") for value, y in ((up, top + 9), (low, top + high))]
    for value, x, anchor in ((first, left, "start"), (last, left + wide, "end")):
        parts.append(_text(x, top + high + 16, f"{value:g}", anchor=anchor))
    parts.append(_text(left + wide / 2, top + high + 16, panel.x_name, anchor="middle", colour=colours.FAINT))
    y = top + high + 20
    for number, line in enumerate(panel.lines):
        colour = colours.of_line(number)
        for run in _runs(panel.x, line.y):
            points = " ".join(at(*point) for point in run)
            if len(run) == 1:
                x_at, y_at = points.split(",")
                parts.append(f'<circle cx="{x_at}" cy="{y_at}" r="1.5" fill="{colour}"/>')
            else:
                parts.append(f'<polyline fill="none" stroke="{colour}" stroke-width="1.6" points="{points}"/>')
        y += _LINE
        parts += [_swatch(left, y - 9, colour), _text(left + 18, y + 1, line.name)]
    return "".join(parts), left + wide + 10, y + 6


def _runs(x: Sequence[float], y: Sequence[float]) -> list[list[tuple[float, float]]]:
    """The points of a line between its gaps."""
    runs: list[list[tuple[float, float]]] = [[]]
    for point in zip(x, y, strict=True):
        if math.isnan(point[1]):
            runs.append([])
        else:
            runs[-1].append(point)
    return [run for run in runs if run]


def _lifetimes(panel: Lifetimes) -> tuple[str, float, float]:
    left, top = 60.0, 2.2 * _LINE
    high = max(2.0, min(14.0, 600 / max(1, len(panel.bars))))
    parts = [_text(left, 14, panel.title, bold=True)]
    named = f"queries 0 to {panel.length - 1}; a bar for each key"
    parts.append(_text(left, top - 6, named, colour=colours.FAINT))
    scale, shades = _BARS / panel.length, colours.of_keys(panel)
    for number, bar in enumerate(panel.bars):
        y = top + number * high
        says = f"key {bar.key}, queries {bar.birth} to {bar.death - 1}, slot {bar.slot}, score {bar.score:.4g}"
        box = f'x="{left + bar.birth * scale:.1f}" y="{y:.1f}" width="{(bar.death - bar.birth) * scale:.1f}"'
        fill = f'height="{max(1.0, high - 1):.1f}" fill="{shades[bar.key]}"'
        parts.append(f"<rect {box} {fill}><title>{says}</title></rect>")
        if high >= 10 or number % math.ceil(12 / high) == 0:
            parts.append(_text(left - 6, y + min(high, 12) - 1, str(bar.key), anchor="end", size=10))
    y = top + len(panel.bars) * high + 2 * _LINE
    parts.append(_text(left, y - 6, "slots as rows: the key in each, in the colour of its bar", colour=colours.FAINT))
    parts.append(f'<g transform="translate({left:g} {y:g})" shape-rendering="crispEdges">{_slots(panel, shades)}</g>')
    y += len(panel.slots) * _SLOT_ROW + _LINE
    body, wide, below = _curves(panel.tau)
    parts.append(f'<g transform="translate(0 {y:g})">{body}</g>')
    return "".join(parts), max(left + _BARS + 10, wide), y + below


def _slots(panel: Lifetimes, shades: Mapping[int, str]) -> str:
    """Runs of one key along each slot."""
    scale = _BARS / len(panel.slots[0])
    parts = []
    for slot, row in enumerate(panel.slots):
        start = 0
        for column in range(1, len(row) + 1):
            if column < len(row) and row[column] == row[start]:
                continue
            if row[start] >= 0:
                box = f'x="{start * scale:.1f}" y="{slot * _SLOT_ROW}" width="{(column - start) * scale:.1f}"'
                fill = f'height="{_SLOT_ROW - 1}" fill="{shades[row[start]]}"'
                parts.append(f"<rect {box} {fill}><title>slot {slot}: key {row[start]}</title></rect>")
            start = column
    return "".join(parts)


def _swatch(x: float, y: float, colour: str) -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="12" height="12" rx="2" fill="{colour}"/>'


def _text(
    x: float, y: float, words: str, *, anchor: str = "start", bold: bool = False, colour: str = "", size: int = 0
) -> str:
    extra = ' font-weight="600"' if bold else ""
    extra += f' text-anchor="{anchor}"' if anchor != "start" else ""
    extra += f' font-size="{size}"' if size else ""
    return f'<text x="{x:g}" y="{y:g}" fill="{colour or colours.INK}"{extra}>{escape(words, quote=False)}</text>'


def _wrapped(words: str) -> list[str]:
    import textwrap

    return textwrap.wrap(words, _WRAP) or [""]
