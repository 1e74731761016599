"""Captured tensors in an analysis: the range of their values over ranges of indices, and search in sorted ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from flexsparse.analysis.region import Bounds, Region
from flexsparse.ir.nodes import Kind


def load_bounds(region: Region, name: str, index: Sequence[Bounds], kind: Kind) -> Bounds:
    """The range of a tensor's values over the ranges of its indices; indices are clamped into the tensor."""
    tensor = region.tensors[name]
    if kind is Kind.BOOL:
        found = _range(region, name, tensor.to(torch.uint8), index)
        return Bounds(found.low > 0, found.high > 0)
    values = tensor.detach().double() if kind is Kind.REAL else tensor
    found = _range(region, name, values, index)
    if kind is Kind.INT:
        return Bounds(found.low.long(), found.high.long())
    # NaN compares false with everything, which no interval expresses: such a tile is undecided.
    return Bounds(torch.nan_to_num(found.low, nan=-torch.inf), torch.nan_to_num(found.high, nan=torch.inf))


def _range(region: Region, name: str, values: Tensor, index: Sequence[Bounds]) -> Bounds:
    home = region.device
    clamped = [_clamped(i, n) for i, n in zip(index, values.shape, strict=True)]
    wide = [d for d, i in enumerate(clamped) if not _single(i)]
    if not wide:
        exact = _look_up(values, [i.low for i in clamped], home)
        return Bounds(exact, exact)
    if wide == [values.dim() - 1] and region.rises(name):
        last = clamped[-1]
        ends = torch.stack(torch.broadcast_tensors(last.low, last.high))
        low, high = _look_up(values, [*(i.low for i in clamped[:-1]), ends], home).unbind(0)
        return Bounds(low, high)
    if len(wide) > 1:
        return Bounds(values.min().to(home), values.max().to(home))
    return _range_extremes(values, clamped, wide[0], home)


def _clamped(index: Bounds, size: int) -> Bounds:
    low = index.low.clamp(0, size - 1)
    return Bounds(low, low if index.high is index.low else index.high.clamp(0, size - 1))


def _single(index: Bounds) -> bool:
    return index.low is index.high or torch.equal(*torch.broadcast_tensors(index.low, index.high))


def _look_up(values: Tensor, index: Sequence[Tensor], home: torch.device) -> Tensor:
    """``values[index]``, looked up where the values are and brought home."""
    if not index:
        return values.to(home)
    if values.device == home:
        return values[tuple(index)]
    # A single number need not be sent on its own where another index has its dimensions.
    most = index[-1].dim()
    at = [int(i) if n + 1 < len(index) and i.numel() == 1 and i.dim() <= most else i for n, i in enumerate(index)]
    return values[tuple(i if isinstance(i, int) else i.to(values.device) for i in at)].to(home)


def _range_extremes(values: Tensor, index: Sequence[Bounds], dim: int, home: torch.device) -> Bounds:
    """Minima and maxima over [low, high] along one dimension, from two overlapping power-of-two windows."""
    spans = index[dim].high - index[dim].low + 1
    levels = torch.log2(spans.double()).floor().long()
    # log2 of an exact power of two is exact, and below 2^53 it cannot round up to the next integer.
    low_of: list[Tensor] = [values]
    high_of: list[Tensor] = [values]
    least_level, most_level = int(levels.min()), int(levels.max())
    for level in range(most_level):
        width = 1 << level
        low_of.append(_pairs(low_of[-1], dim, width, torch.minimum))
        high_of.append(_pairs(high_of[-1], dim, width, torch.maximum))
    others = [i.low for i in index]
    least: Tensor | None = None
    greatest: Tensor | None = None
    for level in [most_level] if least_level == most_level else levels.unique().tolist():
        starts = (index[dim].low, (index[dim].high - (1 << level) + 1).clamp(min=0))
        here = [[*others[:dim], start, *others[dim + 1 :]] for start in starts]
        lows = torch.minimum(*(_look_up(low_of[level], at, home) for at in here))
        highs = torch.maximum(*(_look_up(high_of[level], at, home) for at in here))
        least = lows if least is None else torch.where(levels == level, lows, least)
        greatest = highs if greatest is None else torch.where(levels == level, highs, greatest)
    assert least is not None
    assert greatest is not None
    return Bounds(least, greatest)


def _pairs(values: Tensor, dim: int, width: int, extreme: Callable[..., Tensor]) -> Tensor:
    """Entry i becomes the extreme over twice the window that it covered; the tail keeps what it has."""
    size = values.shape[dim]
    if width >= size:
        return values
    head = extreme(values.narrow(dim, 0, size - width), values.narrow(dim, width, size - width))
    return torch.cat((head, values.narrow(dim, size - width, width)), dim)


def searched(table: Tensor, op: str, value: Tensor) -> Tensor:
    """How many entries of a sorted table are at most ``value`` ("le"), or below it ("ge"), where value is.

    ``table`` is [n] or [B or 1, H or 1, n], ``value`` [B, H, R] or [2, B, H, R].
    """
    rows = value
    if table.dtype is not torch.int64:
        kind = torch.iinfo(table.dtype)
        rows = value.clamp(kind.min, kind.max).to(table.dtype)
    if table.dim() > 1:
        rows = rows.movedim(0, 2).flatten(2) if value.dim() == 4 else rows
        shape = torch.broadcast_shapes(table.shape[:-1], rows.shape[:-1])
        table, rows = table.expand(*shape, -1), rows.expand(*shape, -1)
    at = torch.searchsorted(table.contiguous(), rows.to(table.device).contiguous(), right=op == "le").to(value.device)
    if table.dim() > 1 and value.dim() == 4:
        at = at.unflatten(2, (2, -1)).movedim(2, 0)
    if table.dtype is torch.int64:
        return at
    # Beyond what the table's dtype holds there is nothing to compare with.
    return at.masked_fill(value < kind.min, 0) if op == "le" else at.masked_fill(value > kind.max, table.shape[-1])
