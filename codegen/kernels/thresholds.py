"""SPARSEK thresholds of every causal prefix from their crossings, and their gradient, as Triton kernels."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexsparse.codegen.kernels.arithmetic import cdiv
from flexsparse.codegen.kernels.events import Events
from flexsparse.codegen.kernels.grid import Quantized, earlier_blocks
from flexsparse.codegen.kernels.launch import launch
from flexsparse.codegen.kernels.pruning import Kept
from flexsparse.codegen.kernels.recording import operate
from flexsparse.codegen.kernels.rows import as_scores
from flexsparse.codegen.kernels.staircase import Crossings

_BLOCK = 1024
# So few queries take small blocks, as nothing else would fill a device.
_FEW = 1 << 18
_LOWEST = -(2**63)
_HIGHEST = 2**63 - 1


@triton.jit
def _threshold(
    p_found, p_edge, p_counts, p_upto, p_start, p_end, p_unit, p_step, p_center, p_nan,
    p_tau, p_floor, p_ceil, p_candidates, times, budget, after, lowest, highest,
    SEGMENTS: tl.constexpr, KEPT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """tau of one block of queries, and the grid points around it."""
    row = tl.program_id(0).to(tl.int64)
    query = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_query = query < times
    start = tl.zeros_like(query)
    if SEGMENTS:
        start = tl.load(p_start + row * times + query, mask=m_query, other=0).to(tl.int32)
    stop = tl.maximum(query - after + 1, start)
    some = m_query & (stop > start)
    prefix = row * times + stop - 1
    if KEPT:
        # A prefix ends with the last of its keys that remain.
        kept = tl.load(p_upto + prefix, mask=some, other=0)
        some &= kept > 0
        prefix = row * times + kept - 1
    counts = tl.load(p_counts + prefix, mask=some, other=0)
    first = tl.zeros_like(query)
    if SEGMENTS:
        counts -= tl.load(p_counts + row * times + start - 1, mask=some & (start > 0), other=0)
        first = 2 * (times - tl.load(p_end + row * times + query, mask=m_query, other=0).to(tl.int32))
    unit = tl.load(p_unit + row)
    room = (budget - (counts >> 32)) * unit
    reached = tl.load(p_found + 2 * prefix, mask=some, other=0)
    position = reached.to(tl.int32) - 1
    weight = reached >> 32
    moment = tl.load(p_found + 2 * prefix + 1, mask=some, other=0)
    nothing = some & (position < first)
    everything = ~nothing & (weight <= 0)
    upper = tl.load(p_edge + 2 * row * times + position, mask=some & ~nothing, other=0)
    # f falls by `weight` a step below `upper`, where it is still within the budget by `room`, which is not negative.
    room = tl.where(everything | nothing, 0, room - (moment - weight * upper))
    weight = tl.maximum(weight, 1)
    whole = room // weight
    rest = room - whole * weight
    ceil = upper - whole
    floor = tl.where(rest > 0, ceil - 1, ceil)
    # From the grid point above, so that any event between two kinks gives the same bits.
    tau = ceil.to(tl.float64) - rest.to(tl.float64) / weight.to(tl.float64)
    floor = tl.where(everything, lowest, tl.where(nothing, highest, floor))
    ceil = tl.where(everything, lowest, tl.where(nothing, highest, ceil))
    tau = tau * tl.load(p_step + row) + tl.load(p_center + row)
    infinity = float("inf")
    tau = tl.where(everything, -infinity, tl.where(nothing, infinity, tau))
    tau = tl.where(query >= tl.load(p_nan + row), float("nan"), tau)
    o_query = row * times + query
    tl.store(p_tau + o_query, tau.to(p_tau.dtype.element_ty), mask=m_query)
    tl.store(p_floor + o_query, floor, mask=m_query)
    tl.store(p_ceil + o_query, ceil, mask=m_query)
    if not KEPT:
        tl.store(p_candidates + o_query, ((counts >> 32) + (counts & 4294967295)).to(tl.int32), mask=m_query)


def thresholds(
    found: Crossings,
    events: Events,
    grid: Quantized,
    budget: int,
    after: int,
    segments: tuple[Tensor, Tensor] | None,
    kept: Kept | None,
    out: tuple[Tensor, Tensor, Tensor, Tensor],
) -> None:
    """Into ``out``: tau [R, S] by query; the grid points at or below and at or above it, int64; candidates, int32.

    Where only some keys are ``kept``, ``found``, ``events`` and ``grid`` are of these, and candidates are there.
    """
    rows, times = grid.value.shape
    start, end = segments if segments is not None else (grid.counts, grid.counts)
    block = 512 if rows * times > _FEW else 128
    launch(
        _threshold, (rows, cdiv(times, block)),
        (found.found, events.edge, grid.counts, grid.counts if kept is None else kept.upto, start, end, grid.unit,
         grid.step, grid.center, grid.first_nan, *out),
        (times, budget, after, _LOWEST, _HIGHEST), SEGMENTS=segments is not None, KEPT=kept is not None,
        BLOCK=block,
    )  # fmt: skip


@triton.jit
def _between(
    p_value, p_alive, p_unit, p_floor, p_ceil, p_end, p_enters, p_leaves, p_at, p_by, p_change, times, after, steps,
    SEGMENTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The queries [enters, leaves) for which a key is strictly between the kinks, by two binary searches.

    And where the number of such keys grows and falls by one for it; beyond the row, each key at an entry of its own,
    where it does not. No number has changed yet.
    """
    row = tl.program_id(0).to(tl.int64)
    key = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_key = key < times
    value = tl.load(p_value + row * times + key, mask=m_key, other=0)
    alive = tl.load(p_alive + row * times + key, mask=m_key, other=0) == 1
    unit = tl.load(p_unit + row)
    end = tl.zeros_like(key) + times
    if SEGMENTS:
        end = tl.load(p_end + row * times + key, mask=m_key, other=0).to(tl.int32)
    birth = tl.minimum(key + after, end)
    enters, enters_high = birth, tl.where(alive, end, birth)
    leaves, leaves_high = birth, enters_high
    for _ in range(steps):
        middle = (enters + enters_high) // 2
        open_ = m_key & (enters < enters_high)
        ceil = tl.load(p_ceil + row * times + middle, mask=open_, other=0)
        passed = ceil > value - unit
        enters_high = tl.where(open_ & passed, middle, enters_high)
        enters = tl.where(open_ & ~passed, middle + 1, enters)
        middle = (leaves + leaves_high) // 2
        open_ = m_key & (leaves < leaves_high)
        floor = tl.load(p_floor + row * times + middle, mask=open_, other=0)
        passed = floor >= value
        leaves_high = tl.where(open_ & passed, middle, leaves_high)
        leaves = tl.where(open_ & ~passed, middle + 1, leaves)
    tl.store(p_enters + row * times + key, enters, mask=m_key)
    tl.store(p_leaves + row * times + key, leaves, mask=m_key)
    beside = (times + key).to(tl.int64)
    ever = enters < leaves
    first, second = 2 * row * times + key, (2 * row + 1) * times + key
    tl.store(p_at + first, tl.where(ever, enters, beside), mask=m_key)
    tl.store(p_at + second, tl.where(ever & (leaves < times), leaves, beside), mask=m_key)
    one = tl.full([BLOCK], 1, tl.int32)
    tl.store(p_by + first, one, mask=m_key)
    tl.store(p_by + second, -one, mask=m_key)
    tl.store(p_change + first, one - 1, mask=m_key)
    tl.store(p_change + second, one - 1, mask=m_key)


@triton.jit
def _share_blocks(p_change, p_blocks, times, n_blocks, BLOCK: tl.constexpr):
    """Sums of the changes of one block."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = block * BLOCK + tl.arange(0, BLOCK)
    change = tl.load(p_change + 2 * row * times + at, mask=at < times, other=0)
    tl.store(p_blocks + row * n_blocks + block, tl.sum(change, 0))


@triton.jit
def _shares(p_grad, p_change, p_blocks, p_share, p_totals, times, n_blocks, BLOCK: tl.constexpr):
    """Each query's gradient over the number of its keys between the kinks, and the sums of a block."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    earlier = earlier_blocks(p_blocks, row, block, n_blocks, tl.int32, BLOCK)
    at = block * BLOCK + tl.arange(0, BLOCK)
    m_at = at < times
    change = tl.load(p_change + 2 * row * times + at, mask=m_at, other=0)
    inside = tl.sum(earlier, 0) + tl.cumsum(change, 0)
    grad = tl.load(p_grad + row * times + at, mask=m_at, other=0.0).to(tl.float64)
    share = tl.where(inside > 0, grad / tl.maximum(inside, 1).to(tl.float64), 0.0)
    tl.store(p_share + row * times + at, share, mask=m_at)
    tl.store(p_totals + row * n_blocks + block, tl.sum(share, 0))


@triton.jit
def _running(p_share, p_totals, p_running, times, n_blocks, BLOCK: tl.constexpr):
    """Exclusive running sums of the shares, one entry more than there are queries."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    earlier = earlier_blocks(p_totals, row, block, n_blocks, tl.float64, BLOCK)
    at = block * BLOCK + tl.arange(0, BLOCK)
    share = tl.load(p_share + row * times + at, mask=at < times, other=0.0)
    running = tl.sum(earlier, 0) + tl.cumsum(share, 0)
    tl.store(p_running + row * (times + 1) + at + 1, running, mask=at < times)
    tl.store(p_running + row * (times + 1) + at, 0.0, mask=at == 0)


@triton.jit
def _difference(p_running, p_enters, p_leaves, p_base, p_grad_u, times, ADD: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    key = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_key = key < times
    enters = tl.load(p_enters + row * times + key, mask=m_key, other=0)
    leaves = tl.load(p_leaves + row * times + key, mask=m_key, other=0)
    running = p_running + row * (times + 1)
    found = tl.load(running + leaves, mask=m_key, other=0.0) - tl.load(running + enters, mask=m_key, other=0.0)
    if ADD:
        # Rounded as two gradients are that autograd adds.
        found = found.to(tl.float32) + tl.load(p_base + row * times + key, mask=m_key, other=0.0)
    tl.store(p_grad_u + row * times + key, as_scores(found, p_grad_u).to(p_grad_u.dtype.element_ty), mask=m_key)


def threshold_gradient(
    grad: Tensor,
    grid: Quantized,
    floor: Tensor,
    ceil: Tensor,
    after: int,
    segments: tuple[Tensor, Tensor] | None,
    grad_u: Tensor,
    base: Tensor | None = None,
) -> None:
    """dL/du into grad_u [R, S] from dL/dtau [R, S]: two binary searches and two running sums, in a fixed order.

    ``base`` [R, S] float32 is added to it.
    """
    rows, times = floor.shape
    device = grad.device
    enters, leaves = (torch.empty(rows, times, dtype=torch.int32, device=device) for _ in range(2))
    end = segments[1] if segments is not None else enters
    n_blocks = cdiv(times, _BLOCK)
    size = (rows, n_blocks)
    at = torch.empty(rows, 2 * times, dtype=torch.int64, device=device)
    by, change = (torch.empty(rows, 2 * times, dtype=torch.int32, device=device) for _ in range(2))
    launch(
        _between, size, (grid.value, grid.alive, grid.unit, floor, ceil, end, enters, leaves, at, by, change),
        (times, after, times.bit_length()), SEGMENTS=segments is not None, BLOCK=_BLOCK,
    )  # fmt: skip
    operate(_add, change, at, by, in_graphs=True)
    blocks = torch.empty(rows, n_blocks, dtype=torch.int32, device=device)
    totals = torch.empty(rows, n_blocks, dtype=torch.float64, device=device)
    share = torch.empty(rows, times, dtype=torch.float64, device=device)
    running = torch.empty(rows, times + 1, dtype=torch.float64, device=device)
    launch(_share_blocks, size, (change, blocks), (times, n_blocks), BLOCK=_BLOCK)
    launch(_shares, size, (grad, change, blocks, share, totals), (times, n_blocks), BLOCK=_BLOCK)
    launch(_running, size, (share, totals, running), (times, n_blocks), BLOCK=_BLOCK)
    launch(
        _difference, size, (running, enters, leaves, running if base is None else base, grad_u), (times,),
        ADD=base is not None, BLOCK=_BLOCK,
    )  # fmt: skip


def _add(change: Tensor, at: Tensor, by: Tensor) -> None:
    # Whole numbers add up to the same in any order.
    change.scatter_add_(1, at, by)
