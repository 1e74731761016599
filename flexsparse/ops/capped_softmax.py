"""The capped softmax of every causal prefix: gates min(1, exp(u - tau)) that sum to k, in place of SPARSEK's.

Per prefix this is the maximum of ``p . u - sum p log p`` under ``0 <= p <= 1`` and ``sum p = k``: k times a softmax
whose probabilities are bounded by 1 / k. Softmax under upper bounds is the "constrained softmax" of Martins and
Kreutzer, "Learning What's Easy: Fully Differentiable Neural Easy-First Taggers", EMNLP 2017, and, with lower bounds as
well, the box-constrained softmax of Atarashi et al., 2025; both were known here from descriptions, not from the papers.
Its use for every causal prefix, and the algorithms below, are flexsparse's.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from flexsparse.errors import GradientError
from flexsparse.ops.causal import Ranges, ranges_of, within
from flexsparse.ops.projection import result_dtype
from flexsparse.ops.range_search import first_true
from flexsparse.ops.selection import CausalThresholds, prepared_rows


def causal_capped_softmax(
    u: Tensor, k: int, after: int = 0, segments: Tensor | None = None, *, validate: bool = True
) -> CausalThresholds:
    """The threshold of ``gates(..., form="capped_softmax")`` for every causal prefix, differentiable in u.

    Arguments, result and errors as in ``causal_sparsek``; ``flexsparse.ops`` says what the alternatives share. Query
    i's candidates have the gates ``min(1, exp(u_j - tau_i))``, which sum to k; tau is -inf where at most k candidates
    are above -inf, else +inf where k or more are +inf. Every candidate receives gradient, which makes it smoother than
    SPARSEK; a temperature T is ``causal_capped_softmax(u / T, ...)``.
    **Eviction is final:** tau never falls along a segment, so gates fade, and the hard top-k (``causal_topk``, the same
    keys as for SPARSEK) never takes a key back. A selected key's gate is at least 1 / (n - k + 1).
    Sums run in float64 in a fixed order: two runs give the same bits, CPU and GPU agree up to their rounding.
    O(S log^2 S) time and O(S) memory in PyTorch operations; there are no kernels of its own.
    """
    flat, rows = prepared_rows(u, k, after, segments, validate)
    tau, *_, candidates = torch.ops.flexsparse.capped_softmax(flat, k, after, rows)
    return CausalThresholds(tau.reshape(u.shape), candidates.reshape(u.shape))


class Capped(NamedTuple):
    """By query, [R, S] each."""

    tau: Tensor  # float32 or float64
    exact: Tensor  # float64
    capped: Tensor  # int64: candidates with gate 1
    last: Tensor  # int64: keys up to this rank of ``_rising`` are below tau, -1 for none
    candidates: Tensor  # int32


def thresholds(u: Tensor, k: int, ranges: Ranges) -> Capped:
    """tau, and how many candidates it caps, of every prefix of the rows u [R, S]; NaN from a row's first NaN on."""
    scores = torch.where(torch.isnan(u), -torch.inf, u.double())
    finite = torch.isfinite(scores)
    certain = within(scores == torch.inf, ranges)
    count = within(finite, ranges)
    budget = (k - certain).clamp(min=0)
    below, number, last = _uncapped(_rising(scores, ranges), scores, finite, ranges, count, budget)
    capped = count - number
    tau = below - (k - certain - capped).clamp(min=1).double().log()
    tau = tau.masked_fill(certain >= k, torch.inf).masked_fill(count + certain <= k, -torch.inf)
    nan = torch.isnan(u).cumsum(1) > 0
    shown = tau.masked_fill(nan, torch.nan).to(result_dtype(u))
    return Capped(shown, tau, capped + certain, last.masked_fill(tau == -torch.inf, -1), (count + certain).int())


def threshold_gradient(
    grad: Tensor, u: Tensor, exact: Tensor, capped: Tensor, last: Tensor, k: int, ranges: Ranges
) -> Tensor:
    """dL/du [R, S] in u's dtype from dL/dtau [R, S].

    tau_i moves with u_j by the share exp(u_j - tau_i) / (k - capped_i) from the first query on that does not cap key
    j. The sum over those queries is a recurrence that decays as tau rises: it is unrolled by doubling.
    """
    scores = torch.where(torch.isnan(u), -torch.inf, u.double())
    finite, known = torch.isfinite(scores), torch.isfinite(exact)
    flow = torch.where(known, grad.double() / (k - capped).clamp(min=1), 0.0)
    size = u.shape[1]
    time = torch.arange(size, device=u.device)
    level = torch.where(known, exact, 0.0)
    total, span = flow, 1
    while span < size:
        later = (time + span).clamp(max=size - 1)
        joined = (time + span < ranges.end) & known & known[:, later]
        decay = torch.where(joined, level - level[:, later], -torch.inf).clamp(max=0).exp()
        total = total + decay * total[:, later]
        span *= 2
    # By rank, as forward: a key may be below tau by less than a rounding.
    order = _rising(scores, ranges)
    rank = torch.empty_like(order).scatter_(1, order, time.expand_as(order))
    starts = first_true(last, ranges.birth, ranges.end, rank, strict=False)
    at = starts.clamp(max=size - 1)
    reached = finite & (starts < ranges.end) & known.gather(1, at)
    share = torch.where(reached, scores - level.gather(1, at), -torch.inf).clamp(max=0).exp()
    return torch.where(reached, share * total.gather(1, at), 0.0).to(u.dtype)


def _rising(scores: Tensor, ranges: Ranges) -> Tensor:
    """Keys by segment, then rising, on ties the later first: the order in which a rising tau passes them."""
    order = scores.shape[1] - 1 - scores.flip(1).sort(dim=1, stable=True).indices
    return order.gather(1, ranges.start.gather(1, order).sort(dim=1, stable=True).indices)


def _uncapped(
    order: Tensor, scores: Tensor, finite: Tensor, ranges: Ranges, count: Tensor, budget: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """log of the sum of exp(u) over each query's candidates below tau, how many they are, and the last one's rank.

    A descent as in ``range_search``, from the smallest keys up: the candidates at or above an edge t count 1 each,
    those below it exp(u - t), and tau is above every t for which these exceed the budget. Sums only ever grow, so
    nothing cancels; they restart with every block of equal upper bits and with every segment.
    """
    size = order.shape[1]
    time = torch.arange(size, device=order.device)
    rank = torch.empty_like(order).scatter_(1, order, time.expand_as(order))
    edge, home = scores.gather(1, order), ranges.start.gather(1, order)
    weight, alive, group = torch.where(finite, scores, -torch.inf), finite, ranges.start
    low, high = ranges.start, ranges.stop
    position, number = torch.zeros_like(low), torch.zeros_like(low)
    total = torch.full_like(scores, -torch.inf)
    for level in reversed(range(max(size - 1, 1).bit_length())):
        smaller = (rank >> level) & 1 == 0
        zeros = torch.nn.functional.pad(smaller.long().cumsum(1), (1, 0))
        counts = torch.nn.functional.pad((smaller & alive).long().cumsum(1), (1, 0))
        sums = _running(torch.where(smaller, weight, -torch.inf), rank >> (level + 1), group, 2 << level)
        added = torch.where(high > low, sums.gather(1, (high - 1).clamp(min=0)), -torch.inf)
        here, found = torch.logaddexp(total, added), number + counts.gather(1, high) - counts.gather(1, low)
        middle = (position + (1 << level)).clamp(max=size - 1)
        t, other = edge.gather(1, middle), home.gather(1, middle)
        soft = torch.where(torch.isfinite(t), here - torch.where(torch.isfinite(t), t, 0.0), -torch.inf).exp()
        # As many candidates above as the budget has room for, and any below, exceed it, however little that one adds.
        passed = (count - found >= budget) | (count - found + soft > budget)
        passed = (passed & (t < torch.inf)) | (t == -torch.inf)
        # Keys of earlier segments come before every candidate, those of later ones after.
        down = (position + (1 << level) < size) & ((other < ranges.start) | ((other == ranges.start) & passed))
        total, number = torch.where(down, here, total), torch.where(down, found, number)
        position = torch.where(down, position + (1 << level), position)
        zeros_low, zeros_high, half = zeros.gather(1, low), zeros.gather(1, high), zeros[:, -1:]
        low = torch.where(down, half + low - zeros_low, zeros_low)
        high = torch.where(down, half + high - zeros_high, zeros_high)
        target = torch.where(smaller, zeros[:, :-1], half + time - zeros[:, :-1])
        rank, weight, alive, group = (torch.empty_like(x).scatter_(1, target, x) for x in (rank, weight, alive, group))
    # Every block now holds one key, the last one below tau.
    at = low.clamp(max=size - 1)
    own = (high > low) & alive.gather(1, at)
    total = torch.where(own, torch.logaddexp(total, weight.gather(1, at)), total)
    return total, number + own.long(), position


def _running(x: Tensor, block: Tensor, group: Tensor, longest: int) -> Tensor:
    """log of the running sums of exp(x) along rows, restarting where block or group changes, by doubling."""
    size = x.shape[1]
    time = torch.arange(size, device=x.device)
    fresh = torch.nn.functional.pad(
        (block[:, 1:] != block[:, :-1]) | (group[:, 1:] != group[:, :-1]), (1, 0), value=True
    )
    start = torch.where(fresh, time, 0).cummax(1).values
    span = 1
    while span < min(longest, size):
        x = torch.where(time - span >= start, torch.logaddexp(x, x[:, (time - span).clamp(min=0)]), x)
        span *= 2
    return x


@torch.library.custom_op("flexsparse::capped_softmax", mutates_args=())
def _capped_softmax(
    u: Tensor, k: int, after: int, segments: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    # What is made of it has its strides, and is promised to be contiguous.
    u = u.contiguous()
    return thresholds(u, k, ranges_of(u, after, segments))


@_capped_softmax.register_fake
def _shapes(u: Tensor, k: int, after: int, segments: Tensor | None) -> tuple[Tensor, ...]:
    dtypes = (result_dtype(u), torch.float64, torch.int64, torch.int64, torch.int32)
    return tuple(u.new_empty(u.shape, dtype=d) for d in dtypes)


@torch.library.custom_op("flexsparse::capped_softmax_backward", mutates_args=())
def _capped_softmax_backward(
    grad: Tensor, u: Tensor, exact: Tensor, capped: Tensor, last: Tensor, k: int, after: int, segments: Tensor | None
) -> Tensor:
    grad, u = grad.contiguous(), u.contiguous()
    return threshold_gradient(grad, u, exact, capped, last, k, ranges_of(u, after, segments))


@_capped_softmax_backward.register_fake
def _backward_shapes(
    grad: Tensor, u: Tensor, exact: Tensor, capped: Tensor, last: Tensor, k: int, after: int, segments: Tensor | None
) -> Tensor:
    return u.new_empty(u.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    u, ctx.k, ctx.after, segments = inputs
    ctx.save_for_backward(u, *output[1:4], segments)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    *saved, segments = ctx.saved_tensors
    found = None
    if grad is not None:
        found = torch.ops.flexsparse.capped_softmax_backward(grad, *saved, ctx.k, ctx.after, segments)
    return found, None, None, None


def _refuse_second(ctx: Any, *_: Any) -> tuple[Any, ...]:
    raise GradientError(
        "causal_capped_softmax",
        got="a second derivative of tau in u",
        expected="first derivatives only",
        mend="Detach the gradient, or use create_graph=False.",
    )


_capped_softmax.register_autograd(_backward, setup_context=_save)
_capped_softmax_backward.register_autograd(_refuse_second)


def _mapped(
    info: Any, in_dims: tuple[int | None, ...], u: Tensor, k: int, after: int, segments: Tensor | None
) -> tuple[Any, Any]:
    """A mapped dimension is a batch dimension like any other: it joins the rows."""
    first, last = (
        x if x is None else x.movedim(dim, 0) if dim is not None else x.expand(info.batch_size, *x.shape)
        for x, dim in ((u, in_dims[0]), (segments, in_dims[3]))
    )
    assert first is not None
    made = torch.ops.flexsparse.capped_softmax(
        first.flatten(0, 1), k, after, None if last is None else last.flatten(0, 1)
    )
    return tuple(x.unflatten(0, first.shape[:2]) for x in made), (0,) * len(made)


torch.library.register_vmap(_capped_softmax, _mapped)
