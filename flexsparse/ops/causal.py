"""Every causal prefix at once: SPARSEK thresholds with their exact gradient, and the lifetimes of the top-k.

Thresholds never fall along a segment, so a key that leaves the top-k never returns: it is selected for exactly
the queries [birth, death). Both are searches over time ranges (``range_search``); the backward pass is one
cumulative sum and two binary searches. Definitions: Lou, Jia, Zheng, Tu, arXiv 2406.16747; ``after`` and
``segments`` are flexsparse's.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from flexsparse.errors import DtypeError, PatternArgumentError, SegmentError, ShapeError
from flexsparse.ops.projection import check_scores, events_of, on_grid, result_dtype, threshold
from flexsparse.ops.range_search import first_true, last_within_budget


class CausalSelection(NamedTuple):
    """Key j is selected for the queries ``birth[j] <= i < death[j]``; both [..., S] int32."""

    birth: Tensor
    death: Tensor


class _Ranges(NamedTuple):
    """Where each position's segment begins and ends, and which candidates its query has; [R, S] int64 each."""

    start: Tensor
    end: Tensor
    birth: Tensor  # first query that may select this key
    stop: Tensor  # candidates of this query are the keys start <= j < stop


def causal_sparsek(
    u: Tensor, k: int, after: int = 0, segments: Tensor | None = None, *, validate: bool = True
) -> Tensor:
    """tau [..., S]: the SPARSEK threshold of every causal prefix, differentiable in u.

    u [..., S] float16, bfloat16, float32 or float64, by position. Query i's candidates are the keys j <= i - after,
    of i's segment where ``segments`` ([S], or broadcastable to u, non-decreasing integers) is given. tau is float32
    (float64 for float64); -inf where at most k candidates are above -inf, +inf where more than k are +inf.
    Computed on a grid of exact integers; O(S log S) time and O(S) memory for any input, deterministic.
    Raises DtypeError, ShapeError, PatternArgumentError, SegmentError, and NonFiniteScoresError for NaN unless
    ``validate=False``; then tau is NaN from that position of that row on.
    """
    flat, ranges = _prepare(u, k, after, segments, validate)
    tau: Tensor = _CausalSparsek.apply(flat, k, *ranges)
    return tau.reshape(u.shape)


@torch.no_grad()
def causal_topk(
    u: Tensor, k: int, after: int = 0, segments: Tensor | None = None, *, validate: bool = True
) -> CausalSelection:
    """The hard top-k of every causal prefix, as one interval of queries for each key.

    Arguments as in ``causal_sparsek``. On ties the earlier key stays; keys of -inf are never selected
    (death = birth). Not differentiable: gradients flow through the gates.
    """
    flat, ranges = _prepare(u, k, after, segments, validate)
    rank = _stable_rank(torch.where(torch.isnan(flat), -torch.inf, flat.double()))
    size = flat.shape[1]
    ones = torch.ones_like(rank)
    found = last_within_budget(
        rank,
        torch.zeros_like(rank),
        ones,
        torch.zeros_like(rank),
        ranges.start,
        ranges.stop,
        torch.full_like(rank, k - 1),
    )
    # theta is the k-th smallest rank among the candidates, beyond every rank where there are fewer than k.
    worst = torch.where(found.moment < k, size, found.position)
    death = first_true(-worst, ranges.birth, ranges.end, -rank, strict=True)
    birth = ranges.birth
    death = torch.where(flat == -torch.inf, birth, death)
    return CausalSelection(birth.int().reshape(u.shape), death.int().reshape(u.shape))


def candidate_counts(u: Tensor, after: int = 0, segments: Tensor | None = None) -> Tensor:
    """How many candidates above -inf each query has: [..., S] int64."""
    flat, ranges = _prepare(u, 1, after, segments, validate=False)
    counted = torch.nn.functional.pad((flat != -torch.inf).long().cumsum(1), (1, 0))
    return (counted.gather(1, ranges.stop) - counted.gather(1, ranges.start)).reshape(u.shape)


def _prepare(u: Tensor, k: int, after: int, segments: Tensor | None, validate: bool) -> tuple[Tensor, _Ranges]:
    check_scores("u", u, k, validate)
    if isinstance(after, bool) or not isinstance(after, int) or after < 0:
        raise PatternArgumentError("after", got=repr(after), expected="an integer of at least 0")
    size = u.shape[-1]
    if size == 0:
        raise ShapeError("u", got="no positions", expected="at least one score in the last dimension")
    flat = u.reshape(-1, size)
    rows = None if segments is None else _segment_rows(segments, u, validate)
    return flat, _ranges(flat.shape[0], size, after, rows, u.device)


def _segment_rows(segments: Tensor, u: Tensor, validate: bool) -> Tensor:
    if segments.is_floating_point() or segments.is_complex():
        raise DtypeError("segments", got=str(segments.dtype), expected="integers")
    try:
        rows = segments.expand(u.shape).reshape(-1, u.shape[-1])
    except RuntimeError:
        raise ShapeError(
            "segments", got=str(tuple(segments.shape)), expected=f"[S] or a shape that broadcasts to {tuple(u.shape)}"
        ) from None
    if validate and not torch.compiler.is_compiling():
        check_sorted("segments", segments)
    return rows


def check_sorted(name: str, segments: Tensor) -> None:
    """Raise SegmentError with the first position at which the ids fall; one synchronisation on a GPU."""
    falls = segments[..., 1:] < segments[..., :-1]
    if bool(falls.any()):
        position = [int(i) for i in falls.nonzero()[0]]
        position[-1] += 1
        raise SegmentError(
            name,
            got=f"ids that fall at position {position if len(position) > 1 else position[0]}",
            expected="non-decreasing ids along the sequence",
            mend="Number the documents in the order in which they are packed.",
        )


def _ranges(rows: int, size: int, after: int, segments: Tensor | None, device: torch.device) -> _Ranges:
    time = torch.arange(size, device=device).expand(rows, size)
    if segments is None:
        start, end = torch.zeros_like(time), torch.full_like(time, size)
    else:
        changes = torch.nn.functional.pad(segments[:, 1:] != segments[:, :-1], (1, 0), value=True)
        start = torch.where(changes, time, 0).cummax(1).values
        # The end of a segment is the next start, found from the right.
        starts = torch.nn.functional.pad(torch.where(changes, time, size)[:, 1:], (0, 1), value=size)
        end = starts.flip(1).cummin(1).values.flip(1)
    stop = torch.maximum(time - after + 1, start)
    return _Ranges(start, end, torch.minimum(time + after, end), stop)


def _stable_rank(scores: Tensor) -> Tensor:
    """Position of each key in the order of falling score, earlier keys first on ties: [R, S] int64."""
    order = scores.sort(dim=1, descending=True, stable=True).indices
    time = torch.arange(scores.shape[1], device=scores.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, time)


class _CausalSparsek(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, k: int, start: Tensor, end: Tensor, birth: Tensor, stop: Tensor) -> Tensor:
        exact = u.double()
        finite = torch.isfinite(exact)
        grid = on_grid(exact, finite)
        # +inf always has gate 1: it leaves the search and takes one unit of the budget.
        certain = torch.nn.functional.pad((exact == torch.inf).long().cumsum(1), (1, 0))
        # A budget beyond the row is the row, which also keeps the product small.
        budget = (min(k, u.shape[1]) - certain.gather(1, stop) + certain.gather(1, start)) * grid.unit
        values, weight = events_of(grid, finite)
        edge, order = values.sort(1, descending=True)
        time = torch.arange(values.shape[1], device=u.device).expand_as(order)
        rank = torch.empty_like(order).scatter_(1, order, time)
        found = last_within_budget(rank, weight, weight * values, edge, 2 * start, 2 * stop, budget)
        result = threshold(grid, found, budget, edge)
        ctx.save_for_backward(grid.values, grid.unit, finite, result.floor, result.ceil, end, birth)
        ctx.dtype = u.dtype
        nan = torch.isnan(exact).cumsum(1) > 0
        return result.tau.masked_fill(nan, torch.nan).to(result_dtype(u))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        values, unit, finite, floor, ceil, end, birth = ctx.saved_tensors
        # Key j is strictly between the kinks for the queries [enters, leaves): tau has passed u - 1, not yet u.
        enters = first_true(ceil, birth, end, values - unit, strict=True)
        leaves = first_true(floor, birth, end, values, strict=False)
        enters, leaves = torch.where(finite, enters, birth), torch.where(finite, leaves, birth)
        change = torch.zeros(values.shape[0], values.shape[1] + 1, dtype=torch.long, device=values.device)
        ones = torch.ones_like(enters)
        change.scatter_add_(1, enters, ones).scatter_add_(1, leaves, -ones)
        inside = change.cumsum(1)[:, :-1]
        share = torch.where(inside > 0, grad.double() / inside.clamp(min=1), 0.0)
        total = torch.nn.functional.pad(share.cumsum(1), (1, 0))
        return (total.gather(1, leaves) - total.gather(1, enters)).to(ctx.dtype), None, None, None, None, None
