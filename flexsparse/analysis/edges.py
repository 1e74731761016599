"""Rows of keys to sets of tiles, and a proof that most tiles in between are PARTIAL.

What the first and the last query of a tile see is exact where the mask could be solved. A tile in which one of them
sees a key, and one of them misses a key, is PARTIAL; no further look at it is needed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flexsparse.analysis.intervals import Intervals, normal
from flexsparse.analysis.region import Bounds

# The ranges of queries for each row of tiles, in the order of ``query_ranges``.
WHOLE, FIRST, LAST = 0, 1, 2


@dataclass(frozen=True)
class TileSets:
    """Tiles of each row [B, H, R, M]: FULL for certain, PARTIAL for certain, and those that are not known yet.

    Tiles in none of them are EMPTY. ``unknown`` is None where there are none.
    """

    full: Intervals
    partial: Intervals
    unknown: Intervals | None


def query_ranges(q_len: int, block: int, offset: int, device: torch.device) -> Bounds:
    """All queries, the first and the last query of each row of tiles, [1, 1, 3 R]."""
    first = torch.arange(offset, offset + q_len, block, device=device)
    last = (first + (block - 1)).clamp(max=offset + q_len - 1)
    low, high = torch.cat((first, first, last)), torch.cat((last, first, last))
    return Bounds(low.reshape(1, 1, -1), high.reshape(1, 1, -1))


def tile_sets(keys: Intervals, count: tuple[int, int, int], q_len: int, kv_len: int, block: int) -> TileSets:
    """The sets of tiles for rows [2, B, H, 3 R, M] over ``query_ranges``; ``count`` is (B, H, R)."""
    shape = (2, count[0], count[1], 3 * count[2], keys.slots)
    split = (2, count[0], count[1], 3, count[2], keys.slots)
    keys = keys.canonical()
    low, high = (end.expand(shape).reshape(split) for end in (keys.low, keys.high))
    columns = -(-kv_len // block)
    # A tile is touched where a key of it is in the set, and covered where all its keys are.
    touched = Intervals(_tile(low, block), _tile(high, block), columns)
    covered = Intervals(_tile(low + (block - 1), block), _tile(high + 1, block) - 1, columns)
    if q_len % block:
        # Tiles that hang over the end of the queries or keys are never FULL.
        covered.high[..., -1, :] = -1
    if keys.slots == 1:
        sets, proved = _single_spans(touched, covered)
        if proved:
            return sets
    return _general(touched, covered)


def _tile(key: Tensor, block: int) -> Tensor:
    """The tile of each key; a division of whole numbers takes a CPU ten times as long as a shift."""
    power = block.bit_length() - 1
    return key >> power if block == 1 << power else key // block


def _part(x: Intervals, side: int, queries: int) -> Intervals:
    """Of [2, B, H, 3, R, M] the rows [B, H, R, M] of one side and one range of queries."""
    return Intervals(x.low[side, :, :, queries], x.high[side, :, :, queries], x.size)


def _single_spans(touched: Intervals, covered: Intervals) -> tuple[TileSets, bool]:
    """One span of tiles a row: the sets, and whether every tile between touched and full is PARTIAL for certain."""
    some, full = _part(touched, 0, WHOLE), _part(covered, 1, WHOLE)
    first, last = (_part(touched, 1, queries) for queries in (FIRST, LAST))
    low, high = torch.minimum(first.low, last.low), torch.maximum(first.high, last.high)
    # The spans of first and last have no gap between them, or one of them is empty and ends at -1.
    least_high = torch.minimum(first.high, last.high)
    joined = (torch.maximum(first.low, last.low) <= least_high + 1) | (least_high < 0)
    seen = (some.low > some.high) | (joined & (low == some.low) & (high == some.high))
    both = _part(covered, 0, FIRST) & _part(covered, 0, LAST)
    hidden = (both.low > both.high) | ((both.low == full.low) & (both.high == full.high))
    proved = bool((seen & hidden).all())
    # Where no tile is full the cut may lie anywhere. Behind the full tiles of earlier rows, the ends of both spans
    # rise from row to row for documents as well, and the other direction is found by counting.
    none = full.low > full.high
    passed = torch.cummax((full.high + 1).masked_fill(none, 0), -2).values
    cut = torch.minimum(torch.maximum(passed, some.low), some.high + 1)
    before, behind = torch.where(none, cut, full.low), torch.where(none, cut, full.high + 1)
    low, high = torch.cat((some.low, behind), -1), torch.cat((before - 1, some.high), -1)
    return TileSets(full, Intervals(low, high, some.size), None), proved


def _general(touched: Intervals, covered: Intervals) -> TileSets:
    def sets(x: Intervals, side: int, queries: int) -> Intervals:
        part = _part(x, side, queries)
        return normal(part.low, part.high, x.size).canonical()

    full = sets(covered, 1, WHOLE)
    between = sets(touched, 0, WHOLE) & ~full
    seen = sets(touched, 1, FIRST) | sets(touched, 1, LAST)
    both = sets(covered, 0, FIRST) & sets(covered, 0, LAST)
    proved = seen & ~both
    unknown = between & ~proved
    if not bool((unknown.low <= unknown.high).any()):
        return TileSets(full, between, None)
    return TileSets(full, between & proved, unknown)


def ragged(row: Tensor, column: Tensor, q_len: int, kv_len: int, block: int) -> Tensor:
    """Which tiles hang over the end of the queries or keys."""
    return ((row + 1) * block > q_len) | ((column + 1) * block > kv_len)
