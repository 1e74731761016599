"""Every causal prefix at once, in PyTorch operations: thresholds, their gradient, lifetimes and slots.

Thresholds never fall along a segment, so a key that leaves the top-k never returns: it is selected for exactly
the queries [birth, death). Both are searches over time ranges (``range_search``); the backward pass is one
cumulative sum and two binary searches. These forms run on any device; a GPU has kernels (``ops.kernels``) that give
the same bits. Definitions: Lou, Jia, Zheng, Tu, arXiv 2406.16747; ``after`` and ``segments`` are flexsparse's.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flexsparse.ops.projection import events_of, on_grid, result_dtype, threshold
from flexsparse.ops.range_search import first_true, last_within_budget

_NONE = -(2**31)


class Ranges(NamedTuple):
    """Where each position's segment begins and ends, and which candidates its query has; [R, S] int64 each."""

    start: Tensor
    end: Tensor
    birth: Tensor  # first query that may select this key
    stop: Tensor  # candidates of this query are the keys start <= j < stop


class Thresholds(NamedTuple):
    """By query, [R, S] each: tau, the grid points at or below and at or above it, and the number of candidates."""

    tau: Tensor  # float32 or float64
    floor: Tensor  # int64
    ceil: Tensor  # int64
    candidates: Tensor  # int32


class CausalSelection(NamedTuple):
    """Key j is selected for the queries ``birth[j] <= i < death[j]`` and stands in ``slot[j]`` for all of them.

    [..., S] int32 each. At most k keys are selected at a time, in the slots 0 to k - 1; the slot is -1 for a key that
    is never selected.
    """

    birth: Tensor
    death: Tensor
    slot: Tensor


def bounds_of(segments: Tensor) -> tuple[Tensor, Tensor]:
    """The first position of each position's segment and the one past its last, from ids [R, S]: int64 both."""
    size = segments.shape[1]
    time = torch.arange(size, device=segments.device).expand(segments.shape)
    changes = torch.nn.functional.pad(segments[:, 1:] != segments[:, :-1], (1, 0), value=True)
    start = torch.where(changes, time, 0).cummax(1).values
    # The end of a segment is the next start, found from the right.
    starts = torch.nn.functional.pad(torch.where(changes, time, size)[:, 1:], (0, 1), value=size)
    return start, starts.flip(1).cummin(1).values.flip(1)


def ranges_of(u: Tensor, after: int, segments: Tensor | None) -> Ranges:
    """The ranges of rows u [R, S] with segment ids [R, S] or none."""
    rows, size = u.shape
    time = torch.arange(size, device=u.device).expand(rows, size)
    start, end = torch.zeros_like(time), torch.full_like(time, size)
    if segments is not None:
        start, end = bounds_of(segments)
    stop = torch.maximum(time - after + 1, start)
    return Ranges(start, end, torch.minimum(time + after, end), stop)


def thresholds(u: Tensor, k: int, ranges: Ranges) -> Thresholds:
    """The thresholds of every prefix of the rows u [R, S]; NaN from a row's first NaN on."""
    exact = u.double()
    finite = torch.isfinite(exact)
    grid = on_grid(exact, finite)
    # +inf always has gate 1: it leaves the search and takes one unit of the budget.
    certain = within(exact == torch.inf, ranges)
    # A budget beyond the row is the row, which also keeps the product small.
    budget = (min(k, u.shape[1]) - certain) * grid.unit
    values, weight = events_of(grid, finite)
    edge, order = values.sort(1, descending=True)
    time = torch.arange(values.shape[1], device=u.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(1, order, time)
    found = last_within_budget(rank, weight, weight * values, edge, 2 * ranges.start, 2 * ranges.stop, budget)
    result = threshold(grid, found, budget, edge)
    nan = torch.isnan(exact).cumsum(1) > 0
    tau = result.tau.masked_fill(nan, torch.nan).to(result_dtype(u))
    return Thresholds(tau, result.floor, result.ceil, (within(finite, ranges) + certain).int())


def threshold_gradient(grad: Tensor, u: Tensor, floor: Tensor, ceil: Tensor, ranges: Ranges) -> Tensor:
    """dL/du [R, S] in u's dtype from dL/dtau [R, S]."""
    exact = u.double()
    finite = torch.isfinite(exact)
    grid = on_grid(exact, finite)
    # Key j is strictly between the kinks for the queries [enters, leaves): tau has passed u - 1, not yet u.
    enters = first_true(ceil, ranges.birth, ranges.end, grid.values - grid.unit, strict=True)
    leaves = first_true(floor, ranges.birth, ranges.end, grid.values, strict=False)
    enters, leaves = torch.where(finite, enters, ranges.birth), torch.where(finite, leaves, ranges.birth)
    change = torch.zeros(u.shape[0], u.shape[1] + 1, dtype=torch.long, device=u.device)
    ones = torch.ones_like(enters)
    change.scatter_add_(1, enters, ones).scatter_add_(1, leaves, -ones)
    inside = change.cumsum(1)[:, :-1]
    share = torch.where(inside > 0, grad.double() / inside.clamp(min=1), 0.0)
    total = torch.nn.functional.pad(share.cumsum(1), (1, 0))
    return (total.gather(1, leaves) - total.gather(1, enters)).to(u.dtype)


def lifetimes(u: Tensor, k: int, ranges: Ranges) -> CausalSelection:
    """When each key of the rows u [R, S] is among the k best of the prefix, and in which slot; NaN counts as -inf."""
    scores = torch.where(torch.isnan(u), -torch.inf, u.double())
    rank = _stable_rank(scores)
    size = u.shape[1]
    none, ones = torch.zeros_like(rank), torch.ones_like(rank)
    budget = torch.full_like(rank, k - 1)
    found = last_within_budget(rank, none, ones, none, ranges.start, ranges.stop, budget)
    # theta is the k-th smallest rank among the candidates, beyond every rank where there are fewer than k.
    worst = torch.where(found.moment < k, size, found.position)
    death = first_true(-worst, ranges.birth, ranges.end, -rank, strict=True)
    alive = scores != -torch.inf
    death = torch.where(alive, death, ranges.birth)
    slot = _slots(ranges, death, _before(alive, ranges), k)
    return CausalSelection(ranges.birth.int(), death.int(), slot.int())


def slot_table(found: CausalSelection, k: int, chunk: int) -> Tensor:
    """The key in each slot as query ``c * chunk`` finds it, -1 for none: [R, ceil(S / chunk), k] int32."""
    birth, death, slot = (x.long() for x in found)
    rows, size = birth.shape
    n_chunks = -(-size // chunk)
    part = (birth + chunk - 1) // chunk
    placed = (slot >= 0) & (part < n_chunks) & (death > part * chunk)
    # Keys that no chunk finds go to an entry past the end, which is cut off.
    entry = torch.where(placed, part * k + slot, n_chunks * k)
    table = torch.full((rows, n_chunks * k + 1), -1, dtype=torch.long, device=birth.device)
    key = torch.arange(size, device=birth.device).expand_as(entry)
    table.scatter_(1, entry, key)
    latest = table[:, :-1].reshape(rows, n_chunks, k).cummax(1).values
    until = death.gather(1, latest.clamp(min=0).flatten(1)).reshape(latest.shape)
    start = chunk * torch.arange(n_chunks, device=birth.device)
    return torch.where((latest >= 0) & (until > start[:, None]), latest, -1).int()


def _slots(ranges: Ranges, death: Tensor, before: Tensor, k: int) -> Tensor:
    """A key that enters a full set takes the slot of the one that leaves it, at the same query."""
    size = death.shape[1]
    key = torch.arange(size, device=death.device).expand_as(death)
    held = death > ranges.birth
    # One key at most leaves at a query; those that live to their segment's end go to an entry past the end.
    target = torch.where(held & (death < ranges.end), death, size)
    leaving = torch.zeros(death.shape[0], size + 1, dtype=torch.long, device=death.device).scatter_(1, target, key)
    link = torch.where(before < k, -1 - before, leaving.gather(1, ranges.birth.clamp(max=size - 1)))
    link = torch.where(held, link, _NONE)
    for _ in range(size.bit_length()):
        link = torch.where(link >= 0, link.gather(1, link.clamp(min=0)), link)
    return torch.where(link == _NONE, -1, -1 - link)


def _before(alive: Tensor, ranges: Ranges) -> Tensor:
    """How many keys of the segment before each key can be selected."""
    running = torch.nn.functional.pad(alive.long().cumsum(1), (1, 0))
    return running[:, :-1] - running.gather(1, ranges.start)


def within(marked: Tensor, ranges: Ranges) -> Tensor:
    """How many of each query's candidates are marked: [R, S] int64."""
    running = torch.nn.functional.pad(marked.long().cumsum(1), (1, 0))
    return running.gather(1, ranges.stop) - running.gather(1, ranges.start)


def _stable_rank(scores: Tensor) -> Tensor:
    """Position of each key in the order of falling score, earlier keys first on ties: [R, S] int64."""
    order = scores.sort(dim=1, descending=True, stable=True).indices
    time = torch.arange(scores.shape[1], device=scores.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, time)
