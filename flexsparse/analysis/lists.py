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
# Elements that are filled in at once.
_SLAB = 1 << 20


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
        owner = _owners(flat)
        inside = torch.arange(len(owner), device=flat.device) - (ends - flat)[owner]
        return Listed(length.sum(-1).int(), (low.flatten()[owner] + inside).int(), self.columns)

    def write(self, out: Tensor) -> None:
        """Fill ``out`` [B, H, R, W] int32 with column indices, each row's first ``count`` entries valid, 0 behind."""
        low, high = self.intervals.low.flatten(0, -2), self.intervals.high.flatten(0, -2)
        length = (high - low + 1).clamp(min=0)
        first = length.cumsum(-1) - length
        into = _rows(out)
        rows, width = low.shape[0], out.shape[-1]
        slots = torch.arange(width, device=low.device)
        step = max(1, _SLAB // max(width, 1))
        for begin in range(0, rows, step):
            part = slice(begin, begin + step)
            made = torch.zeros(len(low[part]), width, dtype=torch.int32, device=low.device)
            for slot in range(low.shape[-1]):
                start, offset, size = (x[part, slot, None] for x in (low, first, length))
                here = (slots >= offset) & (slots < offset + size)
                made = torch.where(here, (start + slots - offset).int(), made)
            into[part] = made

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
        owner = _owners(flat)
        _, heads, rows = self.count.shape
        return owner // (heads * rows), owner // rows % heads, owner % rows, self.column.long()

    def write(self, out: Tensor) -> None:
        """Fill ``out`` [B, H, R, W] int32 with column indices, each row's first ``count`` entries valid, 0 behind."""
        flat = self.count.flatten().long()
        owner = _owners(flat)
        inside = torch.arange(len(owner), device=flat.device) - (flat.cumsum(0) - flat)[owner]
        into = _rows(out)
        into.zero_()
        into[owner, inside] = self.column

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


def index_pair(one: Spans | Listed, other: Spans | Listed) -> tuple[Tensor, Tensor]:
    """The column indices of two sets of tiles over the same rows, [B, H, R, W] and [B, H, R, W'] int32.

    FlexAttention's kernels read both with the strides of the first, so a large pair shares one buffer, side by
    side; a small one is padded to every column.
    """
    shape, columns, device = one.count.shape, one.columns, one.count.device
    if columns * one.count.numel() * 4 <= _ROOMY_BYTES:
        left, right = (torch.empty(*shape, columns, dtype=torch.int32, device=device) for _ in range(2))
    else:
        widths = [max(int(x.count.max()), 1) for x in (one, other)]
        buffer = torch.empty(*shape, sum(widths), dtype=torch.int32, device=device)
        left, right = buffer.split(widths, -1)
    one.write(left)
    other.write(right)
    return left, right


def _owners(count: Tensor) -> Tensor:
    """The row of every tile, for rows of ``count`` [R] int64 tiles each."""
    return torch.repeat_interleave(torch.arange(len(count), device=count.device), count)


def _rows(out: Tensor) -> Tensor:
    """[B, H, R, W] -> [B H R, W], the same storage."""
    return out.as_strided((out.shape[:-1].numel(), out.shape[-1]), (out.stride(-2), 1), out.storage_offset())


def from_mask(chosen: Listed, keep: Tensor) -> Listed:
    """The tiles of a list that ``keep`` [T] marks."""
    flat = chosen.count.flatten().long()
    owner = _owners(flat)
    count = torch.bincount(owner[keep], minlength=len(flat)).int().reshape(chosen.count.shape)
    return Listed(count, chosen.column[keep], chosen.columns)


def merged(one: Spans | Listed, other: Listed) -> Spans | Listed:
    """The union of two sets of tiles that have no tile in common."""
    if not len(other.column):
        return one
    left = one.listed()
    keys = []
    for part in (left, other):
        owner = _owners(part.count.flatten().long())
        keys.append(owner * left.columns + part.column.long())
    joined = torch.cat(keys).sort().values
    return Listed((left.count + other.count), (joined % left.columns).int(), left.columns)
