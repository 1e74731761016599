"""Scores on a grid of integers, and running counts of them, as Triton kernels.

On the grid sums are exact and two runs give the same bits. It is the one of ``flexsparse.ops.projection.on_grid``,
which is this module's twin: the same powers of two, the same rounding.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexsparse.codegen.kernels.arithmetic import cdiv, next_power_of_2
from flexsparse.codegen.kernels.launch import launch

_BLOCK = 1024
# A row of up to so many scores is one program's.
_ONE_PROGRAM = 4096


class Quantized(NamedTuple):
    """R rows of S scores. ``value`` is on the grid; +inf has the row's largest, -inf and NaN have its smallest.

    ``counts``: how many finite scores stand at or before each position, plus 2^32 times how many are +inf.
    ``first_nan``: the position of the row's first NaN, S without one. ``score``: u with -inf for NaN. ``score`` and
    ``counts`` are left as they were allocated where only values are wanted, ``alive`` where keys are left out.
    """

    value: Tensor  # [R, S] int64
    alive: Tensor  # [R, S] int8: 1 for a finite score, 2 for +inf, else 0
    counts: Tensor  # [R, S] int64
    score: Tensor  # [R, S] in u's dtype
    unit: Tensor  # [R] int64: a score difference of 1
    step: Tensor  # [R] float64: the score difference of one grid point
    center: Tensor  # [R] float64: the score at grid point 0
    top: Tensor  # [R] float64: the largest finite score, 0 without one
    bottom: Tensor  # [R] float64: the smallest
    first_nan: Tensor  # [R] int32
    length: Tensor  # [R] int32: how many keys there are; S, unless some were left out


@triton.jit
def rounded(x):
    """To the nearest whole number, halves to the even one, as torch.round does."""
    size = tl.abs(x)
    whole = (size + 4503599627370496.0) - 4503599627370496.0  # 2^52: from there on float64 has no fractions
    whole = tl.where(size < 4503599627370496.0, whole, size)
    return tl.where(x < 0, -whole, whole)


@triton.jit
def _within_extent(top, bottom):
    """The bounds of the finite scores, 0 where there are none."""
    some = top > -float("inf")
    return tl.where(some, top, 0.0), tl.where(some, bottom, 0.0)


@triton.jit
def grid_between(top, bottom, bits):
    """unit, step and center of the grid of a row whose finite scores lie from ``bottom`` to ``top``, float64 both."""
    # Half of each first: the sum of two huge scores may overflow. A whole centre keeps whole scores whole.
    center = rounded(top / 2 + bottom / 2)
    extent = tl.maximum(top - center, center - bottom) + 1
    exponent = ((extent.to(tl.int64, bitcast=True) >> 52) & 2047) - 1022
    fine = tl.minimum(bits - exponent, 52)
    # 2^-fine and 2^fine from their bits; finer than 2^0 only where there is room.
    step = ((1023 - fine) << 52).to(tl.float64, bitcast=True)
    unit = tl.where(fine > 0, tl.full([], 1, tl.int64) << tl.maximum(fine, 0), 1)
    return unit, step, center


@triton.jit
def grid_values(given, step, center, top, bottom):
    """Grid values of scores in float64, whether they are finite (1) or +inf (2), and what they add to the counts."""
    infinity = float("inf")
    u = given.to(tl.float64)
    finite = tl.abs(u) < infinity
    above = u == infinity
    # A step is a power of two, and so is its inverse.
    value = rounded((tl.where(finite, u, tl.where(above, top, bottom)) - center) * (1.0 / step)).to(tl.int64)
    counted = tl.where(finite, 1, tl.where(above, 4294967296, 0)).to(tl.int64)
    return value, tl.where(finite, 1, tl.where(above, 2, 0)).to(tl.int8), counted


@triton.jit
def extent_of(u, at):
    """The largest and smallest finite score and the first NaN of scores [N]."""
    infinity = float("inf")
    finite = tl.abs(u) < infinity
    highest = tl.max(tl.where(finite, u, -infinity), 0)
    lowest = tl.min(tl.where(finite, u, infinity), 0)
    return highest, lowest, tl.min(tl.where(u != u, at, 2147483647), 0)


@triton.jit
def grid_of_row(
    p_unit, p_step, p_center, p_top, p_bottom, p_nan, p_length, row, block, highest, lowest, nan, size, bits
):  # fmt: skip
    """Step, center, top and bottom of a row's grid, from what ``extent_of`` the row is; its first block keeps them."""
    top, bottom = _within_extent(highest, lowest)
    unit, step, center = grid_between(top, bottom, bits)
    if block == 0:
        tl.store(p_unit + row, unit)
        tl.store(p_step + row, step)
        tl.store(p_center + row, center)
        tl.store(p_top + row, top)
        tl.store(p_bottom + row, bottom)
        tl.store(p_nan + row, tl.minimum(nan, size))
        tl.store(p_length + row, size)
    return step, center, top, bottom


@triton.jit
def _extents(p_u, p_highest, p_lowest, p_nans, size, n_blocks, BLOCK: tl.constexpr):
    """Those of every block."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = block * BLOCK + tl.arange(0, BLOCK)
    u = tl.load(p_u + row * size + at, mask=at < size, other=float("inf")).to(tl.float64)
    highest, lowest, nan = extent_of(u, at)
    tl.store(p_highest + row * n_blocks + block, highest)
    tl.store(p_lowest + row * n_blocks + block, lowest)
    tl.store(p_nans + row * n_blocks + block, nan)


@triton.jit
def _quantize(
    p_u, p_highest, p_lowest, p_nans, p_unit, p_step, p_center, p_top, p_bottom, p_nan, p_length, p_value, p_alive,
    p_counts, p_score, p_blocks, size, n_blocks, bits,
    BLOCK: tl.constexpr, PARTS: tl.constexpr, WHOLE: tl.constexpr, COUNTED: tl.constexpr,
):  # fmt: skip
    """The grid of a row, and values of one block on it: the WHOLE row, or else how many are finite and +inf there."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = block * BLOCK + tl.arange(0, BLOCK)
    m_at = at < size
    infinity = float("inf")
    given = tl.load(p_u + row * size + at, mask=m_at, other=-infinity)
    if WHOLE:
        top, bottom, nan = extent_of(given.to(tl.float64), at)
    else:
        part = tl.arange(0, PARTS)
        m_part = part < n_blocks
        top = tl.max(tl.load(p_highest + row * n_blocks + part, mask=m_part, other=-infinity), 0)
        bottom = tl.min(tl.load(p_lowest + row * n_blocks + part, mask=m_part, other=infinity), 0)
        nan = tl.min(tl.load(p_nans + row * n_blocks + part, mask=m_part, other=2147483647), 0)
    step, center, top, bottom = grid_of_row(
        p_unit, p_step, p_center, p_top, p_bottom, p_nan, p_length, row, block, top, bottom, nan, size, bits
    )
    value, alive, counted = grid_values(given, step, center, top, bottom)
    tl.store(p_value + row * size + at, value, mask=m_at)
    tl.store(p_alive + row * size + at, alive, mask=m_at)
    if COUNTED:
        # Triton 3.1 compares no bfloat16.
        short = given.to(tl.float32)
        tl.store(p_score + row * size + at, tl.where(short == short, given, -infinity), mask=m_at)
        if WHOLE:
            tl.store(p_counts + row * size + at, tl.cumsum(counted, 0), mask=m_at)
        else:
            tl.store(p_blocks + row * n_blocks + block, tl.sum(counted, 0))


@triton.jit
def earlier_blocks(p_blocks, row, block, n_blocks, dtype: tl.constexpr, BLOCK: tl.constexpr):
    """What one row's entries for the blocks before ``block`` add up to, in BLOCK parts of a fixed order."""
    earlier = tl.zeros([BLOCK], dtype)
    for first in range(0, block, BLOCK):
        other = first + tl.arange(0, BLOCK)
        earlier += tl.load(p_blocks + row * n_blocks + other, mask=other < block, other=0)
    return earlier


@triton.jit
def _running_counts(p_alive, p_blocks, p_counts, size, n_blocks, BLOCK: tl.constexpr):
    """Counts at every position of one block, from those of the blocks before it."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    earlier = earlier_blocks(p_blocks, row, block, n_blocks, tl.int64, BLOCK)
    at = block * BLOCK + tl.arange(0, BLOCK)
    alive = tl.load(p_alive + row * size + at, mask=at < size, other=0)
    counted = tl.where(alive == 1, 1, tl.where(alive == 2, 4294967296, 0)).to(tl.int64)
    tl.store(p_counts + row * size + at, tl.sum(earlier, 0) + tl.cumsum(counted, 0), mask=at < size)


def bits_for(size: int) -> int:
    """Bits of a value on the grid of a row of ``size`` scores, whose sums then fit 64."""
    return 60 - max(size, 1).bit_length()


def empty_grid(u: Tensor, *, counted: bool, scored: bool = False, whole: bool = True) -> Quantized:
    """Room for the grid of rows u [R, S]: for ``counts`` where they are ``counted``, for ``score`` where ``scored``.

    Only ``whole`` rows, of which no key is left out, have room for ``alive``.
    """
    rows, size = u.shape

    def made(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(rows, *shape, dtype=dtype, device=u.device)

    real, long = torch.float64, torch.int64
    value, alive, counts = made(long, size), made(torch.int8, size if whole else 0), made(long, size if counted else 0)
    score = made(u.dtype, size if scored else 0)
    unit, first_nan, length = made(long), made(torch.int32), made(torch.int32)
    return Quantized(
        value, alive, counts, score, unit, made(real), made(real), top=made(real), bottom=made(real),
        first_nan=first_nan, length=length,
    )  # fmt: skip


def quantize(u: Tensor, *, counted: bool = True) -> Quantized:
    """The scores u [R, S] (float16, bfloat16, float32 or float64, contiguous) on the grid of each row.

    Without ``counted`` neither ``counts`` nor ``score`` is set.
    """
    rows, size = u.shape
    whole = size <= _ONE_PROGRAM
    block = next_power_of_2(size) if whole else _BLOCK
    n_blocks = cdiv(size, block)

    def made(dtype: torch.dtype) -> Tensor:
        return torch.empty(rows, n_blocks, dtype=dtype, device=u.device)

    real = torch.float64
    found = empty_grid(u, counted=counted, scored=counted)
    extents, blocks, grid = (made(real), made(real), made(torch.int32)), made(torch.int64), (rows, n_blocks)
    if not whole:
        launch(_extents, grid, (u, *extents), (size, n_blocks), BLOCK=block)
    launch(
        _quantize, grid,
        (u, *extents, found.unit, found.step, found.center, found.top, found.bottom, found.first_nan, found.length,
         found.value, found.alive, found.counts, found.score, blocks),
        (size, n_blocks, bits_for(size)), BLOCK=block, PARTS=next_power_of_2(n_blocks),
        WHOLE=whole, COUNTED=counted, num_warps=max(4, min(16, block // 256)),
    )  # fmt: skip
    if counted and not whole:
        launch(_running_counts, grid, (found.alive, blocks, found.counts), (size, n_blocks), BLOCK=block)
    return found
