"""Attention one query at a time, from definitions: the witness of ``reference`` itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.twins import candidates, differentiable_gates, exact_selection


@dataclass(frozen=True)
class Key:
    """One key that a query sees: its index and its gates, each a number that may carry a gradient."""

    index: int
    on_k: Tensor | float = 1.0
    on_v: Tensor | float = 1.0
    on_logit: Tensor | float = 1.0


# The keys that query i of row b and head h sees.
Sees = Callable[[int, int, int], Sequence[Key]]


# The logit that joins the denominator of a row; None where nothing does.
Sink = Callable[[int, int, int], Tensor | None]


def naive_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sees: Sees,
    added: Callable[[int, int, int], float] = lambda h, i, j: 0.0,
    sink: Sink = lambda b, h, i: None,
) -> tuple[Tensor, Tensor]:
    """out and lse, row by row; float64, differentiable."""
    groups = query.shape[1] // key.shape[1]
    outs, lses = [], []
    for b in range(query.shape[0]):
        for h in range(query.shape[1]):
            for i in range(query.shape[2]):
                keys = sees(b, h, i)
                logit = sink(b, h, i)
                if not keys:
                    outs.append(0 * query[b, h, i].sum() * torch.ones(value.shape[-1], dtype=torch.float64))
                    lses.append(torch.tensor(-math.inf, dtype=torch.float64) if logit is None else logit)
                    continue
                scores = []
                for k in keys:
                    product = query[b, h, i] @ key[b, h // groups, k.index] / math.sqrt(query.shape[-1])
                    log_gate = torch.as_tensor(k.on_logit, dtype=torch.float64).log()
                    scores.append(product * k.on_k + added(h, i, k.index) + log_gate)
                row = torch.stack(scores if logit is None else [*scores, logit])
                weights = torch.softmax(row, 0)[: len(keys)]
                rows = [w * k.on_v * value[b, h // groups, k.index] for w, k in zip(weights, keys, strict=True)]
                outs.append(torch.stack(rows).sum(0))
                lses.append(torch.logsumexp(row, 0))
    shape = query.shape[:3]
    return torch.stack(outs).reshape(*shape, -1), torch.stack(lses).reshape(shape)


def gates_of(scores: Tensor, k: int, i: int, after: int = 0, segments: list[int] | None = None) -> dict[int, Tensor]:
    """The soft gate of every key that query i selects; scores [S]."""
    prefix = candidates(i, after, segments)
    if not prefix:
        return {}
    soft = differentiable_gates(scores[prefix], k)
    chosen = exact_selection(scores.tolist(), k, after, segments)[i]
    return {j: soft[prefix.index(j)] for j in sorted(chosen)}
