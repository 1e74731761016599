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


def decide(mask: Node, boxes: Boxes, region: Region, *, exact: bool = True) -> tuple[Tensor, int]:
    """The kind of each box, [T] uint8, and how many PARTIAL ones could not be proved so.

    ``exact=False`` stops after the bounds of the boxes themselves.
    """
    kinds, undecided, budget = [], 0, _BUDGET
    for first in range(0, len(boxes), _SLAB):
        part = boxes.at(torch.arange(first, min(first + _SLAB, len(boxes)), device=region.device))
        if exact:
            kind, left, budget = _decide_slab(mask, part, region, budget)
        else:
            found = box_bounds(mask, part, region)
            kind = _kinds(found.high, ~found.low)
            left = int((kind == PARTIAL).sum())
        kinds.append(kind)
        undecided += left
    return torch.cat(kinds) if kinds else boxes.b.to(torch.uint8), undecided


def _decide_slab(mask: Node, boxes: Boxes, region: Region, budget: int) -> tuple[Tensor, int, int]:
    seen = torch.zeros(len(boxes), dtype=torch.bool, device=region.device)
    hidden, vague = torch.zeros_like(seen), torch.zeros_like(seen)
    owner = torch.arange(len(boxes), device=region.device)
    work = boxes
    while len(work):
        found = box_bounds(mask, work, region)
        must, may = found.low, found.high
        _mark(seen, owner, must)
        _mark(hidden, owner, ~may)
        for sample in _samples(work):
            value = box_bounds(mask, sample, region)
            # At a single element the bounds meet, unless rounding of reals keeps them apart.
            _mark(seen, owner, value.low)
            _mark(hidden, owner, ~value.high)
        open_ = ~(must | ~may) & ~(seen & hidden)[owner]
        budget -= 5 * len(work)
        single = (work.q_low == work.q_high) & (work.kv_low == work.kv_high)
        # Rounding of reals, or NaN, can leave even one element undecided: its box may be either.
        _mark(vague, owner, open_ & single)
        open_ &= ~single
        if not bool(open_.any()):
            break
        if budget < 0:
            _mark(vague, owner, open_)
            break
        chosen = open_.nonzero().flatten()
        work, owner = _split(work.at(chosen), owner[chosen])
    undecided = vague & ~(seen & hidden)
    return _kinds(seen | undecided, hidden | undecided), int(undecided.sum()), budget


def _mark(flags: Tensor, owner: Tensor, values: Tensor) -> None:
    flags[owner[values.expand(owner.shape)]] = True


def _kinds(seen: Tensor, hidden: Tensor) -> Tensor:
    both = seen & hidden
    return torch.where(both, PARTIAL, torch.where(seen, FULL, EMPTY)).to(torch.uint8)


def box_bounds(mask: Node, boxes: Boxes, region: Region) -> Bounds:
    """Bounds of the mask on each box, [T] booleans."""
    ranges = {
        "b": Bounds(boxes.b, boxes.b),
        "h": Bounds(boxes.h, boxes.h),
        "q": Bounds(boxes.q_low, boxes.q_high),
        "kv": Bounds(boxes.kv_low, boxes.kv_high),
    }
    found = bounds(mask, region.over(ranges))
    return Bounds(found.low.expand(len(boxes)), found.high.expand(len(boxes)))


def _samples(boxes: Boxes) -> list[Boxes]:
    """The four corners and the middle of each box, as boxes of one element."""
    middle_q, middle_kv = (boxes.q_low + boxes.q_high) // 2, (boxes.kv_low + boxes.kv_high) // 2
    points = [(q, kv) for q in (boxes.q_low, boxes.q_high) for kv in (boxes.kv_low, boxes.kv_high)]
    return [Boxes(boxes.b, boxes.h, q, q, kv, kv) for q, kv in (*points, (middle_q, middle_kv))]


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
