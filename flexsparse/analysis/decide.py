"""Single tiles decided exactly: bounds first, then a look at some elements, then halves of halves.

A tile is PARTIAL once one element that is seen and one that is hidden are known. Where neither bounds nor the
looked-at elements decide, the tile is split, at most a fixed number of times in all.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flexsparse.analysis.bounds import bounds
from flexsparse.analysis.region import Bounds, Region
from flexsparse.ir.nodes import Node

EMPTY, PARTIAL, FULL = 0, 1, 2

# Boxes that one mask may have examined before the rest is left as PARTIAL, and how many are examined at once.
_BUDGET = 1 << 22
_SLAB = 1 << 18
# What a look at one box counts, as the samples cost more than the bounds.
_LOOK = 5


@dataclass(frozen=True)
class Boxes:
    """Rectangles of queries and keys, ends inclusive; all [T] int64. q counts from the offset."""

    b: Tensor
    h: Tensor
    q_low: Tensor
    q_high: Tensor
    kv_low: Tensor
    kv_high: Tensor

    def __len__(self) -> int:
        return len(self.b)

    def at(self, index: Tensor) -> Boxes:
        return Boxes(*(getattr(self, name)[index] for name in self.__dataclass_fields__))

    def part(self, begin: int, end: int) -> Boxes:
        return Boxes(*(getattr(self, name)[begin:end] for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class Look:
    """What one look at some boxes found: an element that is seen, one that is hidden, and whether it may be both."""

    seen: Tensor
    hidden: Tensor
    open: Tensor

    def at(self, index: slice | tuple[Tensor, ...]) -> Look:
        return Look(self.seen[index], self.hidden[index], self.open[index])


def decide(
    mask: Node, boxes: Boxes, region: Region, *, exact: bool = True, look: Look | None = None
) -> tuple[Tensor, int]:
    """The kind of each box, [T] uint8, and how many PARTIAL ones could not be proved so.

    ``exact=False`` stops after the bounds of the boxes themselves; ``look`` is a first look that was had elsewhere.
    """
    kinds, undecided, budget = [], 0, _BUDGET
    for first in range(0, len(boxes), _SLAB):
        part = boxes.part(first, first + _SLAB)
        if exact:
            had = None if look is None else look.at(slice(first, first + _SLAB))
            kind, left, budget = _decide_slab(mask, part, region, budget, had)
        else:
            found = box_bounds(mask, part, region)
            kind = _kinds(found.high, ~found.low)
            left = int((kind == PARTIAL).sum())
        kinds.append(kind)
        undecided += left
    return torch.cat(kinds) if kinds else boxes.b.to(torch.uint8), undecided


def _decide_slab(mask: Node, boxes: Boxes, region: Region, budget: int, look: Look | None) -> tuple[Tensor, int, int]:
    seen = torch.zeros(len(boxes), dtype=torch.bool, device=region.device)
    hidden, vague = torch.zeros_like(seen), torch.zeros_like(seen)
    owner = torch.arange(len(boxes), device=region.device)
    work = boxes
    while len(work):
        found = look or _look(mask, work, region)
        budget, look = budget - (1 if look else _LOOK) * len(work), None
        _mark(seen, owner, found.seen)
        _mark(hidden, owner, found.hidden)
        work, owner = _kept(work, owner, found.open & ~(seen & hidden)[owner])
        single = (work.q_low == work.q_high) & (work.kv_low == work.kv_high)
        # Rounding of reals, or NaN, can leave even one element undecided: its box may be either.
        affordable = budget >= 4 * _LOOK * len(work)
        _mark(vague, owner, single if affordable else torch.ones_like(single))
        if not affordable:
            break
        work, owner = _split(*_kept(work, owner, ~single))
    undecided = vague & ~(seen & hidden)
    return _kinds(seen | undecided, hidden | undecided), int(undecided.sum()), budget


def _kept(boxes: Boxes, owner: Tensor, keep: Tensor) -> tuple[Boxes, Tensor]:
    chosen = keep.nonzero().flatten()
    return (boxes, owner) if len(chosen) == len(owner) else (boxes.at(chosen), owner[chosen])


def _look(mask: Node, boxes: Boxes, region: Region) -> Look:
    """Bounds of every box, then a few elements of those that the bounds leave open."""
    found = box_bounds(mask, boxes, region)
    seen, hidden = found.low.clone(), ~found.high
    undecided = ~(seen | hidden)
    left = undecided.nonzero().flatten()
    for place in _SAMPLES:
        if not len(left):
            break
        # At a single element the bounds meet, unless rounding of reals keeps them apart.
        value = box_bounds(mask, _sample(boxes.at(left), *place), region)
        seen[left] |= value.low
        hidden[left] |= ~value.high
        left = left[~(seen & hidden)[left]]
    return Look(seen, hidden, undecided & ~(seen & hidden))


def look_at_grid(mask: Node, grid: Boxes, region: Region) -> Look:
    """The same for all boxes of a grid: b [B, 1, 1, 1], h [1, H, 1, 1], q [1, 1, R, 1] and kv [1, 1, 1, C].

    What depends on q or on kv alone is worked out once a row or a column, not once a box.
    """
    shape = torch.broadcast_shapes(*(x.shape for x in (grid.b, grid.h, grid.q_low, grid.kv_low)))
    found = bounds(mask, region.over(_ranges(grid)))
    seen, hidden = found.low.expand(shape).clone(), ~found.high.expand(shape)
    undecided = ~(seen | hidden)
    left = int(undecided.sum())
    for number, place in enumerate(_SAMPLES + _MORE_SAMPLES):
        if not left:
            break
        value = bounds(mask, region.over(_ranges(_sample(grid, *place))))
        seen |= value.low
        hidden |= ~value.high
        before, left = left, int((undecided & ~(seen & hidden)).sum())
        if number >= len(_SAMPLES) and before - left < _ENOUGH * before:
            break
    return Look(seen, hidden, undecided & ~(seen & hidden))


def _mark(flags: Tensor, owner: Tensor, values: Tensor) -> None:
    flags[owner[values.expand(owner.shape)]] = True


def _kinds(seen: Tensor, hidden: Tensor) -> Tensor:
    both = seen & hidden
    return torch.where(both, PARTIAL, torch.where(seen, FULL, EMPTY)).to(torch.uint8)


def box_bounds(mask: Node, boxes: Boxes, region: Region) -> Bounds:
    """Bounds of the mask on each box, [T] booleans."""
    found = bounds(mask, region.over(_ranges(boxes)))
    return Bounds(found.low.expand(len(boxes)), found.high.expand(len(boxes)))


def _ranges(boxes: Boxes) -> dict[str, Bounds]:
    return {
        "b": Bounds(boxes.b, boxes.b),
        "h": Bounds(boxes.h, boxes.h),
        "q": Bounds(boxes.q_low, boxes.q_high),
        "kv": Bounds(boxes.kv_low, boxes.kv_high),
    }


# Where to look in a box, in parts of its height and width: the corners, the pair across first, and the middle; on a
# grid, where a look is cheaper than a split, at scattered places too, for as long as that decides enough tiles.
_PARTS = 32
_SAMPLES = ((0, 0), (32, 32), (0, 32), (32, 0), (16, 16))
_MORE_SAMPLES = tuple((11 * n % _PARTS, 13 * n % _PARTS) for n in range(1, _PARTS) if n != 16)
_ENOUGH = 1 / 16


def _sample(boxes: Boxes, down: int, right: int) -> Boxes:
    """One element of each box, as a box of its own."""
    q = _between(boxes.q_low, boxes.q_high, down)
    kv = _between(boxes.kv_low, boxes.kv_high, right)
    return Boxes(boxes.b, boxes.h, q, q, kv, kv)


def _between(low: Tensor, high: Tensor, parts: int) -> Tensor:
    if parts in (0, _PARTS):
        return high if parts else low
    return low + (high - low) * parts // _PARTS


def _split(boxes: Boxes, owner: Tensor) -> tuple[Boxes, Tensor]:
    """Quarters; a side of one element stays whole."""
    middle_q, middle_kv = (boxes.q_low + boxes.q_high) // 2, (boxes.kv_low + boxes.kv_high) // 2
    halves_q = ((boxes.q_low, middle_q), (middle_q + 1, boxes.q_high))
    halves_kv = ((boxes.kv_low, middle_kv), (middle_kv + 1, boxes.kv_high))
    parts = [(q, kv) for q in halves_q for kv in halves_kv]
    joined = Boxes(
        boxes.b.repeat(4),
        boxes.h.repeat(4),
        torch.cat([q[0] for q, _ in parts]),
        torch.cat([q[1] for q, _ in parts]),
        torch.cat([kv[0] for _, kv in parts]),
        torch.cat([kv[1] for _, kv in parts]),
    )
    real = ((joined.q_low <= joined.q_high) & (joined.kv_low <= joined.kv_high)).nonzero().flatten()
    return joined.at(real), owner.repeat(4)[real]
