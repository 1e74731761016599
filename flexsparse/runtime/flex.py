"""FlexAttention: the block mask from classified tiles, one compiled launcher a pattern, and the gate on V.

A gate on V is applied through two calls: out = flex(s + log m) * exp(lse(s + log m) - lse(s)).
"""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention.flex_attention import BlockMask

from flexsparse import _torch
from flexsparse.analysis.tiles import FULL, PARTIAL, Tiles
from flexsparse.errors import BackendError, BackendNotice
from flexsparse.runtime.chunked import Work, gradients


def make_block_mask(tiles: Tiles, mask_mod: Callable[..., Tensor]) -> BlockMask:
    """torch's BlockMask with the PARTIAL tiles in its lists and the FULL ones in its full lists."""
    partial, full = ((tiles.kinds == kind) for kind in (PARTIAL, FULL))

    def listed(marked: Tensor) -> tuple[Tensor, Tensor]:
        count = marked.sum(-1, dtype=torch.int32)
        # A stable descending sort of the marks puts the marked columns first, in order.
        order = marked.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
        return count, order.to(torch.int32).contiguous()

    lists = (*listed(partial), *listed(full))
    return _torch.block_mask_from_lists(*lists, tiles.block, mask_mod, tiles.sizes.q_len, tiles.sizes.kv_len)


# What to try, in order, where a kernel needs more shared memory than the GPU has.
_SMALLER: tuple[dict[str, Any], ...] = (
    {"num_stages": 2},
    {"num_stages": 1},
    {"num_stages": 1, "BLOCK_M": 64, "BLOCK_N": 64},
    {"num_stages": 1, "BLOCK_M": 32, "BLOCK_N": 32},
)
_TOO_LARGE = ("out of resource", "No valid triton configs", "OutOfResources")


class Launcher:
    """flex_attention compiled for one pattern, in a frame of its own.

    Dynamo counts recompilations by code object; a copy of the code keeps patterns from using up each other's
    budget, and fullgraph keeps a failure from turning into eager execution. ``kernel_options`` are the caller's;
    where a kernel does not fit the GPU's shared memory, smaller ones are tried and the choice is announced.
    """

    def __init__(self, compiled: bool, kernel_options: dict[str, Any] | None) -> None:
        attend = _torch.attend
        own = types.FunctionType(attend.__code__.replace(), attend.__globals__, "flexsparse_attend")
        self.run: Callable[..., Any] = torch.compile(own, fullgraph=True) if compiled else own
        self.compiled = compiled
        self.options = [kernel_options or {}]
        if not kernel_options:
            self.options += _SMALLER

    def __call__(
        self, work: Work, operands: tuple[Tensor, ...], score_mod: Any, mask: BlockMask, with_lse: bool
    ) -> Any:
        gqa = work.shapes.heads != work.shapes.kv_heads
        arguments = (*operands, score_mod, mask, work.scale, gqa, with_lse)
        if not self.compiled:
            with _torch.eager_gradients_on_cpu():
                return self.run(*arguments, None)
        while True:
            try:
                return self.run(*arguments, dict(self.options[0]) or None)
            except (torch._dynamo.exc.TorchDynamoException, RuntimeError, ValueError, NotImplementedError) as error:
                if not any(sign in str(error) for sign in _TOO_LARGE) or len(self.options) == 1:
                    raise _cannot_build(work, error) from error
            del self.options[0]
            warnings.warn(
                f"FlexAttention's kernel does not fit the shared memory of {work.shapes.device}; "
                f"building it with kernel_options={self.options[0]}.",
                BackendNotice,
                stacklevel=2,
            )


def _cannot_build(work: Work, error: BaseException) -> BackendError:
    return BackendError(
        "backend='flex'",
        got=f"{type(error).__name__}: {_first_line(error)}",
        expected=f"flex_attention to run here (torch {torch.__version__}, {work.shapes.device})",
        mend="Use backend='chunked', which is exact and slower, or pass fallback='reference' to allow the dense "
        "oracle; attn.source shows the generated functions.",
    )


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else "no message"


def attend_flex(
    work: Work,
    launcher: Launcher,
    operands: tuple[Tensor, Tensor, Tensor],
    tensors: tuple[Tensor, ...],
    recomputed: tuple[bool, ...],
    *,
    needs_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """out and, if needed, lse. ``recomputed`` marks the tensors whose gradients are computed without atomics."""
    inside = tuple(t.detach() if r else t for t, r in zip(tensors, recomputed, strict=True))
    functions = work.functions(inside)
    block_mask = make_block_mask(work.tiles, functions["mask_mod"])
    carried = any(r and t.requires_grad for t, r in zip(tensors, recomputed, strict=True))
    if functions["gated_score_mod"] is None:
        out, lse = launcher(work, operands, functions["score_mod"], block_mask, needs_lse or carried)
    else:
        _, lse = launcher(work, operands, functions["score_mod"], block_mask, True)
        gated, gated_lse = launcher(work, operands, functions["gated_score_mod"], block_mask, True)
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
