"""The keys of long rows that may ever count, as Triton kernels. The rest of a selection's work is with these alone.

A key whose score is not above the threshold of the keys before it never gets a part, for thresholds only rise; and k
of these keys are better, so it is not among the k best either. So a bound from below on the thresholds is enough to
leave keys out, and leaves every result as it is. The bound here: with f(x) the sum of the parts min(max(score - x, 0),
1) over the finite scores of a prefix, f(x) > k means that the threshold of the prefix, and of those that go on from
there, is above x. Every block of keys adds its share to f at a few levels, which are taken from a sample of the row;
the highest level at which the blocks before one come to k bounds the threshold of its keys.

Of 65,536 normal scores some 7,300 remain for k = 512, for the number of keys with a part at their birth grows with the
logarithm of the length. Where scores rise as fast as the sets are renewed, all keys remain.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexsparse.codegen.kernels.arithmetic import cdiv, next_power_of_2
from flexsparse.codegen.kernels.grid import Quantized, bits_for, empty_grid, grid_of_row, grid_values
from flexsparse.codegen.kernels.launch import launch

# Keys at a time, blocks of a row at most, scores that the levels are taken from, and how many levels.
_BLOCK, _MOST_BLOCKS, _SAMPLES, _LEVELS = 1024, 256, 64, 8
# f is summed in float32, from scores that are not on the grid: shares of k for both, rounded up by a multiple.
_SUMMED, _ON_GRID = 1.001, 0.0005


class Kept(NamedTuple):
    """Which keys remain of R rows of S: those of a row stand in order at the beginning of its ``time``."""

    time: Tensor  # [R, S] int32: the position of each key that remains
    upto: Tensor  # [R, S] int32, by position: how many keys up to and with that one remain


class Left(NamedTuple):
    """What a position has that does not remain, and how many candidates a query has; as wanted."""

    candidates: Tensor | None  # [R, S] int32, by query
    lifetimes: tuple[Tensor, Tensor, Tensor] | None  # birth, death and slot, [R, S] int32 each


@triton.jit
def _levels_of(p_u, row, size, SAMPLES: tl.constexpr, LEVELS: tl.constexpr):
    """Levels from the mean of a row's sample up to its largest score."""
    at = tl.arange(0, SAMPLES) * tl.maximum(size // SAMPLES, 1)
    given = tl.load(p_u + row * size + at, mask=at < size, other=-float("inf")).to(tl.float32)
    finite = tl.abs(given) < float("inf")
    low = tl.sum(tl.where(finite, given, 0.0), 0) / tl.maximum(tl.sum(finite.to(tl.int32), 0), 1).to(tl.float32)
    top = tl.maximum(tl.max(tl.where(finite, given, -float("inf")), 0), low)
    return low + (top - low) * (tl.arange(0, LEVELS).to(tl.float32) / (LEVELS - 1))


@triton.jit
def _exceeding(
    p_u, p_level, p_exceeding, p_highest, p_lowest, p_nans, p_counted, size, n_blocks, block,
    BLOCK: tl.constexpr, SAMPLES: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """What one block adds to f at every level; its extent; how many scores are finite and how many +inf."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    infinity = float("inf")
    number = tl.arange(0, LEVELS)
    level = _levels_of(p_u, row, size, SAMPLES, LEVELS)
    if part == 0:
        tl.store(p_level + row * LEVELS + number, level)
    # An entry of its own for every key until the end, so that lanes meet once.
    reached = tl.zeros([LEVELS, BLOCK], tl.float32)
    highest = tl.zeros([BLOCK], tl.float32) - infinity
    lowest = tl.zeros([BLOCK], tl.float32) + infinity
    finites = tl.zeros([BLOCK], tl.int32)
    start, stop = part * block, tl.minimum((part + 1) * block, size)
    for first in range(start, stop, BLOCK):
        at = first + tl.arange(0, BLOCK)
        u = tl.load(p_u + row * size + at, mask=at < size, other=-infinity).to(tl.float32)
        finite = tl.abs(u) < infinity
        some = tl.where(finite, u, -infinity)
        reached += tl.minimum(tl.maximum(some[None, :] - level[:, None], 0.0), 1.0)
        highest = tl.maximum(highest, some)
        lowest = tl.minimum(lowest, tl.where(finite, u, infinity))
        finites += finite.to(tl.int32)
    n_finite = tl.sum(finites, 0)
    nan = tl.full([], 2147483647, tl.int32)
    counted = n_finite.to(tl.int64)
    if n_finite < stop - start:
        # Once more, for what few blocks have.
        nans = tl.zeros([BLOCK], tl.int32) + 2147483647
        for first in range(start, stop, BLOCK):
            at = first + tl.arange(0, BLOCK)
            u = tl.load(p_u + row * size + at, mask=at < size, other=0.0).to(tl.float32)
            nans = tl.minimum(nans, tl.where(u != u, at, 2147483647))
            counted += tl.sum((u == infinity).to(tl.int32), 0).to(tl.int64) << 32
        nan = tl.min(nans, 0)
    entry = row * n_blocks + part
    tl.store(p_exceeding + entry * LEVELS + number, tl.sum(reached, 1))
    tl.store(p_highest + entry, tl.max(highest, 0).to(tl.float64))
    tl.store(p_lowest + entry, tl.min(lowest, 0).to(tl.float64))
    tl.store(p_nans + entry, nan)
    tl.store(p_counted + entry, counted)


@triton.jit
def _bounded(
    p_u, p_level, p_exceeding, p_highest, p_lowest, p_nans, p_unit, p_step, p_center, p_top, p_bottom, p_nan, p_length,
    p_bound, p_kept, size, n_blocks, block, bits, enough, coarsest,
    BLOCK: tl.constexpr, PARTS: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """The grid of a row; the bound for one block's keys, and how many of them remain."""
    row, own = tl.program_id(0).to(tl.int64), tl.program_id(1)
    infinity = float("inf")
    part, number = tl.arange(0, PARTS), tl.arange(0, LEVELS)
    entry = row * n_blocks + part
    m_part = part < n_blocks
    highest = tl.max(tl.load(p_highest + entry, mask=m_part, other=-infinity), 0)
    lowest = tl.min(tl.load(p_lowest + entry, mask=m_part, other=infinity), 0)
    nan = tl.min(tl.load(p_nans + entry, mask=m_part, other=2147483647), 0)
    step, _, _, _ = grid_of_row(
        p_unit, p_step, p_center, p_top, p_bottom, p_nan, p_length, row, own, highest, lowest, nan, size, bits
    )
    before = (part < own)[:, None]
    reached = tl.sum(tl.load(p_exceeding + entry[:, None] * LEVELS + number[None, :], mask=before, other=0.0), 0)
    level = tl.load(p_level + row * LEVELS + number)
    # On a coarse grid f is another one.
    enough = tl.where(step <= coarsest, enough, infinity)
    bound = tl.max(tl.where(reached >= enough, level, -infinity), 0)
    kept = tl.zeros([BLOCK], tl.int32)
    for first in range(own * block, tl.minimum((own + 1) * block, size), BLOCK):
        at = first + tl.arange(0, BLOCK)
        u = tl.load(p_u + row * size + at, mask=at < size, other=-infinity).to(tl.float32)
        kept += (u > bound).to(tl.int32)
    tl.store(p_bound + row * n_blocks + own, bound)
    tl.store(p_kept + row * n_blocks + own, tl.sum(kept, 0))


@triton.jit
def _compacted(
    p_u, p_bound, p_kept, p_counted, p_step, p_center, p_top, p_bottom, p_length, p_time, p_upto, p_score, p_value,
    p_counts, p_candidates, p_birth, p_death, p_slot, size, n_blocks, block, after,
    CANDIDATES: tl.constexpr, LIFETIMES: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """One block's keys that remain, behind those of the blocks before it."""
    row, own = tl.program_id(0).to(tl.int64), tl.program_id(1)
    infinity = float("inf")
    part = tl.arange(0, PARTS)
    m_part = part < n_blocks
    kept_each = tl.load(p_kept + row * n_blocks + part, mask=m_part, other=0)
    counted_each = tl.load(p_counted + row * n_blocks + part, mask=part < own, other=0)
    if own == 0:
        tl.store(p_length + row, tl.sum(kept_each, 0))
    # Of the blocks before: how many remain, how many of these are +inf, and how many candidates there are.
    n_kept = tl.sum(tl.where(part < own, kept_each, 0), 0)
    n_counted = tl.sum(counted_each, 0)
    n_infinite = (n_counted >> 32).to(tl.int32)
    n_alive = n_infinite + (n_counted & 4294967295).to(tl.int32)
    bound = tl.load(p_bound + row * n_blocks + own)
    step, center = tl.load(p_step + row), tl.load(p_center + row)
    top, bottom = tl.load(p_top + row), tl.load(p_bottom + row)
    start, stop = own * block, tl.minimum((own + 1) * block, size)
    all_finite = tl.load(p_counted + row * n_blocks + own) == stop - start
    for first in range(start, stop, BLOCK):
        inside = tl.arange(0, BLOCK)
        at = first + inside
        m_at = at < size
        u = tl.load(p_u + row * size + at, mask=m_at, other=-infinity).to(tl.float32)
        kept = u > bound
        index = n_kept + tl.cumsum(kept.to(tl.int32), 0)
        infinities = tl.zeros_like(at) + n_infinite
        candidates = n_alive + inside + 1
        n_kept += tl.sum(kept.to(tl.int32), 0)
        if all_finite:
            n_alive += BLOCK
        else:
            infinite = (u == infinity).to(tl.int32)
            alive = (tl.abs(u) < infinity).to(tl.int32) + infinite
            infinities += tl.cumsum(infinite, 0)
            candidates = n_alive + tl.cumsum(alive, 0)
            n_infinite += tl.sum(infinite, 0)
            n_alive += tl.sum(alive, 0)
        here = row * size + at
        tl.store(p_upto + here, index, mask=m_at)
        target = row * size + index - 1
        value, _, _ = grid_values(u, step, center, top, bottom)
        tl.store(p_time + target, at, mask=kept)
        tl.store(p_score + target, u, mask=kept)
        tl.store(p_value + target, value, mask=kept)
        counts = (infinities.to(tl.int64) << 32) + (index - infinities).to(tl.int64)
        tl.store(p_counts + target, counts, mask=kept)
        if CANDIDATES:
            tl.store(p_candidates + here + after, candidates, mask=at < size - after)
            tl.store(p_candidates + here, tl.zeros_like(at), mask=m_at & (at < after))
        if LIFETIMES:
            gone = m_at & ~kept
            birth = tl.minimum(at + after, size)
            tl.store(p_birth + here, birth, mask=gone)
            tl.store(p_death + here, birth, mask=gone)
            tl.store(p_slot + here, tl.full([BLOCK], -1, tl.int32), mask=gone)


def takes(u: Tensor) -> bool:
    """Whether the scores u [R, S] fit float32, in which bounds are found."""
    return u.dtype != torch.float64


def pruned(u: Tensor, k: int, after: int, left: Left) -> tuple[Quantized, Kept]:
    """The keys of u [R, S] (contiguous) that remain, by their own numbers, on the grid of their whole rows.

    Of the others, and of the prefixes, what is wanted is written into ``left``.
    """
    rows, size = u.shape
    block = _BLOCK * next_power_of_2(cdiv(size, _BLOCK * _MOST_BLOCKS))
    n_blocks = cdiv(size, block)

    def made(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(rows, *shape, dtype=dtype, device=u.device)

    real = torch.float64
    found = empty_grid(u, counted=True, scored=True, whole=False)
    kept = Kept(made(torch.int32, size), made(torch.int32, size))
    level, exceeding = made(torch.float32, _LEVELS), made(torch.float32, n_blocks, _LEVELS)
    extents = made(real, n_blocks), made(real, n_blocks), made(torch.int32, n_blocks)
    counted = made(torch.int64, n_blocks)
    bound, n_kept = made(torch.float32, n_blocks), made(torch.int32, n_blocks)
    grid = (found.unit, found.step, found.center, found.top, found.bottom)
    shape, parts = (rows, n_blocks), next_power_of_2(n_blocks)
    launch(
        _exceeding, shape, (u, level, exceeding, *extents, counted), (size, n_blocks, block),
        BLOCK=_BLOCK, SAMPLES=_SAMPLES, LEVELS=_LEVELS,
    )  # fmt: skip
    launch(
        _bounded, shape, (u, level, exceeding, *extents, *grid, found.first_nan, found.length, bound, n_kept),
        (size, n_blocks, block, bits_for(size), _SUMMED * k, _ON_GRID * k / size),
        BLOCK=_BLOCK, PARTS=parts, LEVELS=_LEVELS,
    )  # fmt: skip
    candidates = n_kept if left.candidates is None else left.candidates
    lifetimes = (n_kept, n_kept, n_kept) if left.lifetimes is None else left.lifetimes
    launch(
        _compacted, shape,
        (u, bound, n_kept, counted, *grid[1:], found.length, kept.time, kept.upto, found.score, found.value,
         found.counts, candidates, *lifetimes),
        (size, n_blocks, block, after), CANDIDATES=left.candidates is not None, LIFETIMES=left.lifetimes is not None,
        BLOCK=_BLOCK, PARTS=parts,
    )  # fmt: skip
    return found, kept
