"""A figure: what is to be drawn, with its words, before any renderer decides how."""

from __future__ import annotations

import functools
import math
import pathlib
from dataclasses import asdict, dataclass
from typing import Any

from flexsparse.errors import SettingError, nearest
from flexsparse.pictures.curves import Curves
from flexsparse.pictures.lifetimes import Lifetimes
from flexsparse.pictures.mask import Picture
from flexsparse.pictures.reasons import Reasons

SUFFIXES = (".svg", ".png", ".html")
# By kind of cell, in the order EMPTY, PARTIAL, FULL.
CLASSES = {"tiles": ("empty", "partial", "full"), "pairs": ("hidden", "partly seen", "seen")}


@dataclass(frozen=True)
class Grid:
    """A picture of tiles or of pairs ("tiles" or "pairs" is the unit), or of a number for each pair that is seen.

    Numbers are shaded over ``scale``, or from the least to the greatest where that is None. ``block`` is the size of
    a tile, 0 for pairs.
    """

    title: str
    picture: Picture
    unit: str
    reasons: Reasons | None = None
    scale: tuple[float, float] | None = None
    block: int = 0

    @functools.cached_property
    def span(self) -> tuple[float, float]:
        """The scale, or the least and the greatest finite value; 0 and 0 where there is none."""
        if self.scale is not None:
            return self.scale
        finite = [v for row in self.picture.values or () for v in row if math.isfinite(v)]
        return (min(finite), max(finite)) if finite else (0.0, 0.0)

    def shade(self, row: int, column: int) -> float | None:
        """How dark a cell is, from 0 (nothing, or the least value) to 1; None where no pair of it is seen."""
        picture = self.picture
        kind = picture.kinds[row][column]
        if kind == 0:
            return None
        if picture.values is not None:
            low, high = self.span
            value = picture.values[row][column]
            return (min(max(value, low), high) - low) / (high - low) if high > low else 1.0
        shares = picture.shares or picture.computed_shares
        return 1.0 if kind == 2 else 0.5 if shares is None else shares[row][column]


Panel = Grid | Curves | Lifetimes


@dataclass(frozen=True)
class Figure:
    """Panels under one title; ``facts`` are names with what is to be said of each, ``notes`` whole sentences."""

    title: str
    facts: tuple[tuple[str, str], ...]
    panels: tuple[Panel, ...]
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """The figure as JSON has it; a panel says what it is under "panel"."""
        panels = [{"panel": type(panel).__name__.lower(), **_panel(panel)} for panel in self.panels]
        return {"title": self.title, "facts": dict(self.facts), "panels": panels, "notes": list(self.notes)}


def _panel(panel: Panel) -> dict[str, Any]:
    if not isinstance(panel, Grid):
        return asdict(panel)
    picture = panel.picture
    return {
        "title": panel.title,
        "unit": panel.unit,
        "queries": [picture.queries.start, picture.queries.stop],
        "keys": [picture.keys.start, picture.keys.stop],
        "cell": list(picture.cell),
        "counts": dict(zip(("empty", "partial", "full"), picture.counts, strict=True)),
        "undecided": picture.undecided,
        "pairs_seen": picture.pairs,
        "rows": ["".join("EPF"[kind] for kind in row) for row in picture.kinds],
        "shares": picture.shares,
        "computed_shares": picture.computed_shares,
        "values": picture.values,
        "reasons": None if panel.reasons is None else asdict(panel.reasons),
    }


def check_path(out: str) -> pathlib.Path:
    """The file that a figure is to be written to. Raises SettingError for an unknown suffix."""
    path = pathlib.Path(out)
    if path.suffix.lower() not in SUFFIXES:
        hint = nearest(path.suffix, SUFFIXES) if path.suffix else "For example --out mask.html."
        raise SettingError("--out", got=repr(out), expected=f"a file ending in {', '.join(SUFFIXES)}", mend=hint)
    if path.suffix.lower() == ".png":
        from flexsparse.pictures.png import check_matplotlib

        check_matplotlib()
    return path


def save(figure: Figure, path: pathlib.Path) -> None:
    """Write a figure to a file whose suffix says the format. Raises SettingError where the file cannot be written."""
    from flexsparse.files import write_whole

    try:
        if path.suffix.lower() == ".svg":
            from flexsparse.pictures.svg import svg

            write_whole(path.resolve(), svg(figure))
        elif path.suffix.lower() == ".html":
            from flexsparse.pictures.page import page

            write_whole(path.resolve(), page(figure))
        else:
            from flexsparse.pictures.png import png

            write_whole(path.resolve(), png(figure))
    except OSError as error:
        raise SettingError("--out", got=f"{str(path)!r}: {error.strerror}", expected="a file to write") from None
