"""The demo, small: what it finds, verifies, measures and saves."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from flexsparse.cli.demo_input import DemoInput, read_text
from flexsparse.cli.measure import Measured, measure
from flexsparse.dense import reference
from tests.cli.conftest import Invoke

SMALL = ("demo", "--length", "600", "--k", "24", "--window", "24")


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time and memory without the two processes that measure them."""
    from flexsparse.cli import measure

    monkeypatch.setattr(
        measure, "measure", lambda source, side: Measured(0.5, 0.5, None if side == "dense" else 3 << 20)
    )


@pytest.mark.usefixtures("unmeasured")
def test_it_verifies_what_it_ran(invoke: Invoke) -> None:
    answer = invoke(*SMALL, "--json")
    assert answer.code == 0
    data = json.loads(answer.out)
    assert data["pattern"] == "(causal() & (sliding_window(24) | sinks(4) | sparsek(24, after=24))) + alibi()"
    assert data["verified_positions"] == 304
    assert [r["name"] for r in data["results"]] == ["out", "lse", "d query", "d key", "d value", "d scores"]
    assert data["holds"] is True
    assert all(0 < r["error"] <= r["allowed"] for r in data["results"])
    assert data["seconds"]["dense"] == {"forward": 0.5, "backward": 0.5}
    assert data["peak_bytes"] == {"flexsparse": 3 << 20, "dense": None}
    assert data["plan"]["backend"] == "chunked"


@pytest.mark.usefixtures("unmeasured")
def test_a_failed_verification_is_1(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    from flexsparse import tolerance

    monkeypatch.setattr(tolerance, "reference", lambda *x, **n: reference(*x, **{**n, "scale": 0.2}))
    answer = invoke(*SMALL)
    assert answer.code == 1
    assert "FAILS" in answer.out


@pytest.mark.usefixtures("unmeasured")
def test_it_reads_a_file_and_saves_a_picture(invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    (tmp_path / "text").write_text("a short text, read to its end; " * 5)
    svg = tmp_path / "demo.svg"
    answer = invoke("demo", "--file", str(tmp_path / "text"), "--k", "8", "--window", "8", "--svg", str(svg))
    assert answer.code == 0
    assert "the first 155 of 155 bytes" in " ".join(answer.out.split())
    assert "def mask_mod(b, h, q, kv):" in answer.out
    assert "not measured" in answer.out
    assert max(map(len, answer.out.splitlines())) <= 80
    drawn = svg.read_text(encoding="utf-8")
    assert drawn.startswith("<svg")
    assert "http" not in drawn.replace("http://www.w3.org", "").replace("https://www.textualize.io", "")


def test_a_side_is_measured_in_a_process_of_its_own() -> None:
    source = DemoInput(None, 2048, 16, 16, 8, 2, 64, "float32", "cpu", 0)
    found = measure(source, "dense")
    assert found.forward > 0
    assert found.backward > 0
    if sys.platform.startswith("linux"):
        assert found.peak is not None
        # Query, output and their gradients take 4 MiB each.
        assert 4 << 20 < found.peak < 1 << 30


def test_the_text_is_the_standard_library_s() -> None:
    text = read_text(None)
    assert len(text) > 100_000
    assert b"assert" in text
