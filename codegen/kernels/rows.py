"""SPARSEK of independent rows without a sort, as Triton kernels: one program a row. ``long_rows`` has several.

Sought is the least grid point t with f(t) <= budget, or any with f(t) = budget, f(t) being the sum of
clip(value - t, 0, unit). Newton's method finds it inside a bracket: first on rounded float32 sums, which cost little
and lead to within a rounding of it, then on exact integer sums, of which two usually suffice. f is piecewise linear,
so Newton's method is exact once no kink lies between; where two steps in a row have not halved the one before, the
bracket is halved. Every solution has been verified on integers: f(t) <= budget < f(t - 1), or f(t) = budget. The twin
is ``flexsparse.ops.projection``, which sorts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexsparse.codegen.kernels.arithmetic import next_power_of_2
from flexsparse.codegen.kernels.grid import grid_between, rounded
from flexsparse.codegen.kernels.launch import launch

LOWEST = -(2**63)
HIGHEST = 2**63 - 1


@triton.jit
def scores_at(p_row, at, m_at):
    """Scores in float32, or in float64 where they are that; -inf outside of the mask."""
    z = tl.load(p_row + at, mask=m_at, other=-float("inf"))
    if z.dtype != tl.float64:
        z = z.to(tl.float32)
    return z


@triton.jit
def as_scores(x, p_z):
    """x in the type that ``scores_at`` gives; on the way to a shorter one as well, as PyTorch and Triton 3.1 go."""
    if p_z.dtype.element_ty != tl.float64:
        x = x.to(tl.float32)
    return x


@triton.jit
def values_of(z, center, inverse, FAST: tl.constexpr):
    """Grid values, -2^62 for what is not finite. FAST: every value is below 2^51."""
    finite = tl.abs(z) < float("inf")
    # The inverse of a power of two: the product is the quotient.
    scaled = (tl.where(finite, z.to(tl.float64), center) - center) * inverse
    if FAST:
        # Adding 1.5 * 2^52 rounds to the nearest whole number, halves to even, and leaves it in the low bits.
        value = (scaled + 6755399441055744.0).to(tl.int64, bitcast=True) - 4843621399236968448
    else:
        value = rounded(scaled).to(tl.int64)
    return tl.where(finite, value, -4611686018427387904)


@triton.jit
def soft_depths(z, top):
    """Scores relative to the largest finite one, rounded to float32 and bounded; what is not finite is far below."""
    depth = tl.where(tl.abs(z) < float("inf"), z - top, -1e37).to(tl.float32)
    return tl.maximum(depth, -1e37)


@triton.jit
def exact_parts(value, t, unit):
    """By key: what it adds to f(t), and whether it adds to the slope of f between t - 1 and t."""
    above = value - t
    return tl.minimum(tl.maximum(above, 0), unit), ((above >= 0) & (above < unit)).to(tl.int32)


@triton.jit
def narrowed(t, total, weight, budget, least, greatest, last, stalled):
    """One step of the search for the solution in [least, greatest], from f(t) and the slope of f below t.

    Returns whether t is a solution, the next point, the new bracket, the length of the step to that point, and how
    often in a row a step was longer than half of the one before. On a plateau, where f(t) is the budget for more than
    one t, any of them is a solution: the gates are the same.
    """
    slope = weight.to(tl.int64)
    within = total <= budget
    found = (total == budget) | (within & (total + slope > budget))
    greatest = tl.where(within, t - 1, greatest)
    least = tl.where(within, least, t + 1)
    rate = tl.maximum(slope, 1)
    distance = tl.abs(total - budget)
    target = tl.where(within, t - distance // rate, t + (distance + rate - 1) // rate)
    stalled = tl.where(2 * tl.abs(target - t) > last, stalled + 1, 0)
    halve = (slope == 0) | (target < least) | (target > greatest) | (stalled > 1)
    stalled = tl.where(halve, 0, stalled)
    target = tl.where(found, t, tl.where(halve, least + (greatest - least) // 2, target))
    return found, target, least, greatest, tl.abs(target - t), stalled


@triton.jit
def _soft_sums(tile, p_row, size, top, t, ONE: tl.constexpr, BLOCK: tl.constexpr):
    """f(t) and its slope in float32, t being relative to the largest score."""
    gates = tl.zeros([BLOCK], tl.float32)
    inside = tl.zeros([BLOCK], tl.float32)
    if ONE:
        gate = tl.minimum(tl.maximum(soft_depths(tile, top) - t, 0.0), 1.0)
        gates += gate
        inside += ((gate > 0.0) & (gate < 1.0)).to(tl.float32)
    else:
        for first in range(0, size, BLOCK):
            at = first + tl.arange(0, BLOCK)
            gate = tl.minimum(tl.maximum(soft_depths(scores_at(p_row, at, at < size), top) - t, 0.0), 1.0)
            gates += gate
            inside += ((gate > 0.0) & (gate < 1.0)).to(tl.float32)
    return tl.sum(gates, 0), tl.sum(inside, 0)


@triton.jit
def _soft_solution(tile, p_row, size, top, mean, low, budget, ONE: tl.constexpr, BLOCK: tl.constexpr):
    """About where f crosses the budget, relative to the largest score; a guess, which nothing relies on."""
    high = low * 0
    # A row shaped like a bell has its steepest point half a unit below its mean: from there Newton does not overshoot.
    t = tl.minimum(tl.maximum(mean - 0.5, low), high)
    goal = budget.to(tl.float32)
    rounds, stalled, last = tl.full([], 0, tl.int32), tl.full([], 0, tl.int32), high - low
    open_ = budget > 0
    while open_:
        total, slope = _soft_sums(tile, p_row, size, top, t, ONE, BLOCK)
        over = total > goal
        low = tl.where(over, t, low)
        high = tl.where(over, high, t)
        target = t + (total - goal) / tl.maximum(slope, 1.0)
        small = 1e-6 * tl.abs(t)
        near = tl.abs(target - t) <= small
        stalled = tl.where(2 * tl.abs(target - t) > last, stalled + 1, 0)
        halve = (near == 0) & ((slope < 0.5) | (target <= low) | (target >= high) | (stalled > 1))
        stalled = tl.where(halve, 0, stalled)
        target = tl.where(halve, low + (high - low) / 2, target)
        last = tl.abs(target - t)
        rounds += 1
        open_ = (last > small) & (rounds < 32)
        t = target
    return tl.where(budget > 0, t, high)


@triton.jit
def exact_solution(
    tile, p_row, size, t, least, greatest, budget, open_, unit, center, inverse,
    ONE: tl.constexpr, FAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A solution t, which lies in [least, greatest]; f(t), and the slope of f below t."""
    stalled = tl.full([], 0, tl.int32)
    total, weight, last = budget * 0, stalled + 0, greatest - least
    while open_:
        parts = tl.zeros([BLOCK], tl.int64)
        inside = tl.zeros([BLOCK], tl.int32)
        if ONE:
            part, one = exact_parts(values_of(tile, center, inverse, FAST), t, unit)
            parts += part
            inside += one
        else:
            for first in range(0, size, BLOCK):
                at = first + tl.arange(0, BLOCK)
                z = scores_at(p_row, at, at < size)
                part, one = exact_parts(values_of(z, center, inverse, FAST), t, unit)
                parts += part
                inside += one
        total, weight = tl.sum(parts, 0), tl.sum(inside, 0)
        found, t, least, greatest, last, stalled = narrowed(t, total, weight, budget, least, greatest, last, stalled)
        open_ = (found == 0) & (least <= greatest)
    return t, total, weight


@triton.jit
def around(t, total, weight, budget, solved, step, center):
    """tau, and the grid points at or below and at or above it; ``budget`` says which way an unsolved row goes."""
    room = budget - total
    lowest = tl.full([], -9223372036854775808, tl.int64)
    unsolved = tl.where(budget < 0, tl.full([], 9223372036854775807, tl.int64), lowest)
    floor = tl.where(solved, tl.where(room > 0, t - 1, t), unsolved)
    ceil = tl.where(solved, t, unsolved)
    share = room.to(tl.float64) / tl.maximum(weight, 1).to(tl.float64)
    return (t.to(tl.float64) - share) * step + center, floor, ceil


@triton.jit
def store_gates(
    z, taken, tau, floor, ceil, unit, center, inverse, nan, p_gates, p_inside, at, m_at, FAST: tl.constexpr
):
    """Gates of one block. ``taken``: the keys of +inf that have gate 1."""
    finite = tl.abs(z) < float("inf")
    value = values_of(z, center, inverse, FAST)
    above = finite & (value > floor)
    inside = above & (value - unit < ceil)
    between = tl.minimum(tl.maximum(z.to(tl.float64) - tau, 0.0), 1.0)
    gates = tl.where(inside, between, tl.where(above | taken, 1.0, 0.0))
    gates = tl.where(nan, float("nan"), gates)
    tl.store(p_gates + at, gates.to(p_gates.dtype.element_ty), mask=m_at)
    tl.store(p_inside + at, inside.to(tl.int8), mask=m_at)


@triton.jit(do_not_specialize=["k", "bits"])
def _gates_of_rows(p_z, p_gates, p_inside, size, k, bits, ONE: tl.constexpr, FAST: tl.constexpr, BLOCK: tl.constexpr):
    """Everything about one row."""
    row = tl.program_id(0).to(tl.int64)
    p_row = p_z + row * size
    infinity = float("inf")
    tile = scores_at(p_row, tl.arange(0, BLOCK), tl.arange(0, BLOCK) < size)
    highest = tl.full([BLOCK], -infinity, tile.dtype)
    lowest = tl.full([BLOCK], infinity, tile.dtype)
    sums = tl.zeros([BLOCK], tile.dtype)
    # Three counts in one: of finite scores, and above them of +inf and of NaN.
    counts = tl.zeros([BLOCK], tl.int64)
    for first in range(0, size, BLOCK):
        at = first + tl.arange(0, BLOCK)
        z = tile
        if not ONE:
            z = scores_at(p_row, at, at < size)
        finite = tl.abs(z) < infinity
        highest = tl.maximum(highest, tl.where(finite, z, -infinity))
        lowest = tl.minimum(lowest, tl.where(finite, z, infinity))
        sums += tl.where(finite, z, 0.0)
        counts += tl.where(finite, 1, tl.where(z == infinity, 1 << 20, tl.where(z != z, 1 << 40, 0))).to(tl.int64)
    top, bottom, count = tl.max(highest, 0), tl.min(lowest, 0), tl.sum(counts, 0)
    n_finite, n_above, nan = count & 1048575, (count >> 20) & 1048575, (count >> 40) > 0
    top, bottom = tl.where(n_finite > 0, top, 0.0), tl.where(n_finite > 0, bottom, 0.0)
    mean = (tl.sum(sums, 0) / tl.maximum(n_finite, 1).to(tile.dtype) - top).to(tl.float32)
    mean = tl.where(tl.abs(mean) < infinity, mean, 0.0)
    unit, step, center = grid_between(top.to(tl.float64), bottom.to(tl.float64), bits)
    inverse = 1.0 / step
    budget = k - n_above
    solved = (budget >= 0) & (n_finite > budget)

    # Where the budget is 1, f is at least 1 a unit below the largest score.
    low = tl.where(budget == 1, -1.0, tl.maximum((bottom - top).to(tl.float32) - 1.0, -1e37)).to(tl.float32)
    t = _soft_solution(tile, p_row, size, top, mean, low, tl.where(solved, budget, 0), ONE, BLOCK)
    greatest = rounded((top.to(tl.float64) - center) * inverse).to(tl.int64)
    least = rounded((bottom.to(tl.float64) - center) * inverse).to(tl.int64) - unit + 1
    deep = tl.maximum(t.to(tl.float64) * inverse, (least - greatest).to(tl.float64))
    start = tl.minimum(tl.maximum(greatest + rounded(deep).to(tl.int64), least), greatest)
    t, total, weight = exact_solution(
        tile, p_row, size, start, least, greatest, budget * unit, solved, unit, center, inverse, ONE, FAST, BLOCK
    )
    tau, floor, ceil = around(t, total, weight, budget * unit, solved, step, center)

    before = tl.full([], 0, tl.int32)
    for first in range(0, size, BLOCK):
        at = first + tl.arange(0, BLOCK)
        z = tile
        if not ONE:
            z = scores_at(p_row, at, at < size)
        taken = z == infinity
        if n_above > k:
            rank = before + tl.cumsum(taken.to(tl.int32), 0)
            before += tl.sum(taken.to(tl.int32), 0)
            taken = taken & (rank <= k)
        o_row = row * size
        store_gates(
            z, taken, tau, floor, ceil, unit, center, inverse, nan, p_gates + o_row, p_inside + o_row, at, at < size,
            FAST,
        )  # fmt: skip


@triton.jit
def _flow_of_rows(p_grad, p_inside, p_grad_z, size, ONE: tl.constexpr, BLOCK: tl.constexpr):
    """The gradient of one row: s * (g - the mean of g over s), summed in float64."""
    row = tl.program_id(0).to(tl.int64)
    sums = tl.zeros([BLOCK], tl.float64)
    counts = tl.zeros([BLOCK], tl.int32)
    for first in range(0, size, BLOCK):
        at = first + tl.arange(0, BLOCK)
        inside = tl.load(p_inside + row * size + at, mask=at < size, other=0) != 0
        sums += tl.load(p_grad + row * size + at, mask=inside, other=0.0).to(tl.float64)
        counts += inside.to(tl.int32)
    mean = tl.sum(sums, 0) / tl.maximum(tl.sum(counts, 0), 1).to(tl.float64)
    for first in range(0, size, BLOCK):
        at = first + tl.arange(0, BLOCK)
        inside = tl.load(p_inside + row * size + at, mask=at < size, other=0) != 0
        grad = tl.load(p_grad + row * size + at, mask=inside, other=0.0).to(tl.float64)
        flow = tl.where(inside, grad - mean, 0.0)
        tl.store(p_grad_z + row * size + at, as_scores(flow, p_grad_z).to(p_grad_z.dtype.element_ty), mask=at < size)


def grid_bits(size: int) -> int:
    """Bits of a grid value in a row of ``size`` scores, as in ``on_grid``: sums of a row must fit 62."""
    return 60 - max(size, 1).bit_length()


def is_fast(size: int) -> bool:
    """Whether every grid value of such a row is below 2^51."""
    return grid_bits(size) <= 50


def _block(size: int, most: int) -> tuple[int, int]:
    """Keys at a time, and warps."""
    block = min(max(next_power_of_2(size), 128), most)
    return block, min(max(block // 256, 1), 16)


def gates_of_rows(z: Tensor, k: int, gates: Tensor, inside: Tensor, most: int = 4096) -> None:
    """Fill gates [R, N] and inside [R, N] int8 from scores z [R, N], contiguous; N below 2^20, 1 <= k <= N."""
    rows, size = z.shape
    block, warps = _block(size, most)
    launch(
        _gates_of_rows, (rows,), (z, gates, inside), (size, k, grid_bits(size)),
        ONE=size <= block, FAST=is_fast(size), BLOCK=block, num_warps=warps,
    )  # fmt: skip


def flow_of_rows(grad: Tensor, inside: Tensor, grad_z: Tensor, most: int = 4096) -> None:
    """Fill grad_z [R, N] from dL/dgates and what ``gates_of_rows`` found inside, int8."""
    rows, size = grad.shape
    block, warps = _block(size, most)
    launch(_flow_of_rows, (rows,), (grad, inside, grad_z), (size,), ONE=size <= block, BLOCK=block, num_warps=warps)


def empty_gates(z: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Memory for the gates and for what lies inside, which int8 kernels fill."""
    return torch.empty_like(z, dtype=dtype), torch.empty_like(z, dtype=torch.int8)
