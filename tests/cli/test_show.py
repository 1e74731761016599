"""Every view of ``show``: what it prints, against what each pair, gate and key is by itself."""

from __future__ import annotations

import json
import pathlib

import numpy
import pytest
import torch

from flexsparse.ops.selection import causal_sparsek, causal_topk
from tests.cli.conftest import Invoke


@pytest.fixture(autouse=True)
def eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


VIEWS = {
    "heads": ("sliding_window(per_head([4, 4, 64, 64]))", "--length", "128"),
    "score": ("causal() + alibi()", "--length", "64"),
    "gate": ("sparsek(8)", "--length", "64"),
    "selection": ("sparsek_window(8, 8)", "--length", "64"),
}


@pytest.mark.parametrize("view", VIEWS)
def test_views_fit_eighty_columns_without_colour(view: str, invoke: Invoke) -> None:
    answer = invoke("show", *VIEWS[view], "--view", view)
    assert answer.code == 0, answer.err
    assert "\x1b" not in answer.out
    assert max(map(len, answer.out.splitlines())) <= 80


@pytest.mark.parametrize("view", VIEWS)
def test_views_are_plain_in_ascii(view: str, invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexsparse.cli.render.is_plain", lambda console: True)
    assert invoke("show", *VIEWS[view], "--view", view).out.isascii()


@pytest.mark.parametrize("view", VIEWS)
def test_views_as_json(view: str, invoke: Invoke) -> None:
    data = json.loads(invoke("show", *VIEWS[view], "--view", view, "--json").out)
    assert data["view"] == view
    assert {panel["panel"] for panel in data["panels"]} == {
        {"heads": "grid", "gate": "grid", "score": "curves", "selection": "lifetimes"}[view]
    }


def test_heads_that_agree_share_a_picture(invoke: Invoke) -> None:
    text = invoke("show", *VIEWS["heads"], "--view", "heads").out
    assert "heads 0-1" in text
    assert "heads 2-3" in text
    alike = invoke("show", "causal()", "--view", "heads").out
    assert "The mask does not depend on the head." in alike


def test_numbers_of_a_corner(invoke: Invoke) -> None:
    lines = invoke("show", "causal() + alibi()", "--view", "score", "--zoom", "4:6,3:6", "--raw", "1").out.splitlines()
    start = next(n for n, line in enumerate(lines) if line.endswith("keys"))
    # The first of four heads has a slope of 1/4.
    assert [line.split() for line in lines[start + 1 : start + 3]] == [
        ["4", "0.75", "1", "·"],
        ["5", "0.5", "0.75", "1"],
    ]


def test_a_curve_has_no_gap_where_every_key_is_seen(invoke: Invoke) -> None:
    """1,024 keys at 64 points: not every distance between two is the same."""
    lines = invoke("show", "causal() + alibi()", "--view", "score", "--length", "1024").out.splitlines()
    rows = [line[8:].rstrip() for line in lines if "#" in line or "\u2588" in line]
    assert len(rows) == 4 * 4
    assert not [row for row in rows if " " in row]


def test_a_curve_leaves_a_gap_where_no_key_is_seen(invoke: Invoke) -> None:
    text = "causal() & (sliding_window(8) | sinks(8)) + alibi()"
    lines = invoke("show", text, "--length", "64", "--view", "score", "--heads", "1").out.splitlines()
    lowest = next(line for number, line in enumerate(lines) if "against distance" in lines[number + 1])
    bars = lowest.split("  ", 1)[1]
    # 8 of 64 distances at either end.
    assert [len(run) for run in bars.split()] == [8, 8]
    assert len(bars) == 64


@pytest.mark.parametrize("length", [1_000_000, 131_073])
def test_a_million_tokens(length: int, invoke: Invoke) -> None:
    data = json.loads(invoke("show", "causal() & document()", "--length", str(length), "--json").out)
    assert data["length"] == length
    assert length / data["block"] <= 1024
    high, wide = data["cell"]
    ends = torch.tensor(sorted({0, length} | set(_boundaries(length))))
    for r, row in enumerate(data["rows"]):
        for c, kind in enumerate(row):
            top, left = r * high, c * wide
            bottom, right = min(top + high, length), min(left + wide, length)
            # Corner pairs decide for a causal document mask: the newest key of the oldest query, and its opposite.
            first, last, oldest, newest = (_document(ends, at) for at in (top, bottom - 1, left, right - 1))
            every = first == last == oldest and right - 1 <= top
            # A tile that hangs over the end is never full.
            assert (kind == "F") == (every and bottom - top == high and right - left == wide)
            assert (kind == "E") == (left > bottom - 1 or newest < first)


def _document(ends: torch.Tensor, at: int) -> int:
    return int(torch.searchsorted(ends, at, right=True))


def _boundaries(length: int) -> list[int]:
    import flexsparse
    from flexsparse.example_inputs import example_captured
    from flexsparse.pictures.mask import square_shapes

    attention = flexsparse.compile("causal() & document()", backend="chunked")
    doc = example_captured(attention.ir, square_shapes(length, 4), 0)["doc"].flatten()
    return (doc.diff() != 0).nonzero().flatten().add(1).tolist()


@pytest.mark.parametrize("suffix", [".pt", ".npy"])
def test_lifetimes_of_given_scores(suffix: str, invoke: Invoke, tmp_path: pathlib.Path) -> None:
    scores = torch.randn(2, 40, generator=torch.Generator().manual_seed(5))
    path = tmp_path / f"scores{suffix}"
    torch.save(scores, path) if suffix == ".pt" else numpy.save(path, scores.numpy())
    given = ("show", "sparsek(4, after=3)", "--view", "selection", "--scores", str(path), "--head", "1")
    answer = invoke(*given, "--json")
    assert answer.code == 0, answer.err
    data = json.loads(answer.out)
    assert (data["length"], data["heads"], data["example_data"]) == (40, 2, [])
    (panel,) = data["panels"]
    birth, death, slot = causal_topk(scores[1], 4, 3)
    for bar in panel["bars"]:
        at = bar["key"]
        assert (bar["birth"], bar["death"], bar["slot"]) == (int(birth[at]), int(death[at]), int(slot[at]))
        assert bar["score"] == pytest.approx(float(scores[1, at]))
    assert [bar["key"] for bar in panel["bars"]] == (death > birth).nonzero().flatten().tolist()
    for s, row in enumerate(panel["slots"]):
        for c, key in enumerate(row):
            query = c * panel["chunk"]
            there = ((birth <= query) & (query < death) & (slot == s)).nonzero().flatten().tolist()
            assert [key] == (there or [-1])
    tau = causal_sparsek(scores[1], 4, 3).tau
    for x, y in zip(panel["tau"]["x"], panel["tau"]["lines"][0]["y"], strict=True):
        assert y == "nan" if torch.isinf(tau[int(x)]) else y == pytest.approx(float(tau[int(x)]))


def test_bars_stand_where_keys_live(invoke: Invoke, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "scores.pt"
    torch.save(torch.tensor([3.0, 1.0, 2.0, 4.0]), path)
    lines = invoke("show", "sparsek(2)", "--view", "selection", "--scores", str(path), "--heads", "1").out.splitlines()
    rows = [line.split()[:2] for line in lines if set(line) & set("█") and line.split()[0] in "0123"][:4]
    bars = {int(key): bar for key, bar in rows}
    quarter = len(bars[0]) // 4
    alive = {key: [bar[round((n + 0.5) * quarter)] == "█" for n in range(4)] for key, bar in bars.items()}
    assert alive == {
        0: [True, True, True, True],
        1: [False, True, False, False],
        2: [False, False, True, False],
        3: [False, False, False, True],
    }


def test_a_threshold_that_keeps_everything_is_said(invoke: Invoke) -> None:
    assert "tau is nowhere finite" in invoke("show", "sparsek(8)", "--view", "selection", "--length", "8").out


@pytest.mark.parametrize("suffix", [".svg", ".html"])
def test_pictures_go_to_files(suffix: str, invoke: Invoke, tmp_path: pathlib.Path) -> None:
    path = tmp_path / f"mask{suffix}"
    answer = invoke("show", "causal() & sinks(4)", "--out", str(path), "--cells", "16")
    assert (answer.code, answer.out, answer.err) == (0, "", f"note: the picture is in {path}\n")
    assert "causal() &amp; sinks(4)" in path.read_text()
    assert path.stat().st_mode & 0o444
    assert [kept.name for kept in tmp_path.iterdir()] == [path.name]
    wrong = invoke("show", "causal() & sinks(4)", "--length", "9", "--head", "9", "--out", str(path))
    assert wrong.code == 2
    assert "causal() &amp; sinks(4)" in path.read_text()


SCORE_MISTAKES = {
    "none": (torch.zeros(3), "causal", "a pattern that selects keys by scores"),
    "length": (torch.zeros(3), "sparsek(2)", "got lengths of 3 and 64, expected one length"),
    "integers": (torch.zeros(64, dtype=torch.long), "sparsek(2)", "expected floating-point scores"),
    "rank": (torch.zeros(2, 1, 64), "sparsek(2)", "expected [S], [H, S] or [1, H, S]. Take one row of the batch."),
    "dict": ({"scores": torch.zeros(64)}, "sparsek(2)", "with a dict"),
    "nan": (torch.full((64,), torch.nan), "sparsek(2)", "NaN"),
}


@pytest.mark.parametrize("mistake", SCORE_MISTAKES)
def test_wrong_scores(mistake: str, invoke: Invoke, tmp_path: pathlib.Path) -> None:
    content, expression, message = SCORE_MISTAKES[mistake]
    path = tmp_path / "scores.pt"
    torch.save(content, path)
    answer = invoke("show", expression, "--scores", str(path), "--length", "64")
    assert answer.code == 2
    assert message in answer.err
    assert answer.out == ""


def test_files_that_hold_no_scores(invoke: Invoke, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "scores.npy"
    path.write_text("no array")
    assert "which cannot be read, expected a .pt file" in invoke("show", "sparsek(2)", "--scores", str(path)).err
    assert "No such file" in invoke("show", "sparsek(2)", "--scores", "nowhere.pt").err
