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

from flexsparse.codegen.kernels.launch import launch

_BLOCK = 1024
# A row of up to so many scores is one program's.
_ONE_PROGRAM = 4096


class Quantized(NamedTuple):
    """R rows of S scores. ``value`` is on the grid; +inf has the row's largest, -inf and NaN have its smallest.

    ``counts``: how many finite scores stand at or before each position, plus 2^32 times how many are +inf.
    ``first_nan``: the position of the row's first NaN, S without one. ``score``: u with -inf for NaN. ``score`` and
    ``counts`` are left as they were allocated where only values are wanted.
    """

    value: Tensor  # [R, S] int64
    alive: Tensor  # [R, S] int8: 1 for a finite score, 2 for +inf, else 0
    counts: Tensor  # [R, S] int64
    score: Tensor  # [R, S] in u's dtype
    unit: Tensor  # [R] int64: a score difference of 1
    step: Tensor  # [R] float64: the score difference of one grid point
    center: Tensor  # [R] float64: the score at grid point 0
    first_nan: Tensor  # [R] int32


@triton.jit
def rounded(x):
    """To the nearest whole number, halves to the even one, as torch.round does."""
    size = tl.abs(x)
    whole = (size + 4503599627370496.0) - 4503599627370496.0  # 2^52: from there on float64 has no fractions
    whole = tl.where(size < 4503599627370496.0, whole, size)
    return tl.where(x < 0, -whole, whole)


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
def _on_grid(u, step, center, top, bottom):
    """Grid values of scores, whether they are finite (1) or +inf (2), and what they add to the counts."""
    infinity = float("inf")
    finite = tl.abs(u) < infinity
    above = u == infinity
    value = rounded((tl.where(finite, u, 0.0) - center) / step).to(tl.int64)
    value = tl.where(finite, value, tl.where(above, top, bottom))
    counted = tl.where(finite, 1, tl.where(above, 4294967296, 0)).to(tl.int64)
    return value, tl.where(finite, 1, tl.where(above, 2, 0)).to(tl.int8), counted


@triton.jit
def _row_grid(
    p_u, p_unit, p_step, p_center, p_nan, p_top, p_bottom, p_value, p_alive, p_counts, p_score, size, bits,
    BLOCK: tl.constexpr, WHOLE: tl.constexpr, COUNTED: tl.constexpr,
):  # fmt: skip
    """The grid of one row: from its largest and smallest finite score; its values too where BLOCK holds the WHOLE."""
    row = tl.program_id(0).to(tl.int64)
    infinity = float("inf")
    highest = tl.full([BLOCK], -infinity, tl.float64)
    lowest = tl.full([BLOCK], infinity, tl.float64)
    nan = tl.full([BLOCK], 2147483647, tl.int32)
    for first in range(0, size, BLOCK):
        at = first + tl.arange(0, BLOCK)
        u = tl.load(p_u + row * size + at, mask=at < size, other=infinity).to(tl.float64)
        finite = tl.abs(u) < infinity
        highest = tl.maximum(highest, tl.where(finite, u, -infinity))
        lowest = tl.minimum(lowest, tl.where(finite, u, infinity))
        nan = tl.minimum(nan, tl.where(u != u, at, 2147483647))
    top, bottom = tl.max(highest, 0), tl.min(lowest, 0)
    some = top > -infinity
    top, bottom = tl.where(some, top, 0.0), tl.where(some, bottom, 0.0)
    unit, step, center = grid_between(top, bottom, bits)
    top, bottom = rounded((top - center) / step).to(tl.int64), rounded((bottom - center) / step).to(tl.int64)
    tl.store(p_unit + row, unit)
    tl.store(p_step + row, step)
    tl.store(p_center + row, center)
    tl.store(p_nan + row, tl.minimum(tl.min(nan, 0), size))
    if WHOLE:
        at = tl.arange(0, BLOCK)
        m_at = at < size
        given = tl.load(p_u + row * size + at, mask=m_at, other=-infinity)
        value, alive, counted = _on_grid(given.to(tl.float64), step, center, top, bottom)
        tl.store(p_value + row * size + at, value, mask=m_at)
        tl.store(p_alive + row * size + at, alive, mask=m_at)
        if COUNTED:
            tl.store(p_counts + row * size + at, tl.cumsum(counted, 0), mask=m_at)
            tl.store(p_score + row * size + at, tl.where(given == given, given, -infinity), mask=m_at)
    else:
        tl.store(p_top + row, top)
        tl.store(p_bottom + row, bottom)


@triton.jit
def _quantize(
    p_u, p_step, p_center, p_top, p_bottom, p_value, p_alive, p_score, p_blocks, size, n_blocks,
    BLOCK: tl.constexpr, COUNTED: tl.constexpr,
):  # fmt: skip
    """Grid values of one block, and how many of its scores are finite and +inf."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = block * BLOCK + tl.arange(0, BLOCK)
    m_at = at < size
    infinity = float("inf")
    given = tl.load(p_u + row * size + at, mask=m_at, other=-infinity)
    value, alive, counted = _on_grid(
        given.to(tl.float64), tl.load(p_step + row), tl.load(p_center + row), tl.load(p_top + row),
        tl.load(p_bottom + row),
    )  # fmt: skip
    tl.store(p_value + row * size + at, value, mask=m_at)
    tl.store(p_alive + row * size + at, alive, mask=m_at)
    if COUNTED:
        tl.store(p_score + row * size + at, tl.where(given == given, given, -infinity), mask=m_at)
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


def quantize(u: Tensor, *, counted: bool = True) -> Quantized:
    """The scores u [R, S] (float16, bfloat16, float32 or float64, contiguous) on the grid of each row.

    Without ``counted`` neither ``counts`` nor ``score`` is set.
    """
    rows, size = u.shape
    n_blocks = triton.cdiv(size, _BLOCK)

    def made(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(rows, *shape, dtype=dtype, device=u.device)

    unit, top, bottom = made(torch.int64), made(torch.int64), made(torch.int64)
    step, center, first_nan = made(torch.float64), made(torch.float64), made(torch.int32)
    value, alive = made(torch.int64, size), made(torch.int8, size)
    counts, score = made(torch.int64, size if counted else 0), made(u.dtype, size if counted else 0)
    whole = size <= _ONE_PROGRAM
    launch(
        _row_grid, (rows,), (u, unit, step, center, first_nan, top, bottom, value, alive, counts, score),
        (size, 60 - max(size, 1).bit_length()), BLOCK=triton.next_power_of_2(size) if whole else 4096, WHOLE=whole,
        COUNTED=counted, num_warps=8,
    )  # fmt: skip
    if not whole:
        blocks, grid = made(torch.int64, n_blocks), (rows, n_blocks)
        launch(
            _quantize, grid, (u, step, center, top, bottom, value, alive, score, blocks), (size, n_blocks),
            BLOCK=_BLOCK, COUNTED=counted,
        )  # fmt: skip
        if counted:
            launch(_running_counts, grid, (alive, blocks, counts), (size, n_blocks), BLOCK=_BLOCK)
    return Quantized(value, alive, counts, score, unit, step, center, first_nan)
