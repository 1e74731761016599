"""A causal selection with what the gates of attention read of it, as one step of autograd where that is possible."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from flexsparse._torch import first_derivatives, is_plain
from flexsparse.ops.causal import CausalSelection
from flexsparse.ops.selection import causal_select, prepared_rows

# Stand-ins for infinities: differences of these are finite or saturate, and never become NaN.
_SCORE_FAR, _TAU_LOW, _TAU_HIGH = 3.0e38, -3.4e38, 1.5e38


class Gated(NamedTuple):
    """``u`` and ``tau`` [..., S] are finite or NaN, ``least`` is a gate that none of a selected key is below."""

    u: Tensor
    tau: Tensor
    least: Tensor
    selection: CausalSelection
    table: Tensor | None


def gate_inputs(scores: Tensor, tau: Tensor, count: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scores and thresholds, finite or NaN, and the least gate, in tau's dtype; with gradients to scores and tau.

    scores, tau and count [..., S] are those of ``causal_select``.
    """
    real = tau.dtype
    # A selected gate is at least 1 / (n - k + 1). Half of that leaves room for the rounding of u - tau,
    # so that a gate which sits exactly on the bound (k = 1, equal scores) keeps its gradient.
    least = 0.5 / (count - k + 1).clamp(min=1).to(real)
    u = scores.to(real).nan_to_num(nan=torch.nan, posinf=_SCORE_FAR, neginf=-_SCORE_FAR)
    return u, tau.nan_to_num(nan=torch.nan, posinf=_TAU_HIGH, neginf=_TAU_LOW), least


def gated_select(scores: Tensor, k: int, after: int, segments: Tensor | None, chunk: int) -> Gated:
    """``causal_select`` and ``gate_inputs`` of its scores, which are not looked at; no table where ``chunk`` is 0.

    On a GPU kernels do all of it, in a call that nothing but autograd watches.
    """
    if _by_kernels(scores):
        rows, segments = prepared_rows(scores, k, after, segments, False)
        found = _GatedSelection.apply(rows, k, after, segments, chunk)
        u, tau, least, *lives = (x.view(scores.shape) for x in found[:6])
        table = found[6].view(*scores.shape[:-1], *found[6].shape[1:]) if chunk else None
        return Gated(u, tau, least, CausalSelection(*lives), table)
    if chunk:
        (tau, count), lived, table = causal_select(scores, k, after, segments, validate=False, chunk=chunk)
    else:
        (tau, count), lived = causal_select(scores, k, after, segments, validate=False)
        table = None
    return Gated(*gate_inputs(scores, tau, count, k), lived, table)


def _by_kernels(scores: Tensor) -> bool:
    return scores.is_cuda and scores.dtype is not torch.float64 and is_plain(scores)


class _GatedSelection(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, k: int, after: int, segments: Tensor | None, chunk: int) -> tuple[Any, ...]:
        from flexsparse.codegen.kernels.gate_inputs import Finite
        from flexsparse.ops import kernels

        rows, finite = rows.contiguous(), Finite(_SCORE_FAR, _TAU_LOW, _TAU_HIGH)
        wanted = kernels.select(
            rows, k, after, segments, thresholds=True, lifetimes=True, chunk=chunk, finite=finite
        )  # fmt: skip
        found, lives, table, gates = wanted
        assert found is not None
        assert lives is not None
        assert gates is not None
        ctx.after = after
        ctx.save_for_backward(rows, *found, segments)
        ctx.mark_non_differentiable(gates.least, *lives, *(() if table is None else (table,)))
        ctx.set_materialize_grads(False)
        return (*gates, *lives, table)

    @staticmethod
    @first_derivatives
    def backward(ctx: Any, d_u: Tensor | None, d_tau: Tensor | None, *_: Any) -> tuple[Any, ...]:
        from flexsparse.ops import kernels
        from flexsparse.ops.causal import Thresholds

        rows, *saved, segments = ctx.saved_tensors
        thresholds = Thresholds(*saved)
        first, second = (torch.zeros_like(thresholds.tau) if x is None else x for x in (d_u, d_tau))
        found = kernels.gated_gradient((first, second), rows, thresholds, ctx.after, segments)
        return found, None, None, None, None
