"""What gates read of a selection: scores and thresholds without infinities, and the least gate of a selected key."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from flexsparse._torch import is_plain

# Stand-ins for infinities: differences of these are finite or saturate, and never become NaN.
_SCORE_FAR, _TAU_LOW, _TAU_HIGH = 3.0e38, -3.4e38, 1.5e38


def gate_inputs(scores: Tensor, tau: Tensor, count: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scores and thresholds, finite or NaN, and the least gate, in tau's dtype; with gradients to scores and tau.

    scores, tau and count [..., S] are those of ``causal_select``. On a GPU one kernel does it in a call that nothing
    watches; elsewhere PyTorch operations do.
    """
    if scores.is_cuda and tau.dtype is torch.float32 and is_plain(scores):
        found: tuple[Tensor, Tensor, Tensor] = _GateInputs.apply(scores, tau, count, k)
        return found
    real = tau.dtype
    # A selected gate is at least 1 / (n - k + 1). Half of that leaves room for the rounding of u - tau,
    # so that a gate which sits exactly on the bound (k = 1, equal scores) keeps its gradient.
    least = 0.5 / (count - k + 1).clamp(min=1).to(real)
    u = scores.to(real).nan_to_num(nan=torch.nan, posinf=_SCORE_FAR, neginf=-_SCORE_FAR)
    return u, tau.nan_to_num(nan=torch.nan, posinf=_TAU_HIGH, neginf=_TAU_LOW), least


class _GateInputs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, tau: Tensor, count: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        from flexsparse.codegen.kernels import gate_inputs as kernels

        scores = scores.contiguous()
        ctx.save_for_backward(scores, tau)
        u, tau, least = kernels.gate_inputs(scores, tau, count, k, _SCORE_FAR, _TAU_LOW, _TAU_HIGH)
        ctx.mark_non_differentiable(least)
        return u, tau, least

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_u: Tensor, d_tau: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None, None]:
        from flexsparse.codegen.kernels import gate_inputs as kernels

        scores, tau = ctx.saved_tensors
        return *kernels.gate_input_gradients(scores, tau, d_u.contiguous(), d_tau.contiguous()), None, None
