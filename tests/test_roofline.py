"""Plans under a device's roof: what is counted, what binds, and the pictures of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import flexsparse as fs
from flexsparse.explorer.targets import TARGETS
from flexsparse.hardware import Hardware, find
from flexsparse.roofline import Roofline

# 100 operations a byte at the ridge.
ROUND = Hardware("round", 100, 1000, 10, 1.0, 1.0, 0.0, "made up")


def under(text: str, device: Any = ROUND, backend: str = "auto", **shapes: Any) -> Roofline:
    options = {"q_len": 1024, "head_dim": 64, "heads": 4, "device": "cuda", **shapes}
    found = fs.compile(text, backend=backend).explain(hardware=device, **options).roofline
    assert found is not None
    return found


def test_operations_and_bytes_are_the_plans() -> None:
    found = under("full()")
    # Two products, two operations a multiply-add; four operands in bfloat16, and lse.
    assert found.flops == 2 * 2 * 4 * 1024 * 1024 * 64
    assert found.bytes == 4 * 4 * 1024 * 64 * 2 + 4 * 1024 * 4
    assert found.intensity == pytest.approx(found.flops / found.bytes)
    assert found.ridge == pytest.approx(100)


def test_the_bound_is_the_side_of_the_ridge() -> None:
    compute, memory = under("full()"), under("sliding_window(8)", q_len=256, head_dim=64)
    assert (compute.bound, memory.bound) == ("compute", "memory")
    assert compute.floor == pytest.approx(compute.flops / 1e14)
    assert memory.floor == pytest.approx(memory.bytes / 1e12)
    # float32 products run at half the rate, over twice the bytes.
    assert under("full()", dtype=torch.float32).peak == compute.peak / 2


def test_no_prediction_undercuts_the_floor() -> None:
    for device in ("A100", "H200", "MI300X"):
        for text in ("causal()", "sliding_window(100)", "full()"):
            found = under(text, device, q_len=4096, heads=16)
            assert found.predicted is not None
            assert found.predicted > found.floor
            assert found.reached is not None
            assert found.reached < found.roof


def test_kernels_that_gather_have_a_floor() -> None:
    short, long = (under("sparsek_window(512, 512)", "H200", q_len=n) for n in (8192, 65536))
    # Work grows with length, not with its square.
    assert 7 < long.flops / short.flops < 9
    assert long.floor > short.floor
    assert "at least (the floor of" in str(long)


def test_what_has_no_place_under_the_roof() -> None:
    flex = fs.compile("causal()").explain(q_len=256, head_dim=64, device="cuda")
    assert flex.roofline is None
    unknown = fs.compile("sparsek(4)", backend="flex").explain("H200", q_len=256, head_dim=64, device="cuda")
    assert unknown.roofline is None
    double = fs.compile("causal()").explain("H200", q_len=256, head_dim=64, dtype=torch.float64)
    assert double.roofline is None
    assert double.as_dict()["roofline"] is None


def test_every_target_has_a_device_with_rates() -> None:
    for target in TARGETS.values():
        assert find(target.device).name == target.device
        assert find(target.device).source


def test_the_text_says_what_binds() -> None:
    text = str(replace(under("full()"), predicted=2e-3))
    assert "compute-bound on round, which turns at 100" in text
    assert text.endswith("2 ms predicted")
