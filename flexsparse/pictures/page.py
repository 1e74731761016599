"""A figure as one HTML page: its data, and a script that draws it and says what is under the pointer."""

from __future__ import annotations

import base64
import json
import math
from array import array
from collections.abc import Iterable, Sequence
from html import escape
from importlib import resources
from typing import Any

from flexsparse.pictures import colours
from flexsparse.pictures.curves import Curves
from flexsparse.pictures.figure import CLASSES, Figure, Grid, Panel
from flexsparse.pictures.lifetimes import Lifetimes


def page(figure: Figure) -> str:
    """The whole page; it loads nothing, and its own policy forbids it to."""
    template = resources.files("flexsparse.pictures").joinpath("page.html").read_text(encoding="utf-8")
    data = {
        "facts": [fact for fact in figure.facts if fact[1] != figure.title],
        "notes": figure.notes,
        "panels": [panel_data(panel) for panel in figure.panels],
        "ink": [colours.INK, colours.FAINT, colours.EMPTY],
    }
    # A closing tag inside a text must not end the script.
    text = json.dumps(data, allow_nan=False).replace("<", "\\u003c")
    return template.replace("{{title}}", escape(figure.title)).replace("{{data}}", text)


def panel_data(panel: Panel) -> dict[str, Any]:
    """What the script draws. Tables of a grid are packed, row by row, as little-endian numbers in base64."""
    if isinstance(panel, Curves):
        return _curves(panel)
    if isinstance(panel, Lifetimes):
        shades = colours.of_keys(panel)
        bars = [
            {"key": bar.key, "birth": bar.birth, "death": bar.death, "slot": bar.slot, "score": _number(bar.score)}
            | {"colour": shades[bar.key]}
            for bar in panel.bars
        ]
        return {
            "kind": "lifetimes",
            "title": panel.title,
            "length": panel.length,
            "bars": bars,
            "slots": panel.slots,
            "chunk": panel.chunk,
            "colours": {str(key): colour for key, colour in shades.items()},
            "tau": _curves(panel.tau),
        }
    return _grid(panel)


def _grid(panel: Grid) -> dict[str, Any]:
    picture, why = panel.picture, panel.reasons
    shares = picture.shares or picture.computed_shares
    return {
        "kind": "grid",
        "title": panel.title,
        "rows": len(picture.kinds),
        "columns": len(picture.kinds[0]),
        "queries": [picture.queries.start, picture.queries.stop],
        "keys": [picture.keys.start, picture.keys.stop],
        "cell": picture.cell,
        "block": panel.block,
        "classes": CLASSES[panel.unit],
        "palette": colours.palette(panel),
        "legend": colours.entries(panel),
        "colours": _packed("B", colours.colour_numbers(panel)),
        "kinds": _packed("B", picture.kinds),
        "shares": None if shares is None else _packed("f", shares),
        "share_of": "pairs seen" if picture.shares is not None else "tiles computed",
        "values": None if picture.values is None else _packed("f", picture.values),
        "texts": [] if why is None else why.texts,
        "reasons": None if why is None else _packed("H", why.of),
    }


def _curves(panel: Curves) -> dict[str, Any]:
    lines = [
        {"name": line.name, "colour": colours.of_line(n), "y": [_number(y) for y in line.y]}
        for n, line in enumerate(panel.lines)
    ]
    names = {"title": panel.title, "x_name": panel.x_name, "y_name": panel.y_name}
    return {"kind": "curves", **names, "x": panel.x, "lines": lines}


def _packed(kind: str, rows: Iterable[Sequence[float]]) -> str:
    import sys

    values: Any = array(kind)
    for row in rows:
        values.extend(row)
    if sys.byteorder == "big":
        values.byteswap()
    return base64.b64encode(values.tobytes()).decode()


def _number(value: float) -> float | str | None:
    """A number as JSON has it: None for a gap, the name of an infinity."""
    if math.isnan(value):
        return None
    return value if math.isfinite(value) else str(value)
