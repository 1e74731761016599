"""For many time ranges at once: the last sorted position at which a running sum is still within a budget.

Events are indexed by time and carry a rank, their position in the order of falling value. A query is a range
of times. The search descends the bits of the rank from the highest (a wavelet matrix): at each level the
events stand in blocks of equal upper bits, in time order inside a block, and prefix sums give, for every
range, the sums over the half of the block with the larger values. That is O(log n) passes over n events for
any input, O(n) memory, and no loop over positions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Found(NamedTuple):
    """Sums run over the events of the range whose position is at most ``position`` (-1 where none qualifies)."""

    position: Tensor  # [R, M] int64
    weight: Tensor  # [R, M] int64
    moment: Tensor  # [R, M] int64


def last_within_budget(
    rank: Tensor,
    weight: Tensor,
    moment: Tensor,
    edge: Tensor,
    low: Tensor,
    high: Tensor,
    budget: Tensor,
) -> Found:
    """The last position x with ``g(x) <= budget``, g(x) being the sum of ``moment - weight * edge[x]`` before x.

    All int64, so that sums are exact: rank [R, N], a permutation for each row; weight and moment [R, N] by time;
    edge [R, N] by position; low, high [R, M], ranges of time [low, high); budget [R, M].
    g must not fall in x. g(0) is 0, so a negative budget finds nothing.
    """
    events = rank.shape[1]
    levels = max(events - 1, 1).bit_length()
    sum_weight = torch.zeros_like(low)
    sum_moment = torch.zeros_like(budget)
    position = torch.zeros_like(low)
    for level in reversed(range(levels)):
        half = 1 << level
        larger = (rank >> level) & 1 == 0
        # One column more than events: entry t is the sum over the first t of this level's order.
        zeros = _prefix(larger.long())
        weights = _prefix(torch.where(larger, weight, 0))
        moments = _prefix(torch.where(larger, moment, 0))
        zeros_low, zeros_high = zeros.gather(1, low), zeros.gather(1, high)
        here_weight = sum_weight + weights.gather(1, high) - weights.gather(1, low)
        here_moment = sum_moment + moments.gather(1, high) - moments.gather(1, low)
        middle = position + half
        at_edge = edge.gather(1, middle.clamp(max=events - 1))
        down = (middle < events) & (here_moment - here_weight * at_edge <= budget)
        total = zeros[:, -1:]
        low = torch.where(down, total + low - zeros_low, zeros_low)
        high = torch.where(down, total + high - zeros_high, zeros_high)
        sum_weight = torch.where(down, here_weight, sum_weight)
        sum_moment = torch.where(down, here_moment, sum_moment)
        position = torch.where(down, middle, position)
        time = torch.arange(events, device=rank.device)
        target = torch.where(larger, zeros[:, :-1], total + time - zeros[:, :-1])
        rank, weight, moment = (torch.empty_like(x).scatter_(1, target, x) for x in (rank, weight, moment))
    # Every block now holds one event; it belongs to the range if [low, high) is not empty.
    inside = high > low
    last = low.clamp(max=events - 1)
    sum_weight = sum_weight + torch.where(inside, weight.gather(1, last), 0)
    sum_moment = sum_moment + torch.where(inside, moment.gather(1, last), 0)
    return Found(torch.where(budget < 0, -1, position), sum_weight, sum_moment)


def first_true(holds: Tensor, low: Tensor, high: Tensor, threshold: Tensor, *, strict: bool) -> Tensor:
    """The first i in [low, high) with ``holds[i] > threshold`` (``>=`` unless strict), else ``high``.

    holds [R, S] must not fall inside [low, high); low, high, threshold [R, M]. Returns int64 [R, M].
    """
    steps = int(holds.shape[1]).bit_length()
    last = holds.shape[1] - 1
    for _ in range(steps):
        middle = (low + high) // 2
        value = holds.gather(1, middle.clamp(max=last))
        found = value > threshold if strict else value >= threshold
        open_ = low < high
        high = torch.where(open_ & found, middle, high)
        low = torch.where(open_ & ~found, middle + 1, low)
    return high


def _prefix(x: Tensor) -> Tensor:
    """Exclusive prefix sums along the last dimension, the total last: [R, N] -> [R, N + 1]."""
    return torch.nn.functional.pad(x.cumsum(1), (1, 0))
