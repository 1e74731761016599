"""The selection kernels give the bits of their PyTorch forms. They run on a GPU, or on a CPU in Triton's interpreter.

Whether Triton interprets is decided when it is imported, so ``test_in_interpreter`` runs this file in a process of
its own; in any other process without a GPU it is skipped.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from flexsparse.ops import causal
from tests.ops.regimes import REGIMES, draw, in_forms

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = [
    *([] if INTERPRETED else [pytest.mark.gpu]),
    pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="needs a GPU or the interpreter"),
]
# The interpreter takes seconds a case: every kind of difficulty once, and on a GPU everything.
CHOSEN = ("normal", "huge", "heavy ties", "both infinities")
CASES = [(name, n, 20, 7) for name in CHOSEN for n in (140,)] + [("normal", 1, 1, 0), ("all -inf", 70, 3, 2**40)]
if not INTERPRETED:
    CASES = [(name, n, k, a) for name in REGIMES for n, k, a in ((1, 1, 0), (300, 40, 17), (5000, 64, 100))]
    CASES += [("normal", 300, 2**40, 3), ("normal", 300, 5, 2**40)]
# In the interpreter two forms of four are enough for most regimes, each with segments and without.
RUNS = in_forms(CASES, (False, True), ("one a row", "many a row"), lambda case: not INTERPRETED or case[0] == "normal")


def same(name: str, got: Tensor, wanted: Tensor) -> None:
    assert got.dtype is wanted.dtype, name
    apart = (got.cpu() != wanted) & ~(torch.isnan(got.cpu()) & torch.isnan(wanted))
    assert not apart.any(), f"{name}: {int(apart.sum())} differ, first at {apart.nonzero()[0].tolist()}"


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("regime", "size", "k", "after", "segmented", "programs"), RUNS)
def test_kernels_give_the_bits_of_the_pytorch_forms(
    regime: str, size: int, k: int, after: int, segmented: bool, programs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flexsparse.codegen.kernels import grid, lifetimes
    from flexsparse.ops import kernels

    if programs == "many a row":
        # And each row in a group of its own.
        monkeypatch.setattr(kernels, "_TOGETHER", 1)
        for module in (grid, lifetimes):
            monkeypatch.setattr(module, "_ONE_PROGRAM", 0)
            monkeypatch.setattr(module, "_BLOCK", 32 if size < 1000 else 256)
        if not INTERPRETED or regime == "normal":
            # Tables chunk by chunk, which take the interpreter long.
            monkeypatch.setattr(lifetimes, "_READ_AT_ONCE", 0)
    u = torch.stack([draw(regime, size, seed) for seed in range(2)])
    segments = None
    if segmented:
        segments = torch.randint(0, 4, (2, size), generator=torch.Generator().manual_seed(1)).sort(1).values
    there = None if segments is None else segments.to(DEVICE)
    ranges = causal.ranges_of(u, after, segments)
    found, lived, table, _ = kernels.select(u.to(DEVICE), k, after, there, thresholds=True, lifetimes=True, chunk=16)
    wanted, wanted_lives = causal.thresholds(u, k, ranges), causal.lifetimes(u, k, ranges)
    assert found is not None
    assert lived is not None
    for name in wanted._fields:
        same(name, getattr(found, name), getattr(wanted, name))
    for name in wanted_lives._fields:
        same(name, getattr(lived, name), getattr(wanted_lives, name))
    assert table is not None
    same("slot table", table, causal.slot_table(wanted_lives, min(k, size), 16))
    table = kernels.slot_table(lived, min(k, size), 50)
    same("slot table of larger chunks", table, causal.slot_table(wanted_lives, min(k, size), 50))
    flow = torch.randn(2, size, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    gradient = kernels.threshold_gradient(flow.to(DEVICE), u.to(DEVICE), found.floor, found.ceil, after, there)
    expected = causal.threshold_gradient(flow, u, wanted.floor, wanted.ceil, ranges)
    # Differences of two running sums of at most `size` shares, in different orders.
    bound = size * 2.0**-52 * float(flow.abs().sum(1).max())
    assert float((gradient.cpu() - expected).abs().max()) <= bound


def test_nan_marks_its_row_from_its_position_on() -> None:
    from flexsparse.ops import kernels

    u = draw("normal", 90).repeat(2, 1)
    u[1, 40] = torch.nan
    found, lived, *_ = kernels.select(u.to(DEVICE), 5, 0, None, thresholds=True, lifetimes=True)
    ranges = causal.ranges_of(u, 0, None)
    assert found is not None
    assert lived is not None
    same("tau", found.tau, causal.thresholds(u, 5, ranges).tau)
    same("death", lived.death, causal.lifetimes(u, 5, ranges).death)
    assert torch.isnan(found.tau[1, 40:]).all()
    assert not torch.isnan(found.tau[0]).any()


def test_rows_that_no_launch_can_hold_are_refused() -> None:
    from flexsparse.errors import ShapeError
    from flexsparse.ops import kernels

    u = torch.zeros(1, 1, device=DEVICE).expand(1, (1 << 24) + 1)
    with pytest.raises(ShapeError, match="u: got 16777217 scores in a row, expected at most 16777216 on a GPU"):
        kernels.select(u, 5, 0, None, thresholds=True, lifetimes=False)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("scored", [True, False])
@pytest.mark.parametrize(("size", "k", "after"), [(140, 20, 7), (70, 3, 0), (64, 1500, 0), (1, 1, 0)])
def test_records_say_key_stay_and_score_of_every_slot(size: int, k: int, after: int, scored: bool) -> None:
    from flexsparse.codegen.kernels.slot_records import slot_records
    from flexsparse.runtime import slot_records as forms

    u = torch.stack([draw("normal", size, seed) for seed in range(2)]).float()
    u[0, size // 2] = torch.nan
    ranges = causal.ranges_of(u, after, None)
    found = causal.lifetimes(u, k, ranges)
    table = causal.slot_table(found, min(k, size), 64)
    scores = u if scored else None
    wanted = forms.slot_records(table, found.death, scores, 64)
    there = None if scores is None else scores.to(DEVICE)
    same("records", slot_records(table.to(DEVICE), found.death.to(DEVICE), there, 64), wanted)
    # Against the lifetimes themselves.
    for row, chunk, slot in (table >= 0).nonzero().tolist():
        key = int(table[row, chunk, slot])
        stays = sum(int(found.death[row, key]) > q for q in range(64 * chunk, 64 * chunk + 64))
        assert wanted[row, chunk, slot, 0] == key + (stays << 24)
        assert not scored or torch.isnan(u[row, key]) or wanted[row, chunk, slot, 1].view(torch.float32) == u[row, key]
    assert (wanted[table < 0] == 0).all()


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("chunks", "k", "block"), [(1, 1, 16), (5, 40, 32), (300, 20, 16), (513, 70, 64)])
def test_the_next_change_of_every_block_of_slots(chunks: int, k: int, block: int) -> None:
    from flexsparse.codegen.kernels.next_changes import next_changes
    from flexsparse.runtime import next_changes as forms

    generator = torch.Generator().manual_seed(chunks)
    # Few changes, so that they are far apart.
    steps = (torch.rand(2, chunks, k, generator=generator) < 0.3 / k).int().cumsum(1)
    table = torch.where(steps > 2, -1, steps).int()
    found = next_changes(table.to(DEVICE), block).cpu()
    assert torch.equal(found, forms.next_changes(table, block))
    for row, part, chunk in torch.cartesian_prod(*(torch.arange(n) for n in found.shape)).tolist()[::7]:
        slots = table[row, :, part * block : (part + 1) * block]
        later = [c for c in range(chunk + 1, chunks) if not torch.equal(slots[c], slots[c - 1])]
        assert found[row, part, chunk] == min([*later, chunks, (chunk // 256 + 1) * 256])


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_gates_read_is_bounded_and_its_gradient_is_that_of_finite_numbers(dtype: torch.dtype) -> None:
    from flexsparse.codegen.kernels.gate_inputs import Finite, GateInputs, gate_input_gradients, gate_inputs
    from flexsparse.ops import gated as forms

    values = [-torch.inf, torch.inf, torch.nan, 0.0, -3.5, 1e30]
    u, tau = (x.flatten().clone() for x in torch.meshgrid(*[torch.tensor(values)] * 2, indexing="ij"))
    u, count = u.to(dtype), torch.arange(len(tau), dtype=torch.int32)
    leaves = u.clone().requires_grad_(), tau.clone().requires_grad_()
    wanted = forms.gate_inputs(*leaves, count, 20)
    finite = Finite(forms._SCORE_FAR, forms._TAU_LOW, forms._TAU_HIGH)
    found = GateInputs(*(torch.empty_like(tau, device=DEVICE) for _ in range(3)))
    gate_inputs(u.to(DEVICE), tau.to(DEVICE), count.to(DEVICE), 20, finite, found)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.cpu(), other.detach(), rtol=0, atol=0, equal_nan=True)
    flows = torch.randn_like(wanted[0]), torch.randn_like(wanted[1])
    gradients = torch.autograd.grad(wanted[:2], leaves, flows)
    there = gate_input_gradients(u.to(DEVICE), tau.to(DEVICE), flows[0].to(DEVICE), flows[1].to(DEVICE))
    # That of bfloat16 scores is rounded once it is added to another.
    for one, other in zip(there, gradients, strict=True):
        assert torch.equal(one.cpu().to(other.dtype), other)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(
    ("size", "k", "after", "segmented"),
    [(140, 20, 7, True), (70, 100, 0, False), (1, 1, 0, False)]
    + ([] if INTERPRETED else [(140, 20, 7, False), (70, 100, 0, True), (1, 1, 0, True)]),
)
def test_gates_and_their_gradient_are_those_of_the_steps_one_by_one(
    size: int, k: int, after: int, segmented: bool
) -> None:
    from flexsparse.codegen.kernels.gate_inputs import Finite
    from flexsparse.ops import gated, kernels

    u = torch.stack([draw("normal", size, seed) for seed in range(2)]).float()
    u[0, size // 3 :: 9] = torch.inf
    u[1, ::5] = -torch.inf
    segments = (torch.arange(size) // 37).expand(2, size) if segmented else None
    leaf = u.clone().requires_grad_()
    wanted = gated.gated_select(leaf, k, after, segments, 16)
    there = None if segments is None else segments.to(DEVICE)
    finite = Finite(gated._SCORE_FAR, gated._TAU_LOW, gated._TAU_HIGH)
    found, lived, table, gates = kernels.select(
        u.to(DEVICE), k, after, there, thresholds=True, lifetimes=True, chunk=16, finite=finite
    )
    assert found is not None
    assert lived is not None
    assert gates is not None
    for name, one, other in zip(("u", "tau", "least"), gates, wanted[:3], strict=True):
        same(name, one, other.detach())
    assert table is not None
    assert wanted.table is not None
    same("table", table, wanted.table)
    for name, one, other in zip(("birth", "death", "slot"), lived, wanted.selection, strict=True):
        same(name, one, other)
    flows = torch.randn_like(u), torch.randn_like(u)
    (gradient,) = torch.autograd.grad(wanted[:2], leaf, flows)
    moved = flows[0].to(DEVICE), flows[1].to(DEVICE)
    same("gradient", kernels.gated_gradient(moved, u.to(DEVICE), found, after, there), gradient)


@pytest.mark.skipif(not INTERPRETED, reason="accesses are watched in the interpreter")
def test_an_access_beside_a_tensor_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton
    import triton.language as tl

    from tests.memory_bounds import check_accesses

    @triton.jit  # type: ignore[untyped-decorator]
    def shifted(p_from: Any, p_to: Any, by: Any, size: Any, BLOCK: tl.constexpr) -> None:  # noqa: N803
        at = tl.arange(0, BLOCK)
        tl.store(p_to + at, tl.load(p_from + at + by, mask=at < size), mask=at < size)

    check_accesses(monkeypatch)
    source, target = torch.arange(10), torch.zeros(10, dtype=torch.long)
    shifted[(1,)](source, target, 0, 10, BLOCK=16)
    assert torch.equal(source, target)
    with pytest.raises(Exception, match="10 accesses outside the kernel's tensors in shifted"):
        shifted[(1,)](source, target, 1 << 40, 10, BLOCK=16)
