"""The roofline of a plan as a picture: on the terminal, as PNG, and as a page of HTML that needs no network."""

from __future__ import annotations

import html as escaping
import io
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.text import Text

from flexsparse.cli import render
from flexsparse.errors import SettingError
from flexsparse.roofline import Roofline

_ROWS, _WIDEST, _LEFT = 11, 56, 9
# The slope of the roof, its flat, and the points.
_UNICODE = ("╱", "─", {"floor": "○", "predicted": "●"})
_ASCII = ("/", "-", {"floor": "o", "predicted": "*"})
_PLOT_WIDTH, _PLOT_HEIGHT = 640, 340


@dataclass(frozen=True)
class _Frame:
    """Logarithmic axes around a roof and its point: operations a byte, and 10^12 operations a second."""

    left: float
    right: float
    low: float
    high: float

    def x(self, intensity: float) -> float:
        """The place of an intensity, from 0 at the left to 1."""
        return math.log(intensity / self.left) / math.log(self.right / self.left)

    def y(self, rate: float) -> float:
        """The place of a rate, from 0 at the bottom to 1."""
        return math.log(rate / self.low) / math.log(self.high / self.low)

    def intensity(self, x: float) -> float:
        """The intensity at a place."""
        return self.left * (self.right / self.left) ** x


def _frame(found: Roofline) -> _Frame:
    left = min(found.intensity, found.ridge) / 8
    right = max(found.intensity, found.ridge) * 8
    lowest = min(left * found.bandwidth, found.reached or found.roof) / 1e12
    return _Frame(left, right, lowest / 2, found.peak / 1e12 * 2)


def _ticks(low: float, high: float) -> list[float]:
    """Powers of ten between two numbers, or of two where there are fewer than two of ten."""
    for base in (10, 2):
        found = [float(base) ** n for n in range(math.ceil(math.log(low, base)), math.floor(math.log(high, base)) + 1)]
        if len(found) > 1:
            break
    return found


def _points(found: Roofline) -> list[tuple[str, float]]:
    """What is marked, with its rate: the floor of the time on the roof, and the prediction below it."""
    points = [("floor", found.roof / 1e12)]
    if found.reached is not None:
        points.append(("predicted", found.reached / 1e12))
    return points


def terminal(found: Roofline, console: Console) -> Text:
    """The roof and the plan's points in characters, ``console`` wide at most, with a legend."""
    ascii_only = render.is_plain(console)
    slope, flat, marks = _ASCII if ascii_only else _UNICODE
    frame, width = _frame(found), max(24, min(_WIDEST, console.width - _LEFT - 2))
    cells = [[" "] * width for _ in range(_ROWS)]

    def row(rate: float) -> int:
        return _ROWS - 1 - min(_ROWS - 1, max(0, round(frame.y(rate) * (_ROWS - 1))))

    for column in range(width):
        intensity = frame.intensity(column / (width - 1))
        rate = min(found.peak, intensity * found.bandwidth) / 1e12
        cells[row(rate)][column] = slope if intensity < found.ridge else flat
    place = round(frame.x(found.intensity) * (width - 1))
    for name, rate in _points(found):
        cells[row(rate)][place] = marks[name]
    ticks = {row(tick): tick for tick in _ticks(frame.low, frame.high)}
    lines = [Text("TFLOP/s over operations a byte", "bright_black")]
    for number, line in enumerate(cells):
        label = f"{ticks[number]:>{_LEFT - 2},g} " if number in ticks else " " * (_LEFT - 1)
        drawn = Text(label + ("|" if ascii_only else "│"), "bright_black")
        body = Text("".join(line).rstrip(), "cyan")
        body.highlight_words(list(marks.values()), "bold yellow")
        lines.append(drawn.append_text(body))
    lines += [_axis(frame, width, ascii_only), *_legend(found, marks)]
    return Text("\n").join(lines)


def _axis(frame: _Frame, width: int, ascii_only: bool) -> Text:
    labels = [" "] * (width + 1)
    for tick in _ticks(frame.left, frame.right):
        shown, start = f"{tick:,g}", round(frame.x(tick) * (width - 1))
        start = min(start, width - len(shown))
        if all(c == " " for c in labels[max(0, start - 1) : start + len(shown) + 1]):
            labels[start : start + len(shown)] = shown
    edge = ("+" + "-" * width) if ascii_only else ("└" + "─" * width)
    lead = " " * (_LEFT - 1)
    return Text(f"{lead}{edge}\n{lead} {''.join(labels).rstrip()}", "bright_black")


def _legend(found: Roofline, marks: dict[str, str]) -> list[Text]:
    lines = [Text("  ").append(marks["floor"], "bold yellow").append(f" {_floor_text(found)}")]
    if found.predicted is not None:
        lines.append(Text("  ").append(marks["predicted"], "bold yellow").append(f" {_predicted_text(found)}"))
    return lines


def _floor_text(found: Roofline) -> str:
    return f"at {found.intensity:,.0f} operations a byte {found.bound} binds: {found.roof / 1e12:,.4g} TFLOP/s at most"


def _predicted_text(found: Roofline) -> str:
    assert found.reached is not None
    return f"predicted: {found.reached / 1e12:,.4g} TFLOP/s, {found.reached / found.roof:.0%} of what the roof allows"


def png(found: Roofline, title: str) -> bytes:
    """The same as a picture. Raises SettingError where matplotlib is missing."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise SettingError(
            "--png",
            got="no matplotlib",
            expected="the optional extra 'plots'",
            mend="pip install 'flexsparse[plots]', or take --html, which needs nothing.",
        ) from None
    frame, wrapped = _frame(found), textwrap.fill(title, 72)
    figure = Figure(figsize=(7.2, 4.4), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    ends = [frame.left, found.ridge, frame.right]
    axes.loglog(ends, [min(found.peak, x * found.bandwidth) / 1e12 for x in ends], color="tab:blue")
    for (name, rate), face in zip(_points(found), ("white", "tab:orange"), strict=False):
        text = _floor_text(found) if name == "floor" else _predicted_text(found)
        axes.plot(found.intensity, rate, "o", color="tab:orange", markerfacecolor=face, label=text)
    axes.set(xlim=(frame.left, frame.right), ylim=(frame.low, frame.high))
    axes.set(xlabel="operations a byte", ylabel="TFLOP/s", title=f"{wrapped}\nunder the roof of {found.hardware}")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize="small")
    out = io.BytesIO()
    FigureCanvasAgg(figure).print_png(out)
    return out.getvalue()


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 44rem; padding: 0 1rem; color: #222; }
h1 { font-size: 1.2rem; overflow-wrap: anywhere; }
svg { width: 100%; height: auto; }
svg text { font: 12px system-ui, sans-serif; fill: #666; }
.grid { stroke: #ddd; } .roof { stroke: #1f77b4; stroke-width: 2; fill: none; }
.floor { fill: #fff; stroke: #e6710b; stroke-width: 2; } .predicted { fill: #e6710b; }
td { padding: .15rem 1rem .15rem 0; vertical-align: top; } td:first-child { font-weight: 600; white-space: nowrap; }
@media (prefers-color-scheme: dark) { body { background: #181818; color: #ddd; } .grid { stroke: #333; }
  .floor { fill: #181818; } svg text { fill: #aaa; } }
"""


def html(found: Roofline, title: str, facts: Sequence[tuple[str, str]]) -> str:
    """A page with the same picture and ``facts``, each a name and what is said about it."""
    rows = "".join(f"<tr><td>{escaping.escape(n)}</td><td>{escaping.escape(v)}</td></tr>\n" for n, v in facts)
    name = escaping.escape(title)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{name}</title>\n'
        f'<meta name="viewport" content="width=device-width">\n<style>{_STYLE}</style>\n</head>\n<body>\n'
        f"<h1>{name} under the roof of {escaping.escape(found.hardware)}</h1>\n{_svg(found)}\n"
        f"<table>\n{rows}</table>\n</body>\n</html>\n"
    )


def _svg(found: Roofline) -> str:
    frame = _frame(found)

    def x(intensity: float) -> float:
        return round(60 + frame.x(intensity) * (_PLOT_WIDTH - 80), 1)

    def y(rate: float) -> float:
        return round(20 + (1 - frame.y(rate)) * (_PLOT_HEIGHT - 70), 1)

    bottom, right = y(frame.low), x(frame.right)
    parts = [f'<svg viewBox="0 0 {_PLOT_WIDTH} {_PLOT_HEIGHT}" role="img" aria-label="roofline">']
    for tick in _ticks(frame.left, frame.right):
        parts.append(f'<line class="grid" x1="{x(tick)}" x2="{x(tick)}" y1="20" y2="{bottom}"/>')
        parts.append(f'<text x="{x(tick)}" y="{bottom + 16}" text-anchor="middle">{tick:,g}</text>')
    for tick in _ticks(frame.low, frame.high):
        parts.append(f'<line class="grid" x1="60" x2="{right}" y1="{y(tick)}" y2="{y(tick)}"/>')
        parts.append(f'<text x="54" y="{y(tick) + 4}" text-anchor="end">{tick:,g}</text>')
    roof = [(i, min(found.peak, i * found.bandwidth) / 1e12) for i in (frame.left, found.ridge, frame.right)]
    line = " ".join(f"{x(intensity)},{y(rate)}" for intensity, rate in roof)
    parts.append(f'<polyline class="roof" points="{line}"/>')
    for name, rate in _points(found):
        said = _floor_text(found) if name == "floor" else _predicted_text(found)
        place = f'cx="{x(found.intensity)}" cy="{y(rate)}"'
        parts.append(f'<circle class="{name}" {place} r="5"><title>{said}</title></circle>')
    parts.append(f'<text x="{right}" y="{_PLOT_HEIGHT - 12}" text-anchor="end">operations a byte</text>')
    parts.append('<text x="60" y="12">TFLOP/s</text>\n</svg>')
    return "\n".join(parts)
