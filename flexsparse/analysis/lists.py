"""Which columns each row of tiles has, as spans or as plain lists, in both directions.

Spans describe any number of tiles in a few integers a row; lists name each tile. Both can be padded to the
index tensors that FlexAttention reads, and transposed, without a dense grid.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flexsparse.analysis.intervals import Intervals, normal

# Index tensors up to this size are padded to every column, as torch's own are; larger ones only as far as needed.
_ROOMY_BYTES = 1 << 24


@dataclass(frozen=True)
class Spans:
    """Rows [B, H, R] whose columns are the union of a few spans of ``intervals`` [B, H, R, M]."""

    intervals: Intervals

    @property
    def columns(self) -> int:
        return self.intervals.size

    @property
    def count(self) -> Tensor:
        """Columns of each row, [B, H, R] int32."""
        return self.intervals.count.int()

    def listed(self) -> Listed:
        """The same, tile by tile."""
        low, length = self.intervals.low, (self.intervals.high - self.intervals.low + 1).clamp(min=0)
        flat = length.flatten()
        ends = flat.cumsum(0)
        owner = torch.repeat_interleave(torch.arange(len(flat), device=flat.device), flat)
        inside = torch.arange(len(owner), device=flat.device) - (ends - flat)[owner]
        return Listed(length.sum(-1).int(), (low.flatten()[owner] + inside).int(), self.columns)

    def padded(self) -> Tensor:
        """Column indices [B, H, R, W] int32, each row's first ``count`` entries valid."""
        low, high = self.intervals.low, self.intervals.high
        widest = max(int(self.count.max()), 1)
        width = self.columns if self.columns * low[..., 0].numel() * 4 <= _ROOMY_BYTES else widest
        shared = self._shared(widest) if width < self.columns else None
        if shared is not None:
            return shared
        slots = torch.arange(width, device=low.device)
        result = torch.zeros(*low.shape[:-1], width, dtype=torch.int32, device=low.device)
        first = torch.zeros_like(low[..., :1])
        for slot in range(low.shape[-1]):
            start, length = low[..., slot, None], (high - low + 1).clamp(min=0)[..., slot, None]
            here = (slots >= first) & (slots < first + length)
            result = torch.where(here, (start + slots - first).int(), result)
            first = first + length
        return result

    def _shared(self, width: int) -> Tensor | None:
        """Rows that start together, or one column further each, as overlapping views of one row of numbers."""
        low, high = self.intervals.low, self.intervals.high
        if low.shape[-1] > 1:
            return None
        rows = low.shape[-2]
        step_of = torch.arange(rows, device=low.device)
        used = low[..., 0] <= high[..., 0]
        for step in (0, 1):
            starts = (low[..., 0] - step * step_of)[used]
            if starts.numel() and bool((starts == starts[0]).all()):
                base = torch.arange(width + step * rows, dtype=torch.int32, device=low.device) + starts[0].int()
                shape = (*low.shape[:-1], width)
                return base.as_strided(shape, (0, 0, step, 1))
        return None

    def transposed(self) -> Spans | Listed:
        """For each column its rows: by binary search where the spans move one way, else tile by tile."""
        low, high = self.intervals.low, self.intervals.high
        rows = low.shape[-2]
        empty = low > high
        seen = (~empty).cumsum(-2) > 0
        # Empty rows in front end before the first column, later ones lie behind the last.
        low = torch.where(empty, torch.where(seen, self.columns, 0), low)
        high = torch.where(empty, torch.where(seen, self.columns, -1), high)
        moves = (low[..., 1:, :] >= low[..., :-1, :]).all() & (high[..., 1:, :] >= high[..., :-1, :]).all()
        if not bool(moves):
            return self.listed().transposed()
        column = torch.arange(self.columns, device=low.device).expand(*low.shape[:-2], low.shape[-1], -1).contiguous()
        first = torch.searchsorted(high.transpose(-1, -2).contiguous(), column)
        last = torch.searchsorted(low.transpose(-1, -2).contiguous(), column, right=True) - 1
        return Spans(normal(first.transpose(-1, -2), last.transpose(-1, -2), rows))


@dataclass(frozen=True)
class Listed:
    """Rows [B, H, R] with ``count`` columns each, int32; ``column`` [T] int32 holds them row after row, ascending."""

    count: Tensor
    column: Tensor
    columns: int

    def coordinates(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """b, h, row and column of every tile, [T] int64 each."""
        flat = self.count.flatten().long()
        owner = torch.repeat_interleave(torch.arange(len(flat), device=flat.device), flat)
        _, heads, rows = self.count.shape
        return owner // (heads * rows), owner // rows % heads, owner % rows, self.column.long()

    def padded(self) -> Tensor:
        """Column indices [B, H, R, W] int32, each row's first ``count`` entries valid."""
        widest = max(int(self.count.max()), 1)
        width = self.columns if self.columns * self.count.numel() * 4 <= _ROOMY_BYTES else widest
        flat = self.count.flatten().long()
        owner = torch.repeat_interleave(torch.arange(len(flat), device=flat.device), flat)
        inside = torch.arange(len(owner), device=flat.device) - (flat.cumsum(0) - flat)[owner]
        result = torch.zeros(len(flat), width, dtype=torch.int32, device=flat.device)
        result[owner, inside] = self.column
        return result.reshape(*self.count.shape, width)

    def transposed(self) -> Listed:
        """For each column its rows, ascending."""
        b, h, row, column = self.coordinates()
        batch, heads, rows = self.count.shape
        cell = (b * heads + h) * self.columns + column
        order = cell.argsort(stable=True)
        count = torch.bincount(cell, minlength=batch * heads * self.columns).int()
        return Listed(count.reshape(batch, heads, self.columns), row[order].int(), rows)

    def listed(self) -> Listed:
        return self


def from_mask(chosen: Listed, keep: Tensor) -> Listed:
    """The tiles of a list that ``keep`` [T] marks."""
    flat = chosen.count.flatten().long()
    owner = torch.repeat_interleave(torch.arange(len(flat), device=flat.device), flat)
    count = torch.bincount(owner[keep], minlength=len(flat)).int().reshape(chosen.count.shape)
    return Listed(count, chosen.column[keep], chosen.columns)


def merged(one: Spans | Listed, other: Listed) -> Spans | Listed:
    """The union of two sets of tiles that have no tile in common."""
    if not len(other.column):
        return one
    left = one.listed()
    rows = left.count.numel()
    keys = []
    for part in (left, other):
        owner = torch.repeat_interleave(torch.arange(rows, device=part.count.device), part.count.flatten().long())
        keys.append(owner * left.columns + part.column.long())
    joined = torch.cat(keys).sort().values
    return Listed((left.count + other.count), (joined % left.columns).int(), left.columns)
