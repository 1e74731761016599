"""Keys that are left out of long rows change no bit of a selection; and of many scores most are left out.

As ``test_selection_kernels`` these run on a GPU, or in Triton's interpreter in a process of their own.
"""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from flexsparse.ops import causal
from tests.codegen.kernels.test_selection_kernels import same
from tests.ops.regimes import REGIMES, draw

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = [
    *([] if INTERPRETED else [pytest.mark.gpu]),
    pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="needs a GPU or the interpreter"),
]
CHOSEN = ("normal", "heavy ties", "both infinities", "position slope")
CASES = [(name, 150, 5, 4) for name in CHOSEN] + [("all -inf", 70, 3, 0), ("many +inf", 90, 40, 2**40)]
# Less than a quarter remains, so lattices are halved twice.
CASES += [("normal", 250, 1, 4)]
if not INTERPRETED:
    CASES = [(name, n, k, a) for name in REGIMES for n, k, a in ((1, 1, 0), (700, 9, 17), (9000, 64, 100))]
    CASES += [("normal", 70_000, 512, 0), ("nearly equal", 70_000, 30, 3), ("position slope", 300_000, 512, 0)]


@pytest.fixture
def in_small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    from flexsparse.codegen.kernels import lifetimes, pruning, short_rows, sorting, staircase

    monkeypatch.setattr(short_rows, "takes", lambda _: False)
    monkeypatch.setattr(pruning, "_BLOCK", 16)
    monkeypatch.setattr(pruning, "_MOST_BLOCKS", 8)
    monkeypatch.setattr(sorting, "BLOCK", 16)
    for name, value in (("_TILE", 8), ("_PROBES", 4), ("_PROGRAMS", 4)):
        monkeypatch.setattr(sorting, name, value)
    if INTERPRETED:
        # As long rows have them: refinements, links across blocks, tables chunk by chunk.
        monkeypatch.setattr(staircase, "lattices_for", lambda *_: staircase.Lattices(64, 32, (2, 4), 16, 16))
        monkeypatch.setattr(staircase, "_LEAST", 1)
        for name, value in (("_ONE_PROGRAM", 0), ("_BLOCK", 32), ("_READ_AT_ONCE", 0)):
            monkeypatch.setattr(lifetimes, name, value)


def rows_of(regime: str, size: int) -> Tensor:
    u = torch.stack([draw(regime, size, seed) for seed in range(2)]).float()
    u[1, size // 2 :: 7] = torch.nan
    return u


@pytest.mark.usefixtures("poisoned_memory", "in_small_blocks")
@pytest.mark.parametrize(("regime", "size", "k", "after"), CASES)
def test_what_is_left_out_changes_no_bit(regime: str, size: int, k: int, after: int) -> None:
    from flexsparse.ops import kernels

    u = rows_of(regime, size)
    ranges = causal.ranges_of(u, after, None)
    found, lived, table, _ = kernels.select(u.to(DEVICE), k, after, None, thresholds=True, lifetimes=True, chunk=16)
    wanted, lives = causal.thresholds(u, k, ranges), causal.lifetimes(u, k, ranges)
    assert found is not None
    assert lived is not None
    assert table is not None
    for name in wanted._fields:
        same(name, getattr(found, name), getattr(wanted, name))
    for name in lives._fields:
        same(name, getattr(lived, name), getattr(lives, name))
    same("slot table", table, causal.slot_table(lives, min(k, size), 16))


@pytest.mark.usefixtures("poisoned_memory", "in_small_blocks")
def test_thresholds_alone_and_lifetimes_alone() -> None:
    from flexsparse.ops import kernels

    u = rows_of("normal", 120)
    ranges = causal.ranges_of(u, 2, None)
    found, *_ = kernels.select(u.to(DEVICE), 5, 2, None, thresholds=True, lifetimes=False)
    assert found is not None
    same("tau alone", found.tau, causal.thresholds(u, 5, ranges).tau)
    _, lived, *_ = kernels.select(u.to(DEVICE), 5, 2, None, thresholds=False, lifetimes=True)
    assert lived is not None
    same("slots alone", lived.slot, causal.lifetimes(u, 5, ranges).slot)


@pytest.mark.usefixtures("poisoned_memory", "in_small_blocks")
def test_keys_at_or_below_the_bound_are_left_out_and_none_that_has_a_part() -> None:
    from flexsparse.codegen.kernels.pruning import Left, pruned

    size, k = 250, 5
    u = rows_of("normal", size).to(DEVICE)
    grid, kept = pruned(u, k, 0, Left(None, None))
    tau = causal.thresholds(u.cpu(), k, causal.ranges_of(u.cpu(), 0, None)).tau
    for row in range(2):
        length = int(grid.length[row])
        time = kept.time[row, :length].long()
        assert length < size // 2
        assert torch.equal(time, time.sort().values)
        chosen = torch.zeros(size, dtype=torch.bool)
        chosen[time.cpu()] = True
        assert torch.equal(kept.upto[row].cpu().long(), chosen.cumsum(0))
        needed = (u[row].cpu() > tau[row]) & u[row].cpu().isfinite()
        assert not (needed & ~chosen).any()
        same("score", grid.score[row, :length], u[row, time].cpu())


@pytest.mark.usefixtures("poisoned_memory", "in_small_blocks")
def test_nothing_is_left_out_where_the_grid_is_coarse() -> None:
    from flexsparse.codegen.kernels.pruning import Left, pruned

    u = 1e30 * rows_of("normal", 100)[:1]
    grid, _ = pruned(u.to(DEVICE), 3, 0, Left(None, None))
    assert int(grid.length) == 100


@pytest.mark.usefixtures("poisoned_memory", "in_small_blocks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 17, 150])
def test_merged_runs_are_in_order_with_the_earlier_key_first_on_ties(size: int, dtype: torch.dtype) -> None:
    from flexsparse.codegen.kernels.pruning import Left, pruned
    from flexsparse.codegen.kernels.sorting import ranked_by_merging

    u = torch.randn(3, size, generator=torch.Generator().manual_seed(0)).to(dtype)
    u[0, ::3], u[1, ::4], u[2, 1::2] = 0.0, torch.inf, -0.0
    grid, _ = pruned(u.to(DEVICE), size, 0, Left(None, None))
    keys = ranked_by_merging(grid)
    for row in range(3):
        order = u[row].sort(descending=True, stable=True).indices
        assert int(grid.length[row]) == size
        assert torch.equal(keys.counted.code[row].cpu().long() >> 1, order)
        assert torch.equal(keys.counted.place[row].cpu().long()[order], torch.arange(size))
        assert torch.equal(keys.value[row].cpu(), grid.value[row].cpu()[order])
