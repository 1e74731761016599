"""What backend="auto" takes on a GPU, and the times that it is chosen by."""

from __future__ import annotations

import json
import pathlib
from dataclasses import replace
from typing import Any

import pytest
import torch

import flexsparse as fs
from flexsparse import prediction
from flexsparse.analysis.tiles import FULL, PARTIAL, classify
from flexsparse.hardware import DEVICES
from flexsparse.ir.text import text
from flexsparse.plan import Plan
from flexsparse.runtime.inputs import Shapes

RESULTS = pathlib.Path(__file__).resolve().parent.parent / "benchmarks" / "results"
ON_GPU: dict[str, Any] = {"head_dim": 128, "heads": 16, "device": "cuda", "dtype": torch.bfloat16}


def plan_of(pattern: str, length: int, **shape: Any) -> Plan:
    return fs.compile(pattern).bind(**{**ON_GPU, "q_len": length, **shape}).plan


@pytest.mark.parametrize("needs_grad", [False, True])
@pytest.mark.parametrize(
    ("pattern", "short", "long"),
    [
        ("strided(64)", "flex", "residue_flex"),
        ("dilated_window(512, 4)", "flex", "residue_flex"),
        ("sliding_window(512)", "flex", "flex"),
        ("sliding_window(512) | sparsek(512, after=512)", "gather", "gather"),
        # No multiple of 7.
        ("strided(7)", "flex", "flex"),
    ],
)
def test_the_length_decides(pattern: str, short: str, long: str, needs_grad: bool) -> None:
    assert plan_of(pattern, 1024, needs_grad=needs_grad).backend == short
    assert plan_of(pattern, 32768, needs_grad=needs_grad).backend == long


def test_the_least_time_is_taken_and_every_candidate_says_its_own() -> None:
    plan = plan_of("sliding_window(512) | sparsek(512, after=512)", 16384)
    seconds = {c.backend: c.seconds for c in plan.candidates if c.seconds is not None}
    assert set(seconds) == {"gather", "gather_flex", "flex"}
    assert plan.backend == min(seconds, key=lambda name: seconds[name])
    explained = fs.compile("strided(64)").bind(**ON_GPU, q_len=16384).explain()
    said = str(explained)
    assert said.count("ms a call predicted.") == 2
    predicted = {c["backend"]: c["predicted_seconds"] for c in explained.as_dict()["candidates"]}
    assert predicted["residue_flex"] < predicted["flex"]
    assert predicted["chunked"] is None


def test_nothing_is_predicted_for_a_cpu_or_against_a_wish() -> None:
    plan = fs.compile("causal").bind(q_len=256, head_dim=16).plan
    assert all(c.seconds is None for c in plan.candidates)
    assert fs.compile("strided(64)", backend="flex").bind(**ON_GPU, q_len=65536).plan.backend == "flex"


def shapes_of(length: int, **more: Any) -> Shapes:
    made = Shapes(1, 4, 4, length, length, 128, 128, torch.bfloat16, torch.device("cuda"))
    return replace(made, **more)


@pytest.mark.parametrize(
    "pattern", ["causal", "sliding_window(300)", "dilated_window(100, 8)", "full", "prefix_lm(900)"]
)
def test_tiles_of_long_masks_grow_as_they_do(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = fs.compile(pattern).ir
    monkeypatch.setattr(prediction, "_COUNTED", 4096)
    shapes = shapes_of(16384)
    tiles = classify(program.mask, shapes.sizes)
    for got, kind in zip(prediction._counted(program.mask, program, shapes, 128), (PARTIAL, FULL), strict=True):
        assert got == pytest.approx(tiles.count(kind), rel=0.1, abs=128)


@pytest.mark.parametrize(
    ("pattern", "bound"),
    [
        ("causal() & document()", "kv <= q"),
        ("causal() & ~document()", "kv <= q"),
        ("causal() & (sliding_window(8) | sparsek(4))", "kv <= q"),
        ("causal() & sliding_window(8)", "(kv <= q) & (q - kv < 8)"),
    ],
)
def test_what_is_given_at_the_call_only_hides_keys(pattern: str, bound: str) -> None:
    from flexsparse.ir.simplify import simplify

    assert text(simplify(prediction._without_tensors(fs.compile(pattern).ir.mask))) == bound


def test_a_faster_device_takes_less() -> None:
    program, shapes = fs.compile("causal").ir, shapes_of(8192)
    times = [prediction._flex(program, shapes, 128, DEVICES[name]) for name in ("B200", "H200", "A100")]
    assert times == sorted(times)
    assert times[0] > 0


def test_choices_are_right_for_nine_in_ten_of_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the rows to which the model was fitted: within a tenth of the fastest candidate."""
    rows = json.loads((RESULTS / "choices_h200.json").read_text())["rows"]
    monkeypatch.setattr(prediction, "_device", lambda shapes: DEVICES["H200"])
    prediction.predict_calls.cache_clear()
    right, names = [], ("pattern", "heads", "kv_heads", "head_dim", "length")
    for kind in ("forward_ms", "forward_backward_ms"):
        measured: dict[tuple[Any, ...], dict[str, float]] = {}
        for row in rows:
            if kind in row:
                measured.setdefault(tuple(row[name] for name in names), {})[row["backend"]] = row[kind]
        for (pattern, heads, kv_heads, head_dim, length), times in measured.items():
            text_of, apart, _ = pattern.partition(" & untraced")
            whole: Any = fs.parse(text_of) & fs.from_flex(mask_mod=untraced) if apart else fs.parse(text_of)
            shape = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "device": "cuda"}
            plan = fs.compile(whole).bind(q_len=length, needs_grad=kind != "forward_ms", **shape).plan
            right.append(times[plan.backend] <= 1.1 * min(times.values()))
    prediction.predict_calls.cache_clear()
    assert len(right) == 40
    assert sum(right) >= 36


def untraced(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return torch.sin(kv_idx * 0.1) > -0.95
