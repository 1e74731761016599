"""Keys by falling score without a library's sort, which takes a launch for every few bits, as Triton kernels.

A program sorts one block of a row; then pairs of runs are merged until a row is one. Every tile of a merged run is a
program's: it looks up where in both runs its own keys begin, takes the lower halves of what follows there, which
together rise and then fall, and sorts these by exchanges at falling distances. The keys of a row may be fewer than its
room: programs take tiles until there are none, and rows that are one already are left alone.
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

# Keys that one program sorts; keys of a tile that is merged, its warps, and places of a run that are probed at a time.
BLOCK = 1024
_TILE, _WARPS, _PROBES = 512, 1, 64
# So few keys are merged in smaller tiles, as nothing else would fill a device.
_FEW, _SMALL_TILE = 1 << 18, 128
# About how many programs a launch has: those of rows shorter than their room have nothing to do.
_PROGRAMS = 1 << 12
# Bits of a key's number, beside the 32 of its score; a shorter row has some more for its segment.
POSITION, POSITION_IN_SHORT = 24, 12
LONGEST_SHORT = 1 << POSITION_IN_SHORT


@triton.jit
def falling(given):
    """Numbers of 32 bits that rise as scores fall; NaN counts as -inf, and -0 as 0."""
    # Triton 3.1 compares no bfloat16.
    score = given.to(tl.float32)
    score = tl.where(score == score, score, -float("inf"))
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
def _split(first, second, n_first, n_second, taken, PROBES: tl.constexpr):
    """How many of the ``taken`` lowest keys of two runs at ``first`` and ``second`` are of the first."""
    low, high = tl.maximum(taken - n_second, 0), tl.minimum(taken, n_first)
    probe = tl.arange(0, PROBES)
    while low < high:
        stride = (high - low + PROBES - 1) // PROBES
        index = low + (probe + 1) * stride - 1
        m_probe = index < high
        one = tl.load(first + index, mask=m_probe, other=0)
        other = tl.load(second + (taken - 1 - index), mask=m_probe, other=0)
        low += stride * tl.sum((m_probe & (one < other)).to(tl.int32), 0)
        high = tl.minimum(high, low + stride - 1)
    return low


@triton.jit
def _rising(x, BITS: tl.constexpr):
    """Keys [1 << BITS] that rise and then fall, or fall and then rise, sorted."""
    left = (tl.arange(0, 2) == 0)[None, :, None]
    for step in tl.static_range(BITS):
        pair = tl.reshape(x, [1 << step, 2, 1 << (BITS - 1 - step)])
        # What the sum leaves is the other one, whatever it overflows.
        other = tl.sum(pair, 1)[:, None, :] - pair
        x = tl.reshape(tl.where(left, tl.minimum(pair, other), tl.maximum(pair, other)), [1 << BITS])
    return x


@triton.jit
def _merged_pairs(
    p_sorted, p_merged, p_length, p_step, p_center, p_top, p_bottom, p_by_place, p_code, p_rank, size, room, run, least,
    TILE: tl.constexpr, BITS: tl.constexpr, PROBES: tl.constexpr, POSITION: tl.constexpr,
):  # fmt: skip
    """Two runs of ``run`` keys become one, tile by tile. Rows that are one then: their values, codes and ranks.

    Rows of ``least`` keys or fewer were one before.
    """
    row = tl.program_id(0).to(tl.int64)
    length = tl.load(p_length + row)
    keys = p_sorted + row * room
    begin = tl.where(length > least, tl.program_id(1) * TILE, length)
    inside = tl.arange(0, TILE)
    while begin < length:
        base = begin // (2 * run) * (2 * run)
        n_first = tl.minimum(length - base, run)
        n_second = tl.minimum(tl.maximum(length - base - run, 0), run)
        taken = begin - base
        first, second = keys + base, keys + base + run
        of_first = _split(first, second, n_first, n_second, taken, PROBES)
        index = of_first + inside
        one = tl.load(first + index, mask=index < n_first, other=9223372036854775807)
        index = taken - of_first + (TILE - 1 - inside)
        other = tl.load(second + index, mask=index < n_second, other=9223372036854775807)
        own = _rising(tl.minimum(one, other), BITS)
        place = begin + inside
        m_place = place < length
        if length <= 2 * run:
            key = (own & ((1 << POSITION) - 1)).to(tl.int32)
            score = _score_of((own >> POSITION) & 4294967295)
            step, center = tl.load(p_step + row), tl.load(p_center + row)
            top, bottom = tl.load(p_top + row), tl.load(p_bottom + row)
            # From the score, as its value by key would have to be looked up.
            value, _, _ = grid_values(score, step, center, top, bottom)
            tl.store(p_by_place + row * size + place, value, mask=m_place)
            tl.store(p_code + row * size + place, 2 * key, mask=m_place)
            tl.store(p_rank + row * size + key, place, mask=m_place)
        else:
            tl.store(p_merged + row * room + place, own, mask=m_place)
        begin += tl.num_programs(1) * TILE


def merged_runs(sorted_: Tensor, grid: Quantized, position: int) -> Ranked:
    """Ranks of keys that are sorted in blocks, int64 [R, a multiple of BLOCK], their numbers in the lowest bits."""
    rows, size = grid.value.shape
    found = empty_ranks(grid)
    room, run = sorted_.shape[1], BLOCK
    tile = _TILE if rows * size > _FEW else min(_TILE, _SMALL_TILE)
    merged = torch.empty_like(sorted_) if 2 * run < size else sorted_
    while True:
        launch(
            _merged_pairs, (rows, min(cdiv(size, tile), cdiv(_PROGRAMS, rows))),
            (sorted_, merged, grid.length, grid.step, grid.center, grid.top, grid.bottom, found.value,
             found.counted.code, found.counted.place), (size, room, run, 0 if run == BLOCK else run),
            TILE=tile, BITS=tile.bit_length() - 1, PROBES=_PROBES, POSITION=position, num_warps=_WARPS,
        )  # fmt: skip
        if 2 * run >= size:
            return found
        sorted_, merged, run = merged, sorted_, 2 * run


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
