"""Grid, order and ranks of short rows in two launches, as Triton kernels.

A program reads its whole row for the grid, and sorts one block of it; then the blocks are merged as in ``sorting``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexsparse.codegen.kernels.arithmetic import cdiv, next_power_of_2
from flexsparse.codegen.kernels.events import Ranked
from flexsparse.codegen.kernels.grid import (
    Quantized,
    bits_for,
    empty_grid,
    extent_of,
    grid_of_row,
    grid_values,
)
from flexsparse.codegen.kernels.launch import launch
from flexsparse.codegen.kernels.sorting import BLOCK, LONGEST_SHORT, POSITION_IN_SHORT, falling, merged_runs


@triton.jit
def _sorted_blocks(
    p_u, p_start, p_unit, p_step, p_center, p_top, p_bottom, p_nan, p_length, p_value, p_alive, p_counts, p_sorted,
    size, bits,
    SEGMENTS: tl.constexpr, ROW: tl.constexpr, BLOCK: tl.constexpr, POSITION: tl.constexpr,
):  # fmt: skip
    """The grid of a row; of one block of it the values, the running counts, and the keys in their order.

    A key is one number: later segments before earlier ones, then falling scores, then positions.
    """
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    infinity = float("inf")
    every = tl.arange(0, ROW)
    whole = tl.load(p_u + row * size + every, mask=every < size, other=-infinity).to(tl.float32)
    top, bottom, nan = extent_of(whole, every)
    step, center, top, bottom = grid_of_row(
        p_unit, p_step, p_center, p_top, p_bottom, p_nan, p_length, row, block, top.to(tl.float64),
        bottom.to(tl.float64), nan, size, bits,
    )  # fmt: skip
    earlier = every < block * BLOCK
    before = tl.sum((earlier & (tl.abs(whole) < infinity)).to(tl.int32), 0).to(tl.int64)
    before += tl.sum((earlier & (whole == infinity)).to(tl.int32), 0).to(tl.int64) << 32
    at = block * BLOCK + tl.arange(0, BLOCK)
    m_at = at < size
    given = tl.load(p_u + row * size + at, mask=m_at, other=-infinity)
    value, alive, counted = grid_values(given, step, center, top, bottom)
    tl.store(p_value + row * size + at, value, mask=m_at)
    tl.store(p_alive + row * size + at, alive, mask=m_at)
    tl.store(p_counts + row * size + at, before + tl.cumsum(counted, 0), mask=m_at)
    key = (falling(given) << POSITION) | at
    if SEGMENTS:
        start = tl.load(p_start + row * size + at, mask=m_at, other=0)
        key |= (size - 1 - start).to(tl.int64) << (POSITION + 32)
    # What stands beyond the row comes last.
    key = tl.where(m_at, key, 9223372036854775807)
    tl.store(p_sorted + row * tl.num_programs(1) * BLOCK + at, tl.sort(key))


def takes(u: Tensor) -> bool:
    """Whether rows of scores u [R, S] are short enough, and their scores fit 32 bits."""
    return u.shape[1] <= LONGEST_SHORT and u.dtype != torch.float64


def quantized_and_ranked(u: Tensor, bounds: tuple[Tensor, Tensor] | None) -> tuple[Quantized, Ranked]:
    """As ``grid.quantize`` of u [R, S] (contiguous), and as ``events.ranked`` of its order with segments ``bounds``."""
    rows, size = u.shape
    grid = empty_grid(u, counted=True)
    n_blocks = cdiv(size, BLOCK)
    in_blocks = torch.empty(rows, n_blocks * BLOCK, dtype=torch.int64, device=u.device)
    launch(
        _sorted_blocks, (rows, n_blocks),
        (u, u if bounds is None else bounds[0], grid.unit, grid.step, grid.center, grid.top, grid.bottom,
         grid.first_nan, grid.length, grid.value, grid.alive, grid.counts, in_blocks),
        (size, bits_for(size)), SEGMENTS=bounds is not None, ROW=next_power_of_2(n_blocks) * BLOCK, BLOCK=BLOCK,
        POSITION=POSITION_IN_SHORT, num_warps=8,
    )  # fmt: skip
    return grid, merged_runs(in_blocks, grid, POSITION_IN_SHORT)
