"""Which columns each row of tiles has, as spans or as plain lists, in both directions.

Spans describe any number of tiles in a few integers a row; lists name each tile. Both can be padded to the
index tensors that FlexAttention reads, and transposed, without a dense grid.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import pad

from flexsparse.analysis.intervals import Intervals, normal

# Index tensors up to this size are padded to every column, as torch's own are; larger ones only as far as needed.
_ROOMY_BYTES = 1 << 24
# Elements that are filled in at once, by device; 2^24 elsewhere, where each call costs more than it computes.
_SLAB = {"cpu": 1 << 20}


@dataclass(frozen=True)
class Spans:
    """Rows [B, H, R] whose columns are the union of a few spans of ``intervals`` [B, H, R, M].

    What is kept of them serves training as well, so it is not made of inference tensors.
    """

    intervals: Intervals

    @property
    def columns(self) -> int:
        return self.intervals.size

    @cached_property
    def length(self) -> Tensor:
        """Columns of each span, [B, H, R, M]."""
        with torch.inference_mode(False):
            return (self.intervals.high - self.intervals.low + 1).clamp_(min=0)

    @cached_property
    def count(self) -> Tensor:
        """Columns of each row, [B, H, R] int32."""
        with torch.inference_mode(False):
            return self.length.sum(-1, dtype=torch.int32)

    def listed(self) -> Listed:
        """The same, tile by tile."""
        low, flat = self.intervals.low, self.length.flatten()
        ends = flat.cumsum(0)
        owner = _owners(flat)
        inside = torch.arange(len(owner), device=flat.device) - (ends - flat)[owner]
        return Listed(self.count, (low.flatten()[owner] + inside).int(), self.columns)

    def take_heads(self, rows: tuple[int, ...]) -> Spans:
        """The rows of each head, for heads that share them."""
        at = torch.tensor(rows, device=self.intervals.low.device)
        low, high = (end.index_select(1, at) for end in (self.intervals.low, self.intervals.high))
        return Spans(Intervals(low, high, self.columns))

    def table(self) -> Tensor:
        """What ``write`` needs to know of each row, [B H R, 2 M - 1] int32.

        The columns of a row in order are its p = 0, 1, ... plus the steps of every span that starts at p or before
        it. First all steps, then the starts of all spans but the first.
        """
        low, length = self.intervals.low.flatten(0, -2), self.length.flatten(0, -2)
        if low.shape[1] > 1:
            before = length[:, :-1]
            low = torch.cat((low[:, :1], low.diff(dim=-1) - before, before.cumsum(-1, dtype=low.dtype)), -1)
        return low.int()

    def write(self, out: Tensor, table: Tensor) -> None:
        """Fill ``out`` [B, H, R, W] int32 with the columns of each row; ``table`` is on its device.

        Behind the columns of a row any column may stand.
        """
        into, width = _rows(out), out.shape[-1]
        more = table.shape[1] // 2
        slots = torch.arange(width, dtype=torch.int32, device=out.device)
        rows = max(1, _SLAB.get(out.device.type, 1 << 24) // max(width, 1))
        for begin in range(0, len(table), rows):
            part = table[begin : begin + rows]
            column = torch.add(slots, part[:, :1], out=into[begin : begin + rows])
            for step in range(1, 1 + more):
                start = step + more
                column += (slots >= part[:, start : start + 1]) * part[:, step : step + 1]
            column.clamp_(0, self.columns - 1)

    def transposed(self, device: torch.device) -> Spans | Listed:
        """For each column its rows: by counting ends where the spans move one way, else tile by tile on ``device``."""
        found = self._turned(self.intervals.low, self.intervals.high)
        if found is None:
            low, high = self.intervals.low, self.intervals.high
            empty = low > high
            # An empty row goes between its neighbours, right behind the columns of those before it.
            passed = torch.cummax((high + 1).masked_fill(empty, 0), -2).values
            found = self._turned(torch.where(empty, passed, low), torch.where(empty, passed - 1, high))
        return found or self.listed().to(device).transposed(device)

    def _turned(self, low: Tensor, high: Tensor) -> Spans | None:
        """By counting, where no end falls from row to row; an empty row may stand between others as low > high."""
        ends = torch.stack((high + 1, low))
        if bool((ends[..., 1:, :] < ends[..., :-1, :]).any()):
            return None
        # A column's first row is behind those that end before it, its last row before those that start behind it.
        shape = (*ends.shape[:-2], self.columns + 2, ends.shape[-1])
        ended = ends.new_zeros(shape).scatter_add_(-2, ends.long(), ends.new_ones(1).expand_as(ends))
        ended = ended.cumsum(-2, dtype=ends.dtype)
        first, last = ended[..., : self.columns, :].unbind(0)
        # No two spans of a row share a column, so the rows of a column come once; touching ones may stay apart.
        return Spans(normal(first, last - 1, low.shape[-2], apart=True))


@dataclass(frozen=True)
class Listed:
    """Rows [B, H, R] with ``count`` columns each, int32; ``column`` [T] int32 holds them row after row, ascending."""

    count: Tensor
    column: Tensor
    columns: int

    def coordinates(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """b, h, row and column of every tile, [T] int64 each."""
        flat = self.count.flatten().long()
        owner = _owners(flat, len(self.column))
        _, heads, rows = self.count.shape
        return owner // (heads * rows), owner // rows % heads, owner % rows, self.column.long()

    def take_heads(self, rows: tuple[int, ...]) -> Listed:
        """The rows of each head, for heads that share them."""
        batch, _, height = self.count.shape
        flat = self.count.flatten().long()
        at = torch.tensor(rows, device=flat.device)
        starts = (flat.cumsum(0) - flat).reshape(self.count.shape).index_select(1, at).flatten()
        count = self.count.index_select(1, at)
        owner = _owners(count.flatten().long())
        begin = count.flatten().long().cumsum(0) - count.flatten()
        inside = torch.arange(len(owner), device=flat.device) - begin[owner]
        return Listed(count.reshape(batch, len(rows), height), self.column[starts[owner] + inside], self.columns)

    def table(self) -> Tensor:
        """The columns of all rows; ``write`` knows the counts."""
        return self.column

    def write(self, out: Tensor, table: Tensor) -> None:
        """As the spans' ``write``; the list and ``out`` are on one device."""
        flat = self.count.flatten().long()
        owner = _owners(flat, len(self.column))
        inside = torch.arange(len(owner), device=flat.device) - (flat.cumsum(0) - flat)[owner]
        into = _rows(out)
        into.zero_()
        into[owner, inside] = table

    def transposed(self, device: torch.device) -> Listed:
        """For each column its rows, ascending."""
        b, h, row, column = self.coordinates()
        batch, heads, rows = self.count.shape
        cell, order = ((b * heads + h) * self.columns + column).sort(stable=True)
        edges = torch.searchsorted(cell, torch.arange(batch * heads * self.columns + 1, device=cell.device))
        return Listed(edges.diff().int().reshape(batch, heads, self.columns), row[order].int(), rows)

    def to(self, device: torch.device) -> Listed:
        return Listed(self.count.to(device), self.column.to(device), self.columns)

    def listed(self) -> Listed:
        return self


def index_pair(one: Spans | Listed, other: Spans | Listed, device: torch.device) -> tuple[Tensor, ...]:
    """Count and column indices of two sets of tiles over the same rows: [B, H, R] and [B, H, R, W] int32 of each.

    FlexAttention's kernels read both indices with the strides of the first, so a large pair shares one buffer, side
    by side; a small one is padded to every column.
    """
    sets, columns = (one, other), one.columns
    counts = [x.count for x in sets]
    shape = counts[0].shape
    if columns * counts[0].numel() * 4 <= _ROOMY_BYTES:
        indices = [torch.empty(*shape, columns, dtype=torch.int32, device=device) for _ in sets]
    else:
        # The second begins at a multiple of 16 bytes too, where a row has room for that.
        widths = [min(_aligned(max(int(count.max()), 1)), columns) for count in counts]
        buffer = torch.empty(*shape, sum(widths), dtype=torch.int32, device=device)
        indices = list(buffer.split(widths, -1))
    *counts, table, other_table = _sent([*counts, one.table(), other.table()], device)
    one.write(indices[0], table)
    other.write(indices[1], other_table)
    return counts[0], indices[0], counts[1], indices[1]


def _sent(tensors: list[Tensor], device: torch.device) -> list[Tensor]:
    """Contiguous int32 tensors on a device, in one copy where all of them come from another."""
    if any(tensor.device == device for tensor in tensors):
        return [tensor.to(device).contiguous() for tensor in tensors]
    return _taken_apart(_put_together(tensors).to(device), tensors)


def _put_together(tensors: list[Tensor]) -> Tensor:
    """One after another, each from a multiple of 16 bytes on, as what is started again by its addresses must begin."""
    missing = [_aligned(x.numel()) - x.numel() for x in tensors]
    return torch.cat([pad(x.flatten(), (0, n)) if n else x.flatten() for x, n in zip(tensors, missing, strict=True)])


def _taken_apart(together: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    """Parts of ``together`` with the shapes of the tensors that it was put together from."""
    sizes = [size for x in tensors for size in (x.numel(), _aligned(x.numel()) - x.numel())]
    return [part.view(x.shape) for part, x in zip(together.split(sizes)[::2], tensors, strict=True)]


def _aligned(count: int) -> int:
    """So many int32 numbers, or some more, that what follows them begins at a multiple of 16 bytes."""
    return -(-count // 4) * 4


def _owners(count: Tensor, total: int | None = None) -> Tensor:
    """The row of every tile, for rows of ``count`` [R] int64 tiles each, ``total`` of them."""
    return torch.repeat_interleave(torch.arange(len(count), device=count.device), count, output_size=total)


def _rows(out: Tensor) -> Tensor:
    """[B, H, R, W] -> [B H R, W], the same storage."""
    return out.as_strided((out.shape[:-1].numel(), out.shape[-1]), (out.stride(-2), 1), out.storage_offset())


def from_mask(chosen: Listed, keep: Tensor) -> Listed:
    """The tiles of a list that ``keep`` [T] marks."""
    if bool(keep.all()):
        return chosen
    flat = chosen.count.flatten().long()
    owner = _owners(flat)
    count = torch.bincount(owner[keep], minlength=len(flat)).int().reshape(chosen.count.shape)
    return Listed(count, chosen.column[keep], chosen.columns)


def outside(tiles: Spans | Listed, low: Tensor, high: Tensor) -> Spans | Listed:
    """The columns of each row that are not in ``[low, high]`` [R] of it; low > high leaves all."""
    if isinstance(tiles, Spans):
        within = tiles.intervals
        low, high = (x.to(within.low)[:, None] for x in (low, high))
        return Spans(within & ~Intervals(low.clamp(min=0), high.clamp(max=within.size - 1), within.size))
    row = tiles.coordinates()[2]
    low, high = (x.to(row.device)[row] for x in (low, high))
    return from_mask(tiles, (tiles.column < low) | (tiles.column > high))


def merged(one: Spans | Listed, other: Listed) -> Spans | Listed:
    """The union of two sets of tiles that have no tile in common."""
    if not len(other.column):
        return one
    left = one.listed()
    if not len(left.column):
        return other
    keys = []
    for part in (left, other):
        owner = _owners(part.count.flatten().long())
        keys.append(owner * left.columns + part.column.long())
    joined = torch.cat(keys).sort().values
    return Listed((left.count + other.count), (joined % left.columns).int(), left.columns)
