"""SVG, PNG and HTML: what they hold is the figure, and a browser shows it."""

from __future__ import annotations

import base64
import html
import itertools
import json
import math
import pathlib
import re
import shutil
import struct
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from typing import Any

import pytest

from flexsparse.cli.show_figure import draw
from flexsparse.errors import SettingError
from flexsparse.pictures import colours
from flexsparse.pictures.figure import Figure, Grid, check_path, save
from flexsparse.pictures.page import page
from flexsparse.pictures.svg import svg

TEXT = "causal() & (sliding_window(20) | sinks(4) | sparsek(8, after=20)) + alibi()"
BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
VIEWS = ("tiles", "heads", "score", "gate", "selection")


def figure(view: str = "tiles", text: str = TEXT, **options: Any) -> Figure:
    usual: dict[str, Any] = {
        "length": 80,
        "block": None,
        "zoom": None,
        "heads": None,
        "head": None,
        "scores": (),
        "raw": None,
    }
    usual |= {"query": None, "cells": None, "out": "x.html", "seed": 0}
    return draw(text, {**usual, "view": view, **options}, with_reasons=True).figure


def embedded(text: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert found is not None
    data: dict[str, Any] = json.loads(found.group(1))
    return data


def unpacked(kind: str, text: str) -> list[Any]:
    raw = base64.b64decode(text)
    return list(struct.unpack(f"<{len(raw) // struct.calcsize(kind)}{kind}", raw))


@pytest.mark.parametrize("view", ["tiles", "heads"])
def test_a_page_holds_every_cell_with_its_reason(view: str) -> None:
    made = figure(view)
    data = embedded(page(made))
    for panel, there in zip(made.panels, data["panels"], strict=True):
        assert isinstance(panel, Grid)
        assert panel.reasons is not None
        assert unpacked("B", there["kinds"]) == [kind for row in panel.picture.kinds for kind in row]
        reasons = [there["texts"][number] for number in unpacked("H", there["reasons"])]
        assert reasons == [panel.reasons.texts[number] for row in panel.reasons.of for number in row]
        assert panel.picture.shares is not None
        assert unpacked("f", there["shares"]) == pytest.approx([x for row in panel.picture.shares for x in row])
        shades = [there["palette"][number] for number in unpacked("B", there["colours"])]
        for kind, shade in zip(unpacked("B", there["kinds"]), shades, strict=True):
            assert (shade == colours.FULL) == (kind == 2)
            assert (shade == colours.EMPTY) == (kind == 0)
        assert (there["cell"], there["block"]) == ([16, 16], 16)


def test_a_page_holds_every_value() -> None:
    made = figure("gate")
    (panel,), (there,) = made.panels, embedded(page(made))["panels"]
    assert isinstance(panel, Grid)
    assert panel.picture.values is not None
    values = [x for row in panel.picture.values for x in row]
    assert unpacked("f", there["values"]) == pytest.approx(values, nan_ok=True)
    assert any(math.isnan(x) for x in values)


@pytest.mark.parametrize("view", VIEWS)
def test_files_load_nothing(view: str) -> None:
    made = figure(view)
    text = page(made)
    assert "default-src 'none'" in text
    for written in (text, svg(made)):
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|<link|<img|@import|url\(| src=", written)


@pytest.mark.parametrize("view", VIEWS)
def test_svg_is_well_formed(view: str) -> None:
    made = figure(view)
    root = ElementTree.fromstring(svg(made))
    words = " ".join(element.text or "" for element in root.iter("{http://www.w3.org/2000/svg}text"))
    assert "sliding_window(20)" in words
    assert all(panel.title in words for panel in made.panels)


def test_svg_draws_every_cell_in_its_colour() -> None:
    made = figure()
    (panel,) = made.panels
    assert isinstance(panel, Grid)
    root = ElementTree.fromstring(svg(made))
    numbers, shades = colours.colour_numbers(panel), colours.palette(panel)
    drawn = [[colours.EMPTY] * len(numbers[0]) for _ in numbers]
    for path in root.iter("{http://www.w3.org/2000/svg}path"):
        for x, y, run in re.findall(r"M(\d+) (\d+)h(\d+)v1", path.get("d") or ""):
            for column in range(int(x), int(x) + int(run)):
                drawn[int(y)][column] = path.get("fill") or ""
    assert drawn == [[shades[number] for number in row] for row in numbers]


def test_texts_cannot_break_out_of_the_page() -> None:
    made = figure()
    bad = Figure("</script><b>&", (("shown", "</script><i>"),), made.panels, ())
    text = page(bad)
    assert "</script><i>" not in text
    assert embedded(text)["facts"] == [["shown", "</script><i>"]]
    assert f"<title>{html.escape('</script><b>&')}</title>" in text
    assert ElementTree.fromstring(svg(bad)) is not None


@pytest.mark.parametrize("view", VIEWS)
def test_png_is_a_picture(view: str, tmp_path: pathlib.Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "picture.png"
    save(figure(view), path)
    from matplotlib.image import imread

    dots = imread(path)
    assert min(dots.shape[:2]) > 300
    shown = {"#" + "".join(f"{round(255 * float(x)):02x}" for x in dot[:3]) for row in dots[::4] for dot in row[::4]}
    wanted = {"tiles": colours.FULL, "heads": colours.FULL, "gate": colours.EMPTY, "selection": colours.LINES[0]}
    assert wanted.get(view, colours.PAPER) in shown


def test_png_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SettingError) as caught:
        check_path("x.png")
    assert "got a .png without matplotlib" in str(caught.value)
    assert "pip install flexsparse[plots]; .svg and .html need nothing." in str(caught.value)


def test_keys_that_follow_each_other_in_a_slot_have_different_colours() -> None:
    from flexsparse.pictures.lifetimes import Lifetimes

    (panel,) = figure("selection").panels
    assert isinstance(panel, Lifetimes)
    shades = colours.of_keys(panel)
    for row in panel.slots:
        for one, other in itertools.pairwise(row):
            assert one == other or one < 0 or shades[one] != shades[other]
    assert {bar.key for bar in panel.bars} <= set(shades)


# Appended to a page: points at a place of the first canvas, then says in the document what the page said.
_POINT = """<script>
const box = document.querySelector("canvas").getBoundingClientRect();
for (const [x, y] of %s) {
  const at = { clientX: box.left + x * box.width, clientY: box.top + y * box.height };
  document.querySelector("canvas").dispatchEvent(new PointerEvent("pointermove", at));
  const said = document.createElement("pre");
  said.className = "said";
  said.textContent = document.getElementById("says").textContent;
  document.body.append(said);
}
</script></body>"""


def browsed(path: pathlib.Path, text: str, places: list[tuple[float, float]]) -> list[str]:
    """What a real browser says at places of the first canvas, as shares of its width and height."""
    assert BROWSER is not None
    path.write_text(text.replace("</body>", _POINT % json.dumps(places)), encoding="utf-8")
    options = (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--dump-dom",
        f"--user-data-dir={path.parent / 'profile'}",
    )
    done = subprocess.run([BROWSER, *options, path.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    return [html.unescape(said) for said in re.findall(r'<pre class="said">(.*?)</pre>', done.stdout, re.DOTALL)]


needs_browser = pytest.mark.skipif(BROWSER is None, reason="no browser: chromium or google-chrome")


@needs_browser
def test_a_browser_says_tile_class_and_reason(tmp_path: pathlib.Path) -> None:
    made = figure()
    (panel,) = made.panels
    assert isinstance(panel, Grid)
    assert panel.reasons is not None
    cells = [(r, c) for r in range(5) for c in range(5)]
    said = browsed(tmp_path / "page.html", page(made), [((c + 0.5) / 5, (r + 0.5) / 5) for r, c in cells])
    assert len(said) == 25
    for (r, c), words in zip(cells, said, strict=True):
        lines = words.splitlines()
        assert lines[0] == f"tile row {r}, column {c}"
        assert lines[1] == f"queries {16 * r} to {16 * r + 15}, keys {16 * c} to {16 * c + 15}"
        assert lines[2].split(",")[0] == ("empty", "partial", "full")[panel.picture.kinds[r][c]]
        assert lines[3:] == panel.reasons.texts[panel.reasons.of[r][c]].split("; ")


@needs_browser
@pytest.mark.parametrize(
    ("view", "wanted"),
    [
        ("score", r"distance q - kv \d+\nhead 0: -?[\d.]+"),
        ("gate", r"query \d+, key \d+\nhidden"),
        ("selection", r"key \d+, score [-\d.]+\nqueries \d+ to \d+, slot \d\nquery \d+"),
    ],
)
def test_a_browser_draws_every_view(view: str, wanted: str, tmp_path: pathlib.Path) -> None:
    (said,) = browsed(tmp_path / "page.html", page(figure(view)), [(0.8, 0.2)])
    assert re.match(wanted, said), said


@needs_browser
def test_a_browser_draws_a_thousand_cells_a_side(tmp_path: pathlib.Path) -> None:
    made = figure(text="causal() & sliding_window(64)", length=16000, block=16, cells=1000)
    (said,) = browsed(tmp_path / "page.html", page(made), [(0.25, 0.75)])
    assert "sliding_window(64) hides every pair" in said


def test_pictures_import_no_matplotlib_before_it_is_needed() -> None:
    probe = "import flexsparse.pictures.figure, sys; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
