"""SPARSEK of long rows: six launches with several programs a row, as Triton kernels. ``rows`` says how tau is found.

No launch waits for another inside a kernel, nothing is atomic, and no number goes to the host. (1) The extent of each
part of a row. (2, 3) The sums of clip(z - t, 0, 1) of each part at sixteen points t, rounded to float32, from which
every program of the next launch draws the same bracket around tau: the first time among points spread over the row's
extent and over a sample of its scores, the second time inside the bracket found. (4) Each part keeps the keys that
have a kink inside the bracket, on the exact grid, and adds up the others, which are linear there. (5) One program a
row solves for tau on what was kept; if rounding led to a bracket without tau it searches the row itself. (6) Gates.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexsparse.codegen.kernels.arithmetic import cdiv, next_power_of_2
from flexsparse.codegen.kernels.grid import grid_between, rounded
from flexsparse.codegen.kernels.launch import launch
from flexsparse.codegen.kernels.rows import (
    around,
    as_scores,
    exact_parts,
    exact_solution,
    grid_bits,
    is_fast,
    narrowed,
    scores_at,
    soft_depths,
    store_gates,
    values_of,
)

_POINTS = 16
_PARTS = 256


class Extents(NamedTuple):
    """By row and part of it."""

    top: Tensor  # [R, P] float64: the largest finite score, -inf without one
    bottom: Tensor  # [R, P] float64
    counts: Tensor  # [R, P] int64: how many scores are finite, plus 2^31 times how many are +inf
    nan: Tensor  # [R, P] int32


class Section(NamedTuple):
    """Points relative to the largest score at which the sums of the parts are taken, inside a bracket."""

    points: Tensor  # [R, 16] float32
    bracket: Tensor  # [R, 2] float32
    sums: Tensor  # [R, P, 16] float32


@triton.jit
def _extents(p_z, p_top, p_bottom, p_counts, p_nan, size, n_parts, local, BLOCK: tl.constexpr):
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    infinity = float("inf")
    p_row = p_z + row * size
    highest = as_scores(tl.full([BLOCK], -infinity, tl.float64), p_z)
    lowest = -highest
    counts = tl.zeros([BLOCK], tl.int64)
    nan = tl.zeros([BLOCK], tl.int32)
    for first in range(0, local, BLOCK):
        at = part * local + first + tl.arange(0, BLOCK)
        z = scores_at(p_row, at, at < size)
        finite = tl.abs(z) < infinity
        highest = tl.maximum(highest, tl.where(finite, z, -infinity))
        lowest = tl.minimum(lowest, tl.where(finite, z, infinity))
        counts += tl.where(finite, 1, tl.where(z == infinity, 2147483648, 0)).to(tl.int64)
        nan += (z != z).to(tl.int32)
    o_part = row * n_parts + part
    tl.store(p_top + o_part, tl.max(highest, 0).to(tl.float64))
    tl.store(p_bottom + o_part, tl.min(lowest, 0).to(tl.float64))
    tl.store(p_counts + o_part, tl.sum(counts, 0))
    tl.store(p_nan + o_part, tl.sum(nan, 0))


@triton.jit
def _extent_of_row(p_top, p_bottom, p_counts, row, n_parts, PARTS: tl.constexpr):
    """The largest and the smallest finite score, both 0 without one; how many are finite, and how many +inf."""
    part = tl.arange(0, PARTS)
    o_part, m_part = row * n_parts + part, part < n_parts
    counts = tl.sum(tl.load(p_counts + o_part, mask=m_part, other=0), 0)
    top = tl.max(tl.load(p_top + o_part, mask=m_part, other=-float("inf")), 0)
    bottom = tl.min(tl.load(p_bottom + o_part, mask=m_part, other=float("inf")), 0)
    n_finite = counts & 2147483647
    return tl.where(n_finite > 0, top, 0.0), tl.where(n_finite > 0, bottom, 0.0), n_finite, counts >> 31


@triton.jit
def _bracket(p_points, p_bracket, p_sums, row, n_parts, budget, POINTS: tl.constexpr, PARTS: tl.constexpr):
    """The bracket around tau that the sums at the points leave, and a guess inside it."""
    low, high = tl.load(p_bracket + row * 2), tl.load(p_bracket + row * 2 + 1)
    part, point = tl.arange(0, PARTS)[:, None], tl.arange(0, POINTS)[None, :]
    sums = tl.load(p_sums + (row * n_parts + part) * POINTS + point, mask=part < n_parts, other=0.0)
    total = tl.sum(sums.to(tl.float64), 0)  # [POINTS]
    t = tl.load(p_points + row * POINTS + tl.arange(0, POINTS))
    goal = budget.to(tl.float64)
    # Where rounding could decide, a point decides nothing.
    margin = (total + 1.0) * (1e-5 + 1e-6 * tl.abs(t).to(tl.float64))
    over, under = total - margin > goal, total + margin < goal
    low = tl.maximum(low, tl.max(tl.where(over, t, -1e38), 0))
    high = tl.minimum(high, tl.min(tl.where(under, t, 1e38), 0))
    least, most = tl.min(tl.where(over, total, 1e300), 0), tl.max(tl.where(under, total, 0.0), 0)
    share = tl.where(least < 1e299, (least - goal) / tl.maximum(least - most, 1e-30), 0.5)
    share = tl.minimum(tl.maximum(share, 0.0), 1.0)
    return low, high, low + share.to(tl.float32) * (high - low)


@triton.jit
def _first_points(p_row, top, low, high, bottom, size, POINTS: tl.constexpr):
    """Six points spread evenly, the edges of the middle piece, and where a sample of the scores has its kinks."""
    point = tl.arange(0, POINTS)
    even = low + (high - low) * ((point + 1).to(tl.float32) / 7.0)
    # A sample of eight scores, from evenly spaced positions.
    place = (tl.maximum(point - 8, 0).to(tl.int64) * 2 + 1) * size // 16
    sample = soft_depths(scores_at(p_row, place, point >= 8), top)
    sample = tl.where(point >= 14, sample - 1.0, sample)
    edge = tl.where(point == 6, bottom, -1.0)
    return tl.minimum(tl.maximum(tl.where(point < 6, even, tl.where(point < 8, edge, sample)), low), high)


@triton.jit
def _later_points(low, high, POINTS: tl.constexpr):
    """Six points spread evenly, and five that close in on each end, by a factor of four at a time."""
    point = tl.arange(0, POINTS)
    width = high - low
    even = low + width * ((point + 1).to(tl.float32) / 7.0)
    near = width * tl.exp2(-2.0 * (tl.where(point < 11, point - 6, point - 11) + 2).to(tl.float32))
    return tl.where(point < 6, even, tl.where(point < 11, low + near, high - near))


@triton.jit(do_not_specialize=["k"])
def _section(
    p_z, p_top, p_bottom, p_counts, p_points_before, p_bracket_before, p_sums_before, p_points, p_bracket, p_sums,
    size, n_parts, local, k, FIRST: tl.constexpr, POINTS: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    p_row = p_z + row * size
    top, bottom, n_finite, n_above = _extent_of_row(p_top, p_bottom, p_counts, row, n_parts, PARTS)
    budget = k - n_above
    top = as_scores(top, p_z)
    if FIRST:
        depth = tl.maximum((bottom - top.to(tl.float64)).to(tl.float32), -1e37)
        low = tl.where(budget == 1, -1.0, depth - 1.0).to(tl.float32)
        high = low * 0.0
        t = _first_points(p_row, top, low, high, depth, size, POINTS)
    else:
        low, high, _ = _bracket(p_points_before, p_bracket_before, p_sums_before, row, n_parts, budget, POINTS, PARTS)
        t = _later_points(low, high, POINTS)
    if part == 0:
        tl.store(p_points + row * POINTS + tl.arange(0, POINTS), t)
        tl.store(p_bracket + row * 2, low)
        tl.store(p_bracket + row * 2 + 1, high)
    sums = tl.zeros([BLOCK, POINTS], tl.float32)
    if (budget >= 0) & (n_finite > budget):
        end = tl.minimum(size, (part + 1) * local)
        at = part * local + tl.arange(0, BLOCK)
        z = scores_at(p_row, at, at < end)
        for first in range(0, local, BLOCK):
            # What the next round needs is on its way while this one computes.
            at = part * local + first + BLOCK + tl.arange(0, BLOCK)
            ahead = scores_at(p_row, at, at < end)
            gates = soft_depths(z, top)[:, None] - t[None, :]
            sums += tl.minimum(tl.maximum(gates, 0.0), 1.0)
            z = ahead
    o_sums = (row * n_parts + part) * POINTS + tl.arange(0, POINTS)
    tl.store(p_sums + o_sums, tl.sum(sums, 0))


@triton.jit
def _bracket_on_grid(low, high, guess, top, bottom, unit, center, inverse):
    """tau is sought in (low, high]; all int64."""
    highest = rounded((top - center) * inverse).to(tl.int64)
    lowest = rounded((bottom - center) * inverse).to(tl.int64) - unit
    deepest = (lowest - highest).to(tl.float64)
    low = tl.maximum(low.to(tl.float64) * inverse, deepest)
    high = tl.maximum(high.to(tl.float64) * inverse, deepest)
    guess = tl.maximum(guess.to(tl.float64) * inverse, deepest)
    # A point more on each side, for what these products were rounded by.
    low = tl.maximum(highest + rounded(low).to(tl.int64) - 1, lowest)
    high = tl.minimum(highest + rounded(high).to(tl.int64) + 1, highest)
    return low, high, tl.minimum(tl.maximum(highest + rounded(guess).to(tl.int64), low + 1), high)


@triton.jit(do_not_specialize=["k", "bits"])
def _keep(
    p_z, p_top, p_bottom, p_counts, p_points, p_bracket, p_sums, p_kept, p_n_kept, p_slope, p_fixed,
    size, n_parts, local, k, bits,
    FAST: tl.constexpr, POINTS: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The values of one part that have a kink inside the bracket, packed; the sum over the others at its low end.

    A part here is every n_parts-th run of 32 keys, so that sorted rows, too, fill the parts alike.
    """
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    p_row = p_z + row * size
    top, bottom, n_finite, n_above = _extent_of_row(p_top, p_bottom, p_counts, row, n_parts, PARTS)
    unit, step, center = grid_between(top, bottom, bits)
    inverse = 1.0 / step
    budget = k - n_above
    low, high, guess = _bracket(p_points, p_bracket, p_sums, row, n_parts, budget, POINTS, PARTS)
    low, high, guess = _bracket_on_grid(low, high, guess, top, bottom, unit, center, inverse)
    kept = tl.full([], 0, tl.int32)
    slopes = tl.zeros([BLOCK], tl.int32)
    fixed = tl.zeros([BLOCK], tl.int64)
    if (budget >= 0) & (n_finite > budget):
        for first in range(0, local, BLOCK):
            at = first + tl.arange(0, BLOCK)
            at = (at // 32 * n_parts + part) * 32 + at % 32
            value = values_of(scores_at(p_row, at, at < size), center, inverse, FAST)
            above = value > low
            whole = value - unit >= high
            linear = (value >= high) & (value - unit <= low)
            chosen = (above & ~whole & ~linear).to(tl.int32)
            place = kept + tl.cumsum(chosen, 0) - 1
            tl.store(p_kept + (row * n_parts + part) * local + place, value, mask=chosen > 0)
            kept += tl.sum(chosen, 0)
            slopes += linear.to(tl.int32)
            fixed += tl.where(whole, unit, tl.where(linear, value - low, 0))
    o_part = row * n_parts + part
    tl.store(p_n_kept + o_part, kept)
    tl.store(p_slope + o_part, tl.sum(slopes, 0))
    tl.store(p_fixed + o_part, tl.sum(fixed, 0))


@triton.jit(do_not_specialize=["k", "bits"])
def _solve(
    p_z, p_top, p_bottom, p_counts, p_nan, p_points, p_bracket, p_sums, p_kept, p_n_kept, p_slope, p_fixed,
    p_whole, p_real, size, n_parts, local, k, bits,
    FAST: tl.constexpr, POINTS: tl.constexpr, PARTS: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """tau of one row, and what the gates need beside it: 5 whole and 3 real numbers."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS)
    o_part, m_part = row * n_parts + part, part < n_parts
    top, bottom, n_finite, n_above = _extent_of_row(p_top, p_bottom, p_counts, row, n_parts, PARTS)
    unit, step, center = grid_between(top, bottom, bits)
    inverse = 1.0 / step
    solved = (k - n_above >= 0) & (n_finite > k - n_above)
    low, high, guess = _bracket(p_points, p_bracket, p_sums, row, n_parts, k - n_above, POINTS, PARTS)
    low, high, t = _bracket_on_grid(low, high, guess, top, bottom, unit, center, inverse)
    budget = (k - n_above) * unit

    n_kept = tl.load(p_n_kept + o_part, mask=m_part, other=0)
    slope = tl.sum(tl.load(p_slope + o_part, mask=m_part, other=0), 0)
    fixed = tl.sum(tl.load(p_fixed + o_part, mask=m_part, other=0), 0)
    most = tl.max(n_kept, 0)
    p_slot = p_kept + (o_part * local)[:, None] + tl.arange(0, SLOTS)[None, :]
    least, greatest = low + 1, high
    stalled = tl.full([], 0, tl.int32)
    total, weight, last = budget * 0, stalled + 0, greatest - least
    found = solved == 0
    open_ = solved & (least <= greatest)
    while open_:
        parts = tl.zeros([PARTS, SLOTS], tl.int64)
        inside = tl.zeros([PARTS, SLOTS], tl.int32)
        for first in range(0, most, SLOTS):
            m_slot = (first + tl.arange(0, SLOTS))[None, :] < n_kept[:, None]
            value = tl.load(p_slot + first, mask=m_slot, other=-4611686018427387904)
            gate, one = exact_parts(value, t, unit)
            parts += gate
            inside += one
        total = tl.sum(tl.sum(parts, 1), 0) + fixed - slope.to(tl.int64) * (t - low)
        weight = tl.sum(tl.sum(inside, 1), 0) + slope
        found, t, least, greatest, last, stalled = narrowed(t, total, weight, budget, least, greatest, last, stalled)
        open_ = (found == 0) & (least <= greatest)
    if found == 0:
        # The bracket was wrong: the row itself, from its whole extent.
        greatest = rounded((top - center) * inverse).to(tl.int64)
        least = rounded((bottom - center) * inverse).to(tl.int64) - unit + 1
        t = tl.minimum(tl.maximum(t, least), greatest)
        t, total, weight = exact_solution(
            n_kept, p_z + row * size, size, t, least, greatest, budget, found == 0, unit, center, inverse,
            False, FAST, BLOCK,
        )  # fmt: skip
    tau, floor, ceil = around(t, total, weight, budget, solved, step, center)
    nan = tl.sum(tl.load(p_nan + o_part, mask=m_part, other=0), 0)
    tl.store(p_whole + row * 5, floor)
    tl.store(p_whole + row * 5 + 1, ceil)
    tl.store(p_whole + row * 5 + 2, unit)
    tl.store(p_whole + row * 5 + 3, n_above)
    tl.store(p_whole + row * 5 + 4, nan.to(tl.int64))
    tl.store(p_real + row * 3, tau)
    tl.store(p_real + row * 3 + 1, center)
    tl.store(p_real + row * 3 + 2, inverse)


@triton.jit(do_not_specialize=["k"])
def _gates_of_parts(
    p_z, p_counts, p_whole, p_real, p_gates, p_inside, size, n_parts, local, k,
    FAST: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    floor, ceil, unit = tl.load(p_whole + row * 5), tl.load(p_whole + row * 5 + 1), tl.load(p_whole + row * 5 + 2)
    n_above, nan = tl.load(p_whole + row * 5 + 3), tl.load(p_whole + row * 5 + 4) > 0
    tau, center, inverse = tl.load(p_real + row * 3), tl.load(p_real + row * 3 + 1), tl.load(p_real + row * 3 + 2)
    before = tl.full([], 0, tl.int64)
    if n_above > k:
        other = tl.arange(0, PARTS)
        before += tl.sum(tl.load(p_counts + row * n_parts + other, mask=other < part, other=0) >> 31, 0)
    for first in range(0, local, BLOCK):
        at = part * local + first + tl.arange(0, BLOCK)
        z = scores_at(p_z + row * size, at, at < size)
        taken = z == float("inf")
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
def _flow_sums(p_grad, p_inside, p_sums, p_inner, size, n_parts, local, BLOCK: tl.constexpr):
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    sums = tl.zeros([BLOCK], tl.float64)
    counts = tl.zeros([BLOCK], tl.int32)
    for first in range(0, local, BLOCK):
        at = part * local + first + tl.arange(0, BLOCK)
        inside = tl.load(p_inside + row * size + at, mask=at < size, other=0) != 0
        sums += tl.load(p_grad + row * size + at, mask=inside, other=0.0).to(tl.float64)
        counts += inside.to(tl.int32)
    tl.store(p_sums + row * n_parts + part, tl.sum(sums, 0))
    tl.store(p_inner + row * n_parts + part, tl.sum(counts, 0))


@triton.jit
def _flow_of_parts(
    p_grad, p_inside, p_sums, p_inner, p_grad_z, size, n_parts, local, PARTS: tl.constexpr, BLOCK: tl.constexpr
):
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    other = row * n_parts + tl.arange(0, PARTS)
    m_other = tl.arange(0, PARTS) < n_parts
    count = tl.sum(tl.load(p_inner + other, mask=m_other, other=0), 0)
    mean = tl.sum(tl.load(p_sums + other, mask=m_other, other=0.0), 0) / tl.maximum(count, 1).to(tl.float64)
    for first in range(0, local, BLOCK):
        at = part * local + first + tl.arange(0, BLOCK)
        inside = tl.load(p_inside + row * size + at, mask=at < size, other=0) != 0
        grad = tl.load(p_grad + row * size + at, mask=inside, other=0.0).to(tl.float64)
        flow = tl.where(inside, grad - mean, 0.0)
        tl.store(p_grad_z + row * size + at, as_scores(flow, p_grad_z).to(p_grad_z.dtype.element_ty), mask=at < size)


def parts_of(rows: int, size: int) -> tuple[int, int]:
    """How many programs a row, at most 256, and how many keys each: 1,024 of them or a power of two beyond."""
    least = 1024 if rows * size < 2**22 else 8192
    local = max(least, next_power_of_2(cdiv(size, _PARTS)))
    return cdiv(size, local), local


def gates_of_rows(z: Tensor, k: int, gates: Tensor, inside: Tensor, parts: tuple[int, int] | None = None) -> None:
    """As ``rows.gates_of_rows``, for N below 2^30."""
    rows, size = z.shape
    n_parts, local = parts or parts_of(rows, size)
    most = max(next_power_of_2(n_parts), 2)
    fast, bits, block = is_fast(size), grid_bits(size), min(local, 2048)

    def made(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(rows, *shape, dtype=dtype, device=z.device)

    real, whole, short = torch.float64, torch.int64, torch.int32
    extents = Extents(made(real, n_parts), made(real, n_parts), made(whole, n_parts), made(short, n_parts))
    grid = (rows, n_parts)
    launch(_extents, grid, (z, *extents), (size, n_parts, local), BLOCK=block, num_warps=8)
    float32 = torch.float32
    first, second = (
        Section(made(float32, _POINTS), made(float32, 2), made(float32, n_parts, _POINTS)) for _ in range(2)
    )
    narrow = min(local, 512)
    for before, section in ((first, first), (first, second)):
        launch(
            _section, grid, (z, *extents[:3], *before, *section), (size, n_parts, local, k),
            FIRST=section is first, POINTS=_POINTS, PARTS=most, BLOCK=narrow, num_warps=8,
        )  # fmt: skip
    kept = made(whole, n_parts * local), made(short, n_parts), made(short, n_parts), made(whole, n_parts)
    launch(
        _keep, grid, (z, *extents[:3], *second, *kept), (size, n_parts, local, k, bits),
        FAST=fast, POINTS=_POINTS, PARTS=most, BLOCK=block, num_warps=8,
    )  # fmt: skip
    numbers = made(whole, 5), made(real, 3)
    launch(
        _solve, (rows,), (z, *extents, *second, *kept, *numbers), (size, n_parts, local, k, bits),
        FAST=fast, POINTS=_POINTS, PARTS=most, SLOTS=min(max(2048 // most, 1), 256), BLOCK=4096, num_warps=16,
    )  # fmt: skip
    launch(
        _gates_of_parts, grid, (z, extents.counts, *numbers, gates, inside), (size, n_parts, local, k),
        FAST=fast, PARTS=most, BLOCK=min(local, 1024), num_warps=8,
    )  # fmt: skip


def flow_of_rows(grad: Tensor, inside: Tensor, grad_z: Tensor, parts: tuple[int, int] | None = None) -> None:
    """As ``rows.flow_of_rows``."""
    rows, size = grad.shape
    n_parts, local = parts or parts_of(rows, size)
    sums = torch.empty(rows, n_parts, dtype=torch.float64, device=grad.device)
    inner = torch.empty(rows, n_parts, dtype=torch.int32, device=grad.device)
    block = min(local, 1024)
    launch(_flow_sums, (rows, n_parts), (grad, inside, sums, inner), (size, n_parts, local), BLOCK=block)
    launch(
        _flow_of_parts, (rows, n_parts), (grad, inside, sums, inner, grad_z), (size, n_parts, local),
        PARTS=max(next_power_of_2(n_parts), 2), BLOCK=block,
    )  # fmt: skip
