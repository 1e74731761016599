"""Compiled FlexAttention over copies of selected keys, on a GPU against the oracle: out, lse and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import flexsparse as fs
from flexsparse.tolerance import evaluate, judge
from tests.gathered.calls import call_of
from tests.gpu.test_flex_gpu import COMPOSITIONS
from tests.runtime.compositions import P

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    # A kernel that does not fit is built smaller, which is announced; torch says the others of itself.
    pytest.mark.filterwarnings("ignore:FlexAttention's kernel does not fit:flexsparse.errors.BackendNotice"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]

SELECTING = {name: case for name, case in COMPOSITIONS.items() if fs.compile(case[0]).ir.selections}
HYBRID: Any = P["sliding_window"](200) | P["sparsek"](256, after=200)


def failures(pattern: Any, call: Any) -> list[str]:
    got = evaluate(fs.compile(pattern, backend="gather_flex"), call)
    # In float32 the gradient of scores through a gate on V is a sum over two calls (README, Limits).
    exempt = ("d scores", "d u") if call.query.dtype is torch.float32 else ()
    judged = [c for c in judge(pattern, got, call) if c.name not in exempt]
    return [f"{c.name}: {c.error:.3g} > {c.allowed:.3g}" for c in judged if not c.holds]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SELECTING)
def test_every_selection_is_within_the_policy(name: str, dtype: torch.dtype) -> None:
    pattern, size = SELECTING[name]
    assert not failures(pattern, call_of(pattern, size, dtype, head_dim=64))


@pytest.mark.parametrize("slope", [0.0, 1.0])
def test_any_turnover_of_slots_at_length(slope: float) -> None:
    call = call_of(HYBRID, 3000, torch.bfloat16, head_dim=64, batch=1)
    call.captured["scores"].add_(slope * torch.arange(3000, device="cuda"))
    assert not failures(HYBRID, call)


def test_a_function_that_cannot_be_traced_is_within_the_policy() -> None:
    def near(b: Any, h: Any, q: Any, kv: Any) -> Any:
        return torch.sin(1.0 * kv) > -0.5

    pattern: Any = HYBRID & fs.from_flex(near)
    assert fs.compile(pattern).ir.opaque
    assert not failures(pattern, call_of(pattern, 1000, torch.bfloat16, head_dim=64, batch=1))


def test_gradients_of_copies_have_the_same_bits_in_two_runs() -> None:
    pattern: Any = P["sliding_window"](200) | P["sparsek"](256, after=200, gate="none")
    call = call_of(pattern, 4000, torch.bfloat16, head_dim=64, batch=1)
    attention = fs.compile(pattern, backend="gather_flex")
    first, second = evaluate(attention, call), evaluate(attention, call)
    for name in ("out", "d key", "d value"):
        assert torch.equal(first[name], second[name]), name


def test_lengths_take_two_builds_one_for_multiples_of_128() -> None:
    pattern: Any = P["sparsek"](40, gate="k")
    attention = fs.compile(pattern, backend="gather_flex")
    for length, builds in ((300, 1), (1000, 1), (1280, 2), (640, 2), (900, 2)):
        call = call_of(pattern, length, torch.bfloat16, head_dim=64, batch=1)
        evaluate(attention, call)
        assert attention.builds == builds


def test_memory_grows_with_the_length() -> None:
    peaks = []
    for size in (8192, 16384):
        call = call_of(HYBRID, size, torch.bfloat16, head_dim=64, batch=1, heads=2, kv_heads=2)
        attention = fs.compile(HYBRID, backend="gather_flex")
        evaluate(attention, call)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        evaluate(attention, call)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] <= 2.2 * peaks[0]
