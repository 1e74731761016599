"""``flexsparse explain --hardware``: the roofline on the terminal, as PNG, as a page."""

from __future__ import annotations

import json
import pathlib
import sys
import xml.etree.ElementTree

import pytest
from rich.console import Console

from flexsparse.cli import roofline
from flexsparse.roofline import Roofline
from tests.cli.conftest import Invoke

CAUSAL = ("explain", "causal()", "--device", "cuda", "--hardware", "H200")


def drawn(found: Roofline, width: int = 80) -> list[str]:
    return roofline.terminal(found, Console(width=width, file=sys.stdout)).plain.splitlines()


def made_up(intensity: float, predicted: float | None = None) -> Roofline:
    """A roof of 100 TFLOP/s that turns at 100 operations a byte."""
    return Roofline("made up", int(intensity * 1e9), 10**9, 1e14, 1e12, predicted, "made up")


def test_the_roof_rises_to_the_ridge_and_the_point_stands_on_it() -> None:
    for intensity in (5, 100, 2000):
        lines = drawn(made_up(intensity))
        plot = [line.split("│")[1].ljust(60) for line in lines if "│" in line]
        (row,) = (n for n, line in enumerate(plot) if "○" in line)
        place = plot[row].index("○")
        # Left of the ridge the point is on the slope, right of it on the flat.
        flat = next(n for n, line in enumerate(plot) if "─" in line)
        assert (row == flat) == (intensity >= 100), intensity
        heights = [next(n for n, line in enumerate(plot) if line[c] in "╱─○") for c in range(max(place, 20))]
        assert heights == sorted(heights, reverse=True)
        assert not any("●" in line for line in lines)
    assert "at 5 operations a byte memory binds: 5 TFLOP/s at most" in drawn(made_up(5))[-1]


def test_the_prediction_stands_below() -> None:
    lines = drawn(made_up(1000, predicted=0.04))
    floor, predicted = (next(n for n, line in enumerate(lines) if mark in line) for mark in "○●")
    assert predicted > floor
    assert lines[floor].index("○") == lines[predicted].index("●")
    assert lines[-1].strip() == "● predicted: 25 TFLOP/s, 25% of what the roof allows"


def test_narrow_terminals_are_kept_to() -> None:
    assert max(map(len, drawn(made_up(30), width=40)[:-1])) <= 40


def test_explain_draws_it_where_a_device_is_named(invoke: Invoke) -> None:
    text = invoke(*CAUSAL).out
    assert "Roofline of H200" in text
    assert "TFLOP/s over operations a byte" in text
    assert "compute-bound on H200" in " ".join(text.split())
    assert "Roofline" not in invoke("explain", "causal()", "--device", "cuda").out
    data = json.loads(invoke(*CAUSAL, "--json").out)
    assert data["roofline"]["predicted"] == data["cost"]["seconds"]
    assert data["roofline"]["bytes"] == data["cost"]["bytes"]


def test_tiles_of_example_tensors_are_said_to_be_that(invoke: Invoke) -> None:
    shapes = ("--length", "512", "--device", "cuda", "--hardware", "H200")
    text = " ".join(invoke("explain", "causal() & document()", *shapes).out.split())
    assert "predicted. Tiles are those of example tensors, seed 0." in text
    far = invoke("explain", "causal() & document()", *shapes[2:], "--length", "65536")
    assert "note: no roofline" in far.err
    assert far.code == 0


def test_a_page_that_needs_no_network(invoke: Invoke, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "page.html"
    answer = invoke("explain", "(kv <= q) & (q - kv < 100)", *CAUSAL[2:], "--html", str(path))
    assert f"note: the roofline is in {path}" in answer.err
    page = path.read_text()
    svg = xml.etree.ElementTree.fromstring(page[page.index("<svg") : page.index("</svg>") + 6])
    places = {e.get("class"): (float(e.get("cx", 0)), float(e.get("cy", 0))) for e in svg.iter("circle")}
    # The floor above the prediction, at one intensity.
    assert places["floor"][0] == places["predicted"][0]
    assert places["floor"][1] < places["predicted"][1]
    assert "(kv &lt;= q) &amp; (q - kv &lt; 100)" in page
    assert "http" not in page
    assert "<script" not in page


def test_a_picture(invoke: Invoke, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "roof.png"
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    missing = invoke(*CAUSAL, "--png", str(path))
    assert missing.code == 2
    assert (
        "--png: got no matplotlib, expected the optional extra 'plots'. pip install 'flexsparse[plots]'" in missing.err
    )
    assert not path.exists()
    monkeypatch.undo()
    pytest.importorskip("matplotlib")
    assert invoke(*CAUSAL, "--png", str(path)).code == 0
    assert path.read_bytes().startswith(b"\x89PNG")


def test_mistakes(invoke: Invoke, tmp_path: pathlib.Path) -> None:
    for option in ("--png", "--html"):
        answer = invoke("explain", "causal()", option, str(tmp_path / f"x.{option[2:]}"))
        assert answer.code == 2
        assert (
            f"{option}: got no --hardware, expected a device whose roof to draw. Such as --hardware H100." in answer.err
        )
        answer = invoke(*CAUSAL, option, str(tmp_path / "no" / "x"))
        assert "expected a file in a directory that exists" in answer.err
        answer = invoke(
            *CAUSAL, "--dtype", "float64", "--backend", "chunked", option, str(tmp_path / f"x.{option[2:]}")
        )
        assert f"{option}: got a plan whose operations are not known" in answer.err
    assert not list(tmp_path.iterdir())
