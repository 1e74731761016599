"""A figure as PNG, drawn by matplotlib, which is an extra: ``pip install flexsparse[plots]``."""

from __future__ import annotations

import importlib.util
import io
import math
from typing import Any

from flexsparse.errors import SettingError
from flexsparse.pictures import colours
from flexsparse.pictures.curves import Curves
from flexsparse.pictures.figure import Figure, Grid, Panel
from flexsparse.pictures.lifetimes import Lifetimes

_ACROSS, _DOTS = 4, 130


def check_matplotlib() -> None:
    """Raise SettingError where there is no matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        raise SettingError(
            "--out",
            got="a .png without matplotlib",
            expected="matplotlib, which draws it",
            mend="Run: pip install flexsparse[plots]; .svg and .html need nothing.",
        )


def png(figure: Figure) -> bytes:
    """The whole picture. Raises SettingError where there is no matplotlib."""
    check_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Sheet

    panels = [axes for panel in figure.panels for axes in _axes_of(panel)]
    across = min(_ACROSS, len(panels)) if all(isinstance(p, Grid) for p in figure.panels) else 1
    down = -(-len(panels) // across)
    side = 3.2 if across > 2 else 6.0
    sheet = Sheet(figsize=(side * across + 1, side * down + 1), dpi=_DOTS, layout="constrained")
    FigureCanvasAgg(sheet)
    # Without parse_math a dollar sign is only a dollar sign.
    sheet.suptitle("\n".join(f"{name}: {value}" for name, value in figure.facts), fontsize=9, parse_math=False)
    grid = sheet.subplots(down, across, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for axes, (draw, panel) in zip(grid.flat, panels, strict=False):
        draw(axes, panel)
    file = io.BytesIO()
    sheet.savefig(file, format="png")
    return file.getvalue()


def _axes_of(panel: Panel) -> list[Any]:
    """What draws each of the charts of a panel, with what it draws."""
    if isinstance(panel, Lifetimes):
        return [(_bars, panel), (_slots, panel), (_curves, panel.tau)]
    return [(_curves if isinstance(panel, Curves) else _grid, panel)]


def _grid(axes: Any, panel: Grid) -> None:
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    picture, shades = panel.picture, colours.palette(panel)
    numbers = colours.colour_numbers(panel)
    high, wide = (cell * count for cell, count in zip(picture.cell, (len(numbers), len(numbers[0])), strict=True))
    left, top = picture.keys.start, picture.queries.start
    axes.imshow(
        numbers,
        cmap=ListedColormap(shades),
        vmin=-0.5,
        vmax=len(shades) - 0.5,
        interpolation="nearest",
        extent=(left, left + wide, top + high, top),
    )
    axes.set(xlabel="key", ylabel="query")
    axes.set_title(panel.title, fontsize=9, parse_math=False)
    entries = colours.entries(panel, counted=not panel.title)
    handles = [Patch(color=some[len(some) // 2], label=words) for some, words in entries]
    axes.legend(handles=handles, loc="upper right", fontsize=7 if not panel.title else 5)


def _curves(axes: Any, panel: Curves) -> None:
    for number, line in enumerate(panel.lines):
        y = [v if math.isfinite(v) else math.nan for v in line.y]
        axes.plot(panel.x, y, color=colours.of_line(number), label=line.name, marker="." if len(y) < 3 else None)
    axes.set(xlabel=panel.x_name, ylabel=panel.y_name)
    axes.set_title(panel.title, fontsize=9, parse_math=False)
    axes.legend(fontsize=7)


def _bars(axes: Any, panel: Lifetimes) -> None:
    rows, shades = range(len(panel.bars)), colours.of_keys(panel)
    axes.barh(
        list(rows),
        [bar.death - bar.birth for bar in panel.bars],
        left=[bar.birth for bar in panel.bars],
        color=[shades[bar.key] for bar in panel.bars],
    )
    step = max(1, len(panel.bars) // 24)
    axes.set_yticks(list(rows)[::step], [str(bar.key) for bar in panel.bars][::step], fontsize=6)
    axes.invert_yaxis()
    axes.set(xlabel="query", ylabel="key", xlim=(0, panel.length))
    axes.set_title(f"{panel.title}: a bar for each key", fontsize=9, parse_math=False)


def _slots(axes: Any, panel: Lifetimes) -> None:
    from matplotlib.colors import to_rgb

    shades = {-1: colours.EMPTY, **colours.of_keys(panel)}
    picture = [[to_rgb(shades[key]) for key in row] for row in panel.slots]
    right = len(panel.slots[0]) * panel.chunk
    axes.imshow(picture, aspect="auto", interpolation="nearest", extent=(0, right, len(panel.slots) - 0.5, -0.5))
    axes.set(xlabel="query", ylabel="slot")
    axes.set_title("the key in each slot, in the colour of its bar", fontsize=9)
