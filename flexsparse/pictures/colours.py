"""The colours of cells, lines and bars, shared by every file format."""

from __future__ import annotations

from collections.abc import Sequence

from flexsparse.pictures.figure import CLASSES, Grid
from flexsparse.pictures.lifetimes import Lifetimes

EMPTY, FULL = "#edf0f2", "#176c8c"
INK, FAINT, PAPER = "#1c2630", "#65727e", "#ffffff"
LINES = ("#176c8c", "#d1731f", "#5b8c2a", "#a1447f", "#6656b3", "#8a6d1d", "#2a8a78", "#b03a3a")
_PARTIAL = ("#fae6c5", "#d1731f")
_VALUES = ("#d9e8f5", "#0b3a66")
# Steps of a partial cell by its share, and of a number between the ends of its scale.
_SHARES, _STEPS = 8, 32


def palette(grid: Grid) -> list[str]:
    """The colours that ``colour_numbers`` counts: nothing seen, then from little to much, and FULL at the end."""
    if grid.picture.values is not None:
        return [EMPTY, *_between(*_VALUES, _STEPS)]
    return [EMPTY, *_between(*_PARTIAL, _SHARES), FULL]


def colour_numbers(grid: Grid) -> list[list[int]]:
    """The colour of every cell, by rows."""
    picture = grid.picture
    steps = _STEPS if picture.values is not None else _SHARES
    rows = []
    for number, kinds in enumerate(picture.kinds):
        row = []
        for column, kind in enumerate(kinds):
            shade = grid.shade(number, column)
            if shade is None:
                row.append(0)
            elif kind == 2 and picture.values is None:
                row.append(steps + 1)
            else:
                row.append(1 + min(steps - 1, int(steps * shade)))
        rows.append(row)
    return rows


def entries(grid: Grid, *, counted: bool = True) -> list[tuple[list[str], str]]:
    """The legend: colours, and what they mean, ``counted`` with the tiles or pairs of each kind."""
    colours = palette(grid)
    if grid.picture.values is not None:
        low, high = grid.span
        return [(colours[1::8] + colours[-1:], f"{low:.4g} to {high:.4g}"), (colours[:1], "hidden")]
    words, counts = CLASSES[grid.unit], [f" {count:,}" * counted for count in grid.picture.counts]
    picture = grid.picture
    by = "pairs" if picture.shares is not None else "tiles computed" if picture.computed_shares is not None else ""
    middle = colours[1:-1:3] if by else [colours[5]]
    some = f"{words[1]}{counts[1] if grid.unit == 'tiles' else ''}{f', by share of {by}' if by else ''}"
    shown = [([FULL], words[2] + counts[2]), (middle, some), ([EMPTY], words[0] + counts[0])]
    return [entry for entry in shown if grid.unit == "tiles" or picture.cell != (1, 1) or entry[0] is not middle]


def of_line(number: int) -> str:
    """The colour of a curve."""
    return LINES[number % len(LINES)]


def of_keys(panel: Lifetimes) -> dict[int, str]:
    """The colour of every key that is shown, the same in bars and slots; successive keys of a slot differ."""
    in_slot: dict[int, set[int]] = {bar.slot: set() for bar in panel.bars}
    for bar in panel.bars:
        in_slot[bar.slot].add(bar.key)
    for slot, row in enumerate(panel.slots):
        in_slot.setdefault(slot, set()).update(key for key in row if key >= 0)
    return {key: of_line(slot + n) for slot, keys in in_slot.items() for n, key in enumerate(sorted(keys))}


def _between(first: str, last: str, steps: int) -> Sequence[str]:
    ends = [[int(colour[n : n + 2], 16) for n in (1, 3, 5)] for colour in (first, last)]
    made = []
    for step in range(steps):
        part = step / (steps - 1)
        mixed = (round(a + part * (b - a)) for a, b in zip(*ends, strict=True))
        made.append("#" + "".join(f"{x:02x}" for x in mixed))
    return made
