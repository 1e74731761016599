"""Attention by kernels that gather selected rows: forward and every gradient, in a fixed order, without atomics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from flexsparse._torch import first_derivatives
from flexsparse.analysis.tiles import Tiles
from flexsparse.codegen.block_mask import block_lists
from flexsparse.codegen.gathered import GatheredSource
from flexsparse.codegen.kernels.launch import launch
from flexsparse.codegen.kernels.recording import repeated
from flexsparse.ir.nodes import SelectionNode
from flexsparse.ops.causal import CausalSelection
from flexsparse.ops.selection import slot_table
from flexsparse.runtime.gathered_arguments import (
    GatheredCall,
    arguments_of,
    constants_of,
    lists_of,
    tensors_read,
    threads_assembled,
)
from flexsparse.runtime.gathered_gradients import gradients
from flexsparse.runtime.gathered_sizes import KERNELS, programs_at_once, sizes_of
from flexsparse.runtime.inputs import Shapes
from flexsparse.settings import CHUNK

# Rows of these keep the level that near keys give them. Those of float32 raise it to be exact; float16 ends too soon.
HELD = (torch.bfloat16,)


def attend_gathered(
    call: GatheredCall,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kept: list[Tensor] | None = None,
    into: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """out [B, H, S, D_v] in query's dtype and lse [B, H, S] float32, with gradients to all of them, u and tau.

    Where each query head selects for itself, a key has a slot for each of them: key and value are repeated to H heads.
    An empty list ``kept`` receives what the backward pass wants of the forward pass; given such a list, the kernels
    of the forward pass do not run again. ``into``: room for out and lse, contiguous, of a call without gradients.
    """
    shapes = call.shapes
    if any(call.values[f"birth_{n}"].shape[1] not in (1, shapes.kv_heads) for n in range(len(call.ks))):
        key, value = (x.repeat_interleave(shapes.heads // shapes.kv_heads, 1) for x in (key, value))
        call = replace(call, shapes=replace(shapes, kv_heads=shapes.heads))
    scores = [call.values[name] for name in call.gate_names]
    if into is not None:
        out, lse, *_ = _forward(call, *_laid_out((query, key, value), scores), into)
        return out, lse
    return _Gathered.apply(call, kept, query, key, value, *scores)


def make_call(
    source: GatheredSource,
    shapes: Shapes,
    tiles: Tiles,
    scale: float,
    values: Mapping[str, Any],
    selections: tuple[SelectionNode, ...],
) -> GatheredCall:
    """The call of these sizes and values; ``tiles`` are those of the near mask in tiles of CHUNK."""
    ks, afters = call_sizes(selections, shapes)
    sizes = {kernel: sizes_of(kernel, shapes) for kernel in KERNELS}
    lists = block_lists(tiles.apart_from_entries(afters[0]) if source.joined else tiles)
    return GatheredCall(source, shapes, scale, values, tables_of(values, ks), lists, ks, afters, sizes)


def call_sizes(selections: tuple[SelectionNode, ...], shapes: Shapes) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """``k`` and ``after`` of each selection, no greater than the sequence is long."""
    size = shapes.kv_len
    return tuple(min(s.k, size) for s in selections), tuple(min(s.after, size) for s in selections)


def tables_of(values: Mapping[str, Any], ks: Sequence[int]) -> tuple[Tensor, ...]:
    """The slot table of each selection, in chunks of CHUNK queries: what came with the selection, or made here."""

    def table(n: int, k: int) -> Tensor:
        lives = CausalSelection(*(values[f"{what}_{n}"] for what in CausalSelection._fields))
        return slot_table(lives, k, CHUNK)

    return tuple(values[f"slots_{n}"] if f"slots_{n}" in values else table(n, k) for n, k in enumerate(ks))


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        call: GatheredCall,
        kept: list[Tensor] | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *scores: Tensor,
    ) -> Any:
        operands, gates = _laid_out((query, key, value), scores)
        out, lse, level, share = kept or _forward(call, operands, gates)
        if kept is not None and not kept:
            kept += (out, lse, level, share)
        ctx.save_for_backward(*operands, out, level, share, *gates)
        ctx.call, ctx.shapes = call, [(x.shape, x.dtype) for x in scores]
        return out, lse

    @staticmethod
    @first_derivatives
    def backward(ctx: Any, d_out: Tensor, d_lse: Tensor) -> tuple[Any, ...]:
        query, key, value, out, level, share, *gates = ctx.saved_tensors
        *found, d_gates = gradients(ctx.call, (query, key, value), gates, (out, level, share), d_out, d_lse)
        scores = [_over_heads(d, *of) for d, of in zip(d_gates, ctx.shapes, strict=True)]
        return None, None, *found, *scores


def _laid_out(operands: Sequence[Tensor], scores: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Query, key and value, and the scores of gates, as kernels read them."""
    return [x if x.stride(-1) == 1 else x.contiguous() for x in operands], [x.float().contiguous() for x in scores]


def _forward(
    call: GatheredCall,
    operands: Sequence[Tensor],
    gates: Sequence[Tensor],
    into: tuple[Tensor, Tensor] | None = None,
) -> list[Tensor]:
    """out, lse, and by query what the softmax is measured against: ``level``, and ``share``, 1 / its sum."""
    shapes, query = call.shapes, operands[0]
    read, lists = tensors_read(call, operands, gates), call.lists[:4]
    out, lse = into or rooms_for(query, shapes)
    results = {"p_out": out, "p_lse": lse, "p_level": torch.empty_like(lse), "p_share": torch.empty_like(lse)}
    sizes, marks = call.sizes["forward"], call.chunks * shapes.heads * shapes.batch

    def run() -> None:
        held = shapes.dtype in HELD and call.source.near
        given = {
            **arguments_of(call, read), **lists_of(lists), **results, **constants_of(sizes, shapes),
            "p_again": torch.empty(marks, dtype=torch.int32, device=query.device),
            "THREADS": threads_assembled(sizes, shapes),
        }  # fmt: skip
        launch(call.module.forward, (call.chunks, shapes.heads, shapes.batch), **given, HELD=held)
        if held:
            launch(call.module.forward_again, (min(marks, programs_at_once(query.device)),), **given, marks=marks)

    repeated(("forward", call.key), [*read.values(), *lists], list(results.values()), run)
    return list(results.values())


def rooms_for(query: Tensor, shapes: Shapes) -> tuple[Tensor, Tensor]:
    """Room for out [B, H, S, D_v] and lse [B, H, S] of a call."""
    rows = (shapes.batch, shapes.heads, shapes.q_len)
    return query.new_empty(*rows, shapes.value_dim), query.new_empty(rows, dtype=torch.float32)


def _over_heads(gradient: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """A gradient by head, summed over the heads that share a row of scores."""
    if gradient.shape[1] != shape[1]:
        gradient = gradient.unflatten(1, (shape[1], -1)).sum(2)
    return gradient.to(dtype)
