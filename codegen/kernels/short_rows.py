"""Grid, order and ranks of short rows in two launches, as Triton kernels.

A library's sort takes several launches, each of which takes longer than its work on few short rows. Here a program
sorts one block of a row, and each key's rank is how many keys of every block stand before it, by binary searches that
do not wait for one another.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexsparse.codegen.kernels.arithmetic import cdiv, next_power_of_2
from flexsparse.codegen.kernels.events import Ranked, empty_ranks
from flexsparse.codegen.kernels.grid import (
    Quantized,
    bits_for,
    empty_grid,
    extent_of,
    grid_of_row,
    grid_values,
)
from flexsparse.codegen.kernels.launch import launch

# Bits of a position in a row. Two of them stand in a number of 64 bits beside the 32 of a score.
_POSITION = 12
_LONGEST = 1 << _POSITION
_BLOCK, _LANES = 1024, 128


@triton.jit
def _falling(given):
    """Numbers of 32 bits that rise as scores fall; NaN counts as -inf, and -0 as 0."""
    score = tl.where(given == given, given, -float("inf")).to(tl.float32)
    bits = tl.where(score == 0, 0.0, score).to(tl.int32, bitcast=True)
    rising = tl.where(bits < 0, bits ^ 2147483647, bits)
    return 2147483647 - rising.to(tl.int64)


@triton.jit
def _sorted_blocks(
    p_u, p_start, p_unit, p_step, p_center, p_top, p_bottom, p_nan, p_value, p_alive, p_counts, p_sorted, size, bits,
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
        p_unit, p_step, p_center, p_top, p_bottom, p_nan, row, block, top.to(tl.float64), bottom.to(tl.float64), nan,
        size, bits,
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
    key = (_falling(given) << POSITION) | at
    if SEGMENTS:
        start = tl.load(p_start + row * size + at, mask=m_at, other=0)
        key |= (size - 1 - start).to(tl.int64) << (POSITION + 32)
    # What stands beyond the row comes last.
    key = tl.where(m_at, key, 9223372036854775807)
    tl.store(p_sorted + row * tl.num_programs(1) * BLOCK + at, tl.sort(key))


@triton.jit
def _ranks(
    p_sorted, p_value, p_by_place, p_code, p_rank, size, n_blocks,
    BLOCK: tl.constexpr, BITS: tl.constexpr, BLOCKS: tl.constexpr, LANES: tl.constexpr, POSITION: tl.constexpr,
):  # fmt: skip
    """The values and codes of keys by place, and the places by key; BLOCK is 1 << BITS."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * LANES + tl.arange(0, LANES)
    own = tl.load(p_sorted + row * n_blocks * BLOCK + at)
    # Lanes in order search near one another, so one block at a time is one of few lines of memory.
    other = tl.arange(0, BLOCKS)[:, None]
    m_other = (own >= 0)[None, :] & (other < n_blocks)  # [BLOCKS, LANES]
    first = (row * n_blocks + other) * BLOCK
    # How many keys of a block are below the own one, of which no other is the equal.
    before = tl.zeros([BLOCKS, LANES], tl.int32)
    for bit in tl.static_range(BITS):
        step = BLOCK >> (bit + 1)
        there = tl.load(p_sorted + first + before + step - 1, mask=m_other, other=9223372036854775807)
        before += tl.where(there < own[None, :], step, 0)
    there = tl.load(p_sorted + first + before, mask=m_other, other=9223372036854775807)
    before += (there < own[None, :]).to(tl.int32)
    place = tl.sum(before, 0)
    m_at = own < 9223372036854775807
    key = (own & ((1 << POSITION) - 1)).to(tl.int32)
    value = tl.load(p_value + row * size + key, mask=m_at, other=0)
    tl.store(p_by_place + row * size + place, value, mask=m_at)
    tl.store(p_code + row * size + place, 2 * key, mask=m_at)
    tl.store(p_rank + row * size + key, place, mask=m_at)


def takes(u: Tensor) -> bool:
    """Whether rows of scores u [R, S] are short enough, and their scores fit 32 bits."""
    return u.shape[1] <= _LONGEST and u.dtype != torch.float64


def quantized_and_ranked(u: Tensor, bounds: tuple[Tensor, Tensor] | None) -> tuple[Quantized, Ranked]:
    """As ``grid.quantize`` of u [R, S] (contiguous), and as ``events.ranked`` of its order with segments ``bounds``."""
    rows, size = u.shape
    grid = empty_grid(u, counted=True)
    n_blocks = cdiv(size, _BLOCK)
    in_blocks = torch.empty(rows, n_blocks * _BLOCK, dtype=torch.int64, device=u.device)
    launch(
        _sorted_blocks, (rows, n_blocks),
        (u, u if bounds is None else bounds[0], grid.unit, grid.step, grid.center, grid.top, grid.bottom,
         grid.first_nan, grid.value, grid.alive, grid.counts, in_blocks),
        (size, bits_for(size)), SEGMENTS=bounds is not None, ROW=next_power_of_2(n_blocks) * _BLOCK, BLOCK=_BLOCK,
        POSITION=_POSITION, num_warps=8,
    )  # fmt: skip
    keys = empty_ranks(grid.value)
    launch(
        _ranks, (rows, n_blocks * _BLOCK // _LANES),
        (in_blocks, grid.value, keys.value, keys.counted.code, keys.counted.place), (size, n_blocks),
        BLOCK=_BLOCK, BITS=_BLOCK.bit_length() - 1, BLOCKS=next_power_of_2(n_blocks), LANES=_LANES, POSITION=_POSITION,
    )  # fmt: skip
    return grid, keys
