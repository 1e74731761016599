"""The one tolerance policy: what error an implementation may have, given what PyTorch's own dense formula has.

Everything is judged against the float64 oracle. A result is allowed twice the error that the plain dense formula
makes in the same dtype on the same input, plus a few units in the last place of the largest output. So a bound is
measured on the input at hand, never guessed: where low precision hurts, it may hurt us about as much.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flexsparse.dense import reference
from flexsparse.dense_evaluator import DenseSizes, Evaluator
from flexsparse.expression import Pattern

ULPS = 4
Run = Callable[..., Any]


@dataclass(frozen=True)
class Comparison:
    """The largest error of one result, and the largest that was allowed.

    ``wrong`` elements are further from ``expected`` than that; ``first`` is the index of the first of them in the order
    of memory, None where all are right or the shape is wrong; ``expected`` and ``got`` are its values.
    """

    name: str
    dtype: torch.dtype
    error: float
    allowed: float
    wrong: int = 0
    first: tuple[int, ...] | None = None
    expected: float = math.nan
    got: float = math.nan

    @property
    def holds(self) -> bool:
        """False for NaN as well, which compares with nothing."""
        return self.error <= self.allowed

    @property
    def share(self) -> float:
        """The error as a share of what is allowed: at most 1 where it holds."""
        return 0.0 if self.error == 0 else self.error / self.allowed if self.allowed else math.inf


def ulp(size: float, dtype: torch.dtype) -> float:
    """The spacing of ``dtype`` at ``size``: its unit in the last place. 0 at 0."""
    if size == 0 or not math.isfinite(size):
        return 0.0
    return math.ldexp(torch.finfo(dtype).eps, math.frexp(size)[1] - 1)


def allowed(
    reference_value: Tensor, plain_value: Tensor, dtype: torch.dtype, *, size: float = 0, terms: int = 1
) -> float:
    """Twice the plain formula's error, plus 4 units in the last place of the largest output.

    Any shape; ``dtype`` is the one computed in. ``size`` replaces the largest output where more is summed than
    comes out: a gradient can cancel to exactly 0 in one order of operations and to a rounding error in another.
    In float64 the oracle rounds as well, and plain and oracle may round alike. Two sums of n numbers in different
    orders differ by up to n units in the last place of what is summed, so there the 4 units are taken ``terms``
    times, the length of the longest sum. In lower precision n has no place: it would forgive real mistakes.
    A plain formula that overflows forgives nothing.
    """
    largest = max(size, *(_largest(x) for x in (reference_value, plain_value)))
    units = ULPS * (terms if dtype is torch.float64 else 1)
    forgiven = _distance(plain_value, reference_value)
    return (2 * forgiven if math.isfinite(forgiven) else 0) + units * ulp(largest, dtype)


def compare(
    name: str,
    got: Tensor,
    reference_value: Tensor,
    plain_value: Tensor,
    dtype: torch.dtype,
    *,
    size: float = 0,
    terms: int = 1,
) -> Comparison:
    """Measure ``got`` against the oracle's value. Equal infinities agree; NaN and wrong shapes never do."""
    if got.shape != reference_value.shape:
        return Comparison(name, dtype, math.inf, 0.0)
    limit = allowed(reference_value, plain_value, dtype, size=size, terms=terms)
    distances = _distances(got, reference_value)
    found = Comparison(name, dtype, float(distances.max()) if distances.numel() else 0.0, limit)
    if found.holds:
        return found
    wrong = (distances > limit).nonzero()
    first = tuple(wrong[0].tolist())
    return replace(found, wrong=len(wrong), first=first, expected=float(reference_value[first]), got=float(got[first]))


def _largest(x: Tensor) -> float:
    finite = x.detach().double()[torch.isfinite(x)]
    return float(finite.abs().max()) if finite.numel() else 0.0


def _distance(x: Tensor, y: Tensor) -> float:
    apart = _distances(x, y)
    return float(apart.max()) if apart.numel() else 0.0


def _distances(x: Tensor, y: Tensor) -> Tensor:
    """How far apart each two elements are; infinitely where one is NaN, not at all where both are the same infinity."""
    x, y = x.detach().double(), y.detach().double()
    return torch.where(x == y, 0.0, (x - y).abs()).nan_to_num(nan=math.inf, posinf=math.inf)


@dataclass(frozen=True)
class Call:
    """One call and what flows back into it; no tensor here requires a gradient.

    query [B, H, S_q, D], key and value [B, H_kv, S_kv, D]; ``captured`` by name, of which ``learned`` receive
    gradients. ``grad_out`` [B, H, S_q, D_v] and ``grad_lse`` [B, H, S_q] are what the loss sends back.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    captured: Mapping[str, Tensor]
    learned: tuple[str, ...]
    grad_out: Tensor
    grad_lse: Tensor
    scale: float | None = None

    @property
    def operands(self) -> dict[str, Tensor]:
        return {"query": self.query, "key": self.key, "value": self.value}

    def cast(self, dtype: torch.dtype) -> Call:
        """Operands in ``dtype``; what is learned stays in float32, or widens to float64 with the operands."""
        real = torch.float64 if dtype is torch.float64 else torch.float32
        fixed = {n: t.to(real) if n in self.learned else t for n, t in self.captured.items()}
        query, key, value = (x.to(dtype) for x in self.operands.values())
        flow = self.grad_out.to(dtype)
        return replace(
            self, query=query, key=key, value=value, captured=fixed, grad_out=flow, grad_lse=self.grad_lse.to(real)
        )


def evaluate(run: Run, call: Call) -> dict[str, Tensor]:
    """``run``'s "out" and "lse", and the gradients "d query", "d key", "d value" and "d <name>" of what is learned.

    ``run(query, key, value, scale=..., return_lse=True, **captured)`` returns (out, lse).
    """
    leaves = {n: x.detach().clone().requires_grad_() for n, x in call.operands.items()}
    leaves |= {n: call.captured[n].detach().clone().requires_grad_() for n in call.learned}
    named = {n: leaves.get(n, t) for n, t in call.captured.items()}
    operands = (leaves[n] for n in ("query", "key", "value"))
    out, lse = run(*operands, scale=call.scale, return_lse=True, **named)
    # The lse of a row that sees no key is constant, so nothing flows back into it.
    grad_lse = call.grad_lse.masked_fill(torch.isneginf(lse), 0.0)
    flows = [(x, g.to(x.dtype)) for x, g in ((out, call.grad_out), (lse, grad_lse)) if x.requires_grad]
    found: list[Tensor | None] = [None] * len(leaves)
    if flows:
        outputs, incoming = zip(*flows, strict=True)
        found = list(torch.autograd.grad(outputs, list(leaves.values()), incoming, allow_unused=True))
    gradients = {
        f"d {n}": torch.zeros_like(x) if g is None else g for (n, x), g in zip(leaves.items(), found, strict=True)
    }
    return {"out": out.detach(), "lse": lse.detach(), **gradients}


def judge(pattern: Pattern, got: Mapping[str, Tensor], call: Call) -> tuple[Comparison, ...]:
    """Every result of ``evaluate`` compared under the policy, in the dtype of ``call.query``.

    The oracle and the plain formula materialise every score: keep S_q and S_kv small.
    """
    dtype = call.query.dtype
    exact = call.cast(torch.float64)
    expected = evaluate(lambda *x, **n: reference(pattern, *x, **n), exact)
    confirmed = evaluate(lambda *x, **n: plain(pattern, *x, **n), exact)
    rounded = confirmed if dtype is torch.float64 else evaluate(lambda *x, **n: plain(pattern, *x, **n), call)
    # What is summed before it cancels: the gradient that would flow if the softmax did not normalise.
    uncancelled = evaluate(lambda *x, **n: plain(pattern, *x, held=True, **n), exact)
    terms = call.key.shape[2] + call.query.shape[3]
    found = []
    for name, value in expected.items():
        size = _largest(uncancelled[name]) if name.startswith("d ") else 0.0
        # The lse is wider than the operands; its own last place counts.
        unit = got[name].dtype if name == "lse" else dtype
        # Where oracle and plain formula differ in float64 one of them is wrong, and their distance forgives nothing.
        agree = compare(name, confirmed[name], value, value, torch.float64, size=size, terms=terms).holds
        forgiving = rounded[name] if agree else value
        found.append(compare(name, got[name], value, forgiving, unit, size=size, terms=terms))
    return tuple(found)


def plain(
    pattern: Pattern,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None = None,
    return_lse: bool = True,
    held: bool = False,
    **captured: Tensor,
) -> tuple[Tensor, Tensor]:
    """The dense formula as one would write it in PyTorch: products, softmax and lse in the dtype of ``query``.

    Shapes as for ``reference``; returns out [B, H, S_q, D_v] and lse [B, H, S_q]. Mask, gates and score
    expressions come from the oracle in float64 and are rounded to the dtype: only the arithmetic of attention
    itself is low. ``held`` keeps the softmax's normaliser out of the gradient.
    """
    del return_lse
    dtype, groups = query.dtype, query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    sizes = DenseSizes(query.shape[0], query.shape[1], query.shape[2], key.shape[2], 0, query.device)
    dense = Evaluator(sizes, captured, (query, key)).pattern(pattern.node)
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = query @ key.transpose(-1, -2) * factor * dense.gate_k.to(dtype)
    scores = dense.score(scores.double()).to(dtype).expand_as(scores)
    hidden = ~dense.mask.expand_as(scores)
    sink = None if dense.sink is None else dense.sink.to(scores).expand_as(scores[..., :1])
    empty = hidden.all(-1, keepdim=True) if sink is None else hidden.all(-1, keepdim=True) & torch.isneginf(sink)
    scores = scores + torch.where(hidden, 1.0, dense.gate_logit).log().to(dtype)
    # A softmax over nothing is NaN, and so is its gradient: empty rows go through as zeros and are put out after.
    scores = scores.masked_fill(hidden, -torch.inf).masked_fill(empty, 0.0)
    # A sink is one more column of the softmax, which no value belongs to.
    columns = scores if sink is None else torch.cat((scores, sink), -1)
    lse = torch.logsumexp(columns, -1, keepdim=True)
    weights = torch.exp(columns - lse.detach()) if held else torch.softmax(columns, -1)
    weights = weights[..., : scores.shape[-1]].masked_fill(hidden, 0.0) * dense.gate_v.to(dtype)
    return weights @ value, lse.masked_fill(empty, -torch.inf).squeeze(-1)
