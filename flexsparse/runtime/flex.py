"""FlexAttention: the block mask from classified tiles, one compiled launcher a pattern, and the gate on V.

A gate on V is applied through two calls: out = flex(s + log m) * exp(lse(s + log m) - lse(s)).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from flexsparse.codegen.block_mask import block_lists
from flexsparse.runtime.chunked import Work, gradients
from flexsparse.runtime.launcher import Launcher, mark_dynamic
from flexsparse.settings import Settings


class Launchers:
    """The compiled launchers of one pattern: one for its scores, one with the gate on V, each with its own builds."""

    def __init__(self, name: str, settings: Settings, compiled: bool) -> None:
        self.plain = Launcher(f"attend_{name}", settings, compiled)
        self.gated = Launcher(f"attend_gated_{name}", settings, compiled)

    @property
    def builds(self) -> int:
        """How many kernels were built so far."""
        return len(self.plain.builds) + len(self.gated.builds)


def attend_flex(
    work: Work,
    launchers: Launchers,
    operands: tuple[Tensor, Tensor, Tensor],
    tensors: tuple[Tensor, ...],
    recomputed: tuple[bool, ...],
    *,
    needs_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """out and, if needed, lse. ``recomputed`` marks the tensors whose gradients are computed without atomics."""
    inside = tuple(
        mark_dynamic(t.detach() if r else t, dims, launchers.plain.settings)
        for t, r, dims in zip(tensors, recomputed, work.sequence_dims, strict=True)
    )
    functions = work.functions(inside, broadcast=False)
    lists = block_lists(work.tiles)
    common = (work.shapes, work.scale, operands)
    plain = (functions["mask_mod"], functions["score_mod"])
    carried = any(r and t.requires_grad for t, r in zip(tensors, recomputed, strict=True))
    if functions["gated_score_mod"] is None:
        out, lse = launchers.plain(*common, plain, lists, needs_lse or carried)
    else:
        _, lse = launchers.plain(*common, plain, lists, True)
        both = (functions["mask_mod"], functions["gated_score_mod"])
        gated, gated_lse = launchers.gated(*common, both, lists, True)
        assert lse is not None
        assert gated_lse is not None
        empty = torch.isneginf(lse)
        # The difference of two -inf is NaN; such rows are 0.
        share = torch.exp(torch.where(empty, 0.0, gated_lse) - torch.where(empty, 0.0, lse))
        out = (gated * share.unsqueeze(-1)).to(gated.dtype)
    if carried and torch.is_grad_enabled():
        assert lse is not None
        out, lse = _Recomputed.apply(work, recomputed, out, lse, *operands, *tensors)
    return out, lse


class _Recomputed(torch.autograd.Function):
    """Passes out and lse through, and adds the gradients of captured tensors from the chunked path.

    FlexAttention accumulates such gradients with atomics; the chunked path sums them in a fixed order.
    """

    @staticmethod
    def forward(ctx: Any, work: Work, recomputed: tuple[bool, ...], out: Tensor, lse: Tensor, *tensors: Tensor) -> Any:
        ctx.work, ctx.recomputed = work, recomputed
        ctx.save_for_backward(*tensors)
        return out.view_as(out), lse.view_as(lse)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Any, ...]:
        query, key, value, *tensors = ctx.saved_tensors
        needs = ctx.needs_input_grad[7:]
        wanted = (False, False, False, *(r and n for r, n in zip(ctx.recomputed, needs, strict=True)))
        found = gradients(ctx.work, query, key, value, tuple(tensors), wanted, grad_out, grad_lse)
        return (None, None, grad_out, grad_lse, None, None, None, *found[3:])
