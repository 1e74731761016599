"""What follows a fused attention kernel: the sink, and the gradients that the kernel does not compute."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flexsparse._torch import first_derivatives
from flexsparse.runtime.chunked import Work, gradients
from flexsparse.runtime.sink import with_sink


def is_carried(tensors: tuple[Tensor, ...], recomputed: tuple[bool, ...]) -> bool:
    """Whether any tensor that ``recomputed`` marks asks for a gradient."""
    return torch.is_grad_enabled() and any(r and t.requires_grad for t, r in zip(tensors, recomputed, strict=True))


def completed(
    work: Work,
    operands: tuple[Tensor, Tensor, Tensor],
    tensors: tuple[Tensor, ...],
    recomputed: tuple[bool, ...],
    out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor]:
    """out and lse with the pattern's sink; the tensors that ``recomputed`` marks get gradients without atomics."""
    if work.sink:
        outside = tuple(t.detach() if r else t for t, r in zip(tensors, recomputed, strict=True))
        out, lse = with_sink(work, outside, out, lse)
    if is_carried(tensors, recomputed):
        out, lse = _Recomputed.apply(work, recomputed, out, lse, *operands, *tensors)
    return out, lse


class _Recomputed(torch.autograd.Function):
    """Passes out and lse through, and adds the gradients of captured tensors from the chunked path.

    FlexAttention accumulates such gradients with atomics, and kernels that gather leave them out; the chunked path sums
    them in a fixed order.
    """

    @staticmethod
    def forward(ctx: Any, work: Work, recomputed: tuple[bool, ...], out: Tensor, lse: Tensor, *tensors: Tensor) -> Any:
        ctx.work, ctx.recomputed = work, recomputed
        ctx.save_for_backward(*tensors)
        return out.view_as(out), lse.view_as(lse)

    @staticmethod
    @first_derivatives
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Any, ...]:
        query, key, value, *tensors = ctx.saved_tensors
        needs = ctx.needs_input_grad[7:]
        wanted = (False, False, False, *(r and n for r, n in zip(ctx.recomputed, needs, strict=True)))
        found = gradients(ctx.work, query, key, value, tuple(tensors), wanted, grad_out, grad_lse)
        return (None, None, grad_out, grad_lse, None, None, None, *found[3:])
