"""Naive twins of the selection operators: exact fractions, one prefix at a time, readable in one sitting."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor

Number = Fraction | float


def exact_tau(scores: Sequence[float], k: int) -> Number:
    """tau = inf { t : sum of clip(z - t, 0, 1) <= k }, walking down the sorted events; infinities as documented."""
    budget = k - sum(z == math.inf for z in scores)
    finite = [Fraction(z) for z in scores if math.isfinite(z)]
    if budget < 0:
        return math.inf
    events = sorted([(z, 1) for z in finite] + [(z - 1, -1) for z in finite], reverse=True)
    total, slope, at = Fraction(0), 0, None
    for position, sign in events:
        if at is not None:
            step = slope * (at - position)
            if total + step > budget:
                return at - (budget - total) / slope
            total += step
        slope, at = slope + sign, position
    return -math.inf


def exact_gates(scores: Sequence[float], k: int) -> list[Fraction]:
    """clip(z - tau, 0, 1); +inf has 1 up to the first k of them, -inf has 0."""
    tau, infinite, gates = exact_tau(scores, k), 0, []
    for z in scores:
        if z == math.inf:
            infinite += 1
            gates.append(Fraction(int(infinite <= k)))
        elif z == -math.inf or tau == math.inf:
            gates.append(Fraction(0))
        elif tau == -math.inf:
            gates.append(Fraction(1))
        else:
            gates.append(min(max(Fraction(z) - Fraction(tau), Fraction(0)), Fraction(1)))
    return gates


def candidates(i: int, after: int, segments: Sequence[int] | None) -> list[int]:
    """The keys j <= i - after of i's segment."""
    return [j for j in range(i - after + 1) if segments is None or segments[j] == segments[i]]


def exact_prefix_taus(u: Sequence[float], k: int, after: int = 0, segments: Sequence[int] | None = None) -> list[float]:
    """The threshold of every causal prefix, rounded once at the end."""
    return [float(exact_tau([u[j] for j in candidates(i, after, segments)], k)) for i in range(len(u))]


def exact_selection(
    u: Sequence[float], k: int, after: int = 0, segments: Sequence[int] | None = None
) -> list[set[int]]:
    """The selected keys of every query: the k largest candidates, the earlier key on ties, never -inf."""
    chosen = []
    for i in range(len(u)):
        finite = [j for j in candidates(i, after, segments) if u[j] != -math.inf]
        chosen.append(set(sorted(finite, key=lambda j: (-u[j], j))[:k]))
    return chosen


def differentiable_gates(z: Tensor, k: int) -> Tensor:
    """SPARSEK gates of one row by the closed form on its support, which autograd differentiates exactly.

    Which keys lie strictly between is decided in exact fractions, so kinks fall on the documented side.
    """
    gates = exact_gates(z.tolist(), k)
    between = torch.tensor([0 < g < 1 for g in gates])
    whole = sum(g == 1 for g in gates)
    fixed = torch.tensor([float(g == 1) for g in gates], dtype=z.dtype)
    if not between.any():
        return fixed + 0 * torch.where(torch.isfinite(z), z, 0.0)
    free = torch.where(between, z, 0.0)
    tau = (free.sum() - (k - whole)) / between.sum()
    return torch.where(between, z - tau, fixed)


def differentiable_prefix_tau(u: Tensor, k: int, i: int, after: int, segments: Sequence[int] | None) -> Tensor | None:
    """tau of query i as a differentiable number, or None where it is infinite or no gate lies strictly between."""
    keys = candidates(i, after, segments)
    if not keys:
        return None
    z = u[keys]
    gates = exact_gates(z.tolist(), k)
    between = torch.tensor([0 < g < 1 for g in gates])
    if not between.any():
        return None
    whole = sum(g == 1 for g in gates)
    return (z[between].sum() - (k - whole)) / between.sum()


def prefix_tau(z: Tensor, k: int) -> Tensor:
    """The capped softmax's threshold of one set of scores, trying every number of capped keys; differentiable in z."""
    certain = int((z == math.inf).sum())
    falling = z[torch.isfinite(z)].sort(descending=True, stable=True).values
    if len(falling) + certain <= k:
        return torch.tensor(-math.inf, dtype=z.dtype)
    if certain >= k:
        return torch.tensor(math.inf, dtype=z.dtype)
    capped, budget, fixed = 0, k - certain, falling.detach()
    # A key is capped if, with tau at its score, the gates of those above and its own and the rest fit the budget.
    while capped + 1 < budget and capped + 1 + float((fixed[capped + 1 :] - fixed[capped]).exp().sum()) <= budget:
        capped += 1
    return torch.logsumexp(falling[capped:], 0) - math.log(budget - capped)
