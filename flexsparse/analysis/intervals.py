"""Sets of integers as a few disjoint, sorted intervals, for whole arrays of rows at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Intersections of more pairs of slots than this go through the complements, whose slots add up instead.
_PAIRS = 64
# Sets below this size are int32, with room for a tile more.
_NARROW = 1 << 30


@dataclass(frozen=True)
class Intervals:
    """For each row the union of ``[low, high]`` over the last dimension; low > high is an empty slot.

    low, high [..., M] of ``dtype_for(size)``, apart from each other; with more than one slot they are sorted, and
    empty slots stand last with low = size, high = -1. A single slot is empty wherever low > high. ``size`` bounds the
    members: 0 <= x < size.
    """

    low: Tensor
    high: Tensor
    size: int

    def __and__(self, other: Intervals) -> Intervals:
        if self.slots == other.slots == 1:
            return Intervals(torch.maximum(self.low, other.low), torch.minimum(self.high, other.high), self.size)
        if self.slots * other.slots > _PAIRS:
            return ~union([~self, ~other])
        low = torch.maximum(self.low.unsqueeze(-1), other.low.unsqueeze(-2)).flatten(-2)
        high = torch.minimum(self.high.unsqueeze(-1), other.high.unsqueeze(-2)).flatten(-2)
        return normal(low, high, self.size, apart=True)

    def __or__(self, other: Intervals) -> Intervals:
        return union([self, other])

    def __invert__(self) -> Intervals:
        inside = self.canonical()
        edge = torch.zeros_like(inside.low[..., :1])
        low = torch.cat((edge, inside.high + 1), -1)
        high = torch.cat((inside.low - 1, edge + self.size - 1), -1)
        # Empty slots have high = -1 and low = size: their gaps repeat the last one, and merging makes them one.
        low = torch.cummax(low, -1).values
        return normal(low, high.clamp(max=self.size - 1), self.size)

    @property
    def slots(self) -> int:
        return self.low.shape[-1]

    def canonical(self) -> Intervals:
        """The same with low = size, high = -1 in a single slot that is empty; several slots are so already."""
        if self.slots > 1:
            return self
        empty = self.low > self.high
        return Intervals(self.low.masked_fill(empty, self.size), self.high.masked_fill(empty, -1), self.size)

    def to(self, device: torch.device) -> Intervals:
        """The same on another device, in one copy."""
        if self.low.device == device:
            return self
        low, high = torch.stack((self.low, self.high)).to(device).unbind(0)
        return Intervals(low, high, self.size)


def union(sets: list[Intervals]) -> Intervals:
    """What lies in any of the sets, sorted once for all of them."""
    shape = torch.broadcast_shapes(*(x.low.shape[:-1] for x in sets))
    low = torch.cat([x.low.expand(*shape, -1) for x in sets], -1)
    high = torch.cat([x.high.expand(*shape, -1) for x in sets], -1)
    return normal(low, high, sets[0].size)


def normal(low: Tensor, high: Tensor, size: int, *, apart: bool = False) -> Intervals:
    """Clip to [0, size), sort, merge what touches, and drop slots that are empty in every row.

    ``apart`` says that no two intervals of a row overlap, and that those which touch need not be made one.
    """
    low, high = low.clamp(min=0), high.clamp(max=size - 1)
    if low.shape[-1] == 1:
        return Intervals(low, high, size)
    empty = low > high
    low, high = low.masked_fill(empty, size), high.masked_fill(empty, -1)
    low, order = low.sort(dim=-1)
    high = high.gather(-1, order)
    if not apart:
        low, high = _merged(low, high, size)
    used = int((low <= high).sum(-1).max()) if low.numel() else 0
    used = max(used, 1)
    return Intervals(low[..., :used], high[..., :used], size)


def _merged(low: Tensor, high: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Unite intervals, sorted by their lower end, that overlap or touch."""
    reach = high.cummax(-1).values
    before = torch.nn.functional.pad(reach[..., :-1], (1, 0), value=-2)
    # An interval that starts beyond all before it opens a group, which ends where the next one opens.
    opens = low > before + 1
    closing = torch.nn.functional.pad(opens[..., 1:], (0, 1), value=True)
    group = opens.long().cumsum(-1) - 1
    starts = torch.full_like(low, size).scatter_reduce_(-1, group, low, "amin")
    ends = torch.full_like(high, -1).scatter_reduce_(-1, group, torch.where(closing, reach, -1), "amax")
    empty = starts > ends
    return starts.masked_fill(empty, size), ends.masked_fill(empty, -1)


def dtype_for(size: int) -> torch.dtype:
    """int32, or int64 for sets too large for it: host and accelerator take half the time for half the bytes."""
    return torch.int32 if size <= _NARROW else torch.int64


def everything(size: int, device: torch.device) -> Intervals:
    """All of [0, size), as one row that broadcasts."""
    return _one_row(0, size - 1, size, device)


def nothing(size: int, device: torch.device) -> Intervals:
    """The empty set, as one row that broadcasts."""
    return _one_row(size, -1, size, device)


def _one_row(low: int, high: int, size: int, device: torch.device) -> Intervals:
    ends = torch.tensor([[low], [high]], dtype=dtype_for(size), device=device)
    return Intervals(ends[0], ends[1], size)


def where(condition: Tensor, this: Intervals) -> Intervals:
    """``this`` in the rows where ``condition`` [...] holds, nothing elsewhere."""
    hidden = ~condition.unsqueeze(-1)
    return Intervals(this.low.masked_fill(hidden, this.size), this.high.masked_fill(hidden, -1), this.size)
