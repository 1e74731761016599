"""Keys by falling score without a library's sort, which takes a launch for every few bits, as Triton kernels.

A program sorts one block of a row; then runs are merged, up to 16 at a time: the place of a key is how many keys of
each run stand before it, by binary searches that do not wait for one another. The keys of a row may be fewer than its
room, and programs beyond them have nothing to do.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexsparse.codegen.kernels.arithmetic import cdiv
from flexsparse.codegen.kernels.events import Ranked, empty_ranks
from flexsparse.codegen.kernels.grid import Quantized, grid_values
from flexsparse.codegen.kernels.launch import launch

# Keys that one program sorts, runs that are merged at a time, in tiles of so many, and lanes of a program that merges.
BLOCK = 1024
_GROUP, _TILE, _LANES = 16, 8, 128
# Bits of a key's number, beside the 32 of its score; a shorter row has some more for its segment.
POSITION, POSITION_IN_SHORT = 24, 12
LONGEST_SHORT = 1 << POSITION_IN_SHORT


@triton.jit
def falling(given):
    """Numbers of 32 bits that rise as scores fall; NaN counts as -inf, and -0 as 0."""
    score = tl.where(given == given, given, -float("inf")).to(tl.float32)
    bits = tl.where(score == 0, 0.0, score).to(tl.int32, bitcast=True)
    rising = tl.where(bits < 0, bits ^ 2147483647, bits)
    return 2147483647 - rising.to(tl.int64)


@triton.jit
def _score_of(number):
    """The score of which ``falling`` made a number."""
    rising = (2147483647 - number).to(tl.int32)
    return tl.where(rising < 0, rising ^ 2147483647, rising).to(tl.float32, bitcast=True)


@triton.jit
def _sorted_runs(p_score, p_length, p_sorted, size, BLOCK: tl.constexpr, POSITION: tl.constexpr):
    """The keys of one block of a row in their order."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    length = tl.load(p_length + row)
    if block * BLOCK < length:
        at = block * BLOCK + tl.arange(0, BLOCK)
        given = tl.load(p_score + row * size + at, mask=at < length, other=0.0)
        # What stands beyond the row comes last.
        key = tl.where(at < length, (falling(given) << POSITION) | at, 9223372036854775807)
        tl.store(p_sorted + row * tl.num_programs(1) * BLOCK + at, tl.sort(key))


@triton.jit
def _merged_runs(
    p_sorted, p_merged, p_length, p_step, p_center, p_top, p_bottom, p_by_place, p_code, p_rank, size, room, least,
    RUN: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr,
    LANES: tl.constexpr, POSITION: tl.constexpr,
):  # fmt: skip
    """GROUP runs of RUN = 1 << BITS keys become one. Rows that are one then: their values, codes and ranks.

    Rows of ``least`` keys or fewer were one before.
    """
    row, begin = tl.program_id(0).to(tl.int64), tl.program_id(1) * LANES
    length = tl.load(p_length + row)
    if (begin < length) & (length > least):
        at = begin + tl.arange(0, LANES)
        m_at = at < length
        keys = p_sorted + row * room
        own = tl.load(keys + at, mask=m_at, other=9223372036854775807)
        base = begin // (RUN * GROUP) * (RUN * GROUP)
        runs = tl.minimum((length - base + RUN - 1) // RUN, GROUP)
        place = tl.zeros([LANES], tl.int32) + base
        # Lanes in order search near one another, so a run at a time is one of few lines of memory.
        for first in range(0, runs, TILE):
            start = base + (first + tl.arange(0, TILE)) * RUN
            start = tl.where(first + tl.arange(0, TILE) < runs, start, length)
            there = tl.minimum(length - start, RUN)[:, None]  # keys of each run
            # How many of them are below the own one, of which no other is the equal.
            before = tl.zeros([TILE, LANES], tl.int32)
            for bit in tl.static_range(BITS):
                step = RUN >> (bit + 1)
                middle = before + (step - 1)
                other = tl.load(keys + start[:, None] + middle, mask=middle < there, other=9223372036854775807)
                before += tl.where(other < own[None, :], step, 0)
            other = tl.load(keys + start[:, None] + before, mask=before < there, other=9223372036854775807)
            before += (other < own[None, :]).to(tl.int32)
            place += tl.sum(before, 0)
        if length <= RUN * GROUP:
            key = (own & ((1 << POSITION) - 1)).to(tl.int32)
            score = _score_of((own >> POSITION) & 4294967295)
            step, center = tl.load(p_step + row), tl.load(p_center + row)
            top, bottom = tl.load(p_top + row), tl.load(p_bottom + row)
            # From the score, as its value by key would have to be looked up.
            value, _, _ = grid_values(score, step, center, top, bottom)
            tl.store(p_by_place + row * size + place, value, mask=m_at)
            tl.store(p_code + row * size + place, 2 * key, mask=m_at)
            tl.store(p_rank + row * size + key, place, mask=m_at)
        else:
            tl.store(p_merged + row * room + place, own, mask=m_at)


def merged_runs(sorted_: Tensor, grid: Quantized, position: int) -> Ranked:
    """Ranks of keys that are sorted in blocks, int64 [R, a multiple of BLOCK], their numbers in the lowest bits."""
    rows, size = grid.value.shape
    found = empty_ranks(grid)
    room, run = sorted_.shape[1], BLOCK
    merged = sorted_
    while True:
        last = run * _GROUP >= size
        if not last:
            merged = torch.empty_like(sorted_)
        launch(
            _merged_runs, (rows, cdiv(size, _LANES)),
            (sorted_, merged, grid.length, grid.step, grid.center, grid.top, grid.bottom, found.value,
             found.counted.code, found.counted.place), (size, room, 0 if run == BLOCK else run),
            RUN=run, BITS=run.bit_length() - 1, GROUP=_GROUP, TILE=_TILE, LANES=_LANES,
            POSITION=position,
        )  # fmt: skip
        if last:
            return found
        sorted_, run = merged, run * _GROUP


def ranked_by_merging(grid: Quantized) -> Ranked:
    """The order of the scores of ``grid``, which fit float32."""
    rows, size = grid.value.shape
    blocks = cdiv(size, BLOCK)
    in_blocks = torch.empty(rows, blocks * BLOCK, dtype=torch.int64, device=grid.value.device)
    launch(
        _sorted_runs, (rows, blocks), (grid.score, grid.length, in_blocks), (size,), BLOCK=BLOCK, POSITION=POSITION,
        num_warps=8,
    )  # fmt: skip
    return merged_runs(in_blocks, grid, POSITION)
