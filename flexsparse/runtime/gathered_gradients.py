"""The backward pass of the kernels that gather: every gradient is written once, in a fixed order, without atomics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flexsparse.codegen.gathering.tiles import row_fields
from flexsparse.codegen.kernels.launch import launch
from flexsparse.codegen.kernels.recording import repeated
from flexsparse.runtime.gathered_arguments import (
    GatheredCall,
    arguments_of,
    constants_of,
    is_wide,
    lists_of,
    tensors_read,
    threads_assembled,
)
from flexsparse.runtime.gathered_sizes import padded
from flexsparse.runtime.next_changes import next_changes

# Programs that keep every multiprocessor busy; spans of chunks are cut until there are so many.
_BUSY = 512
# Slots whose spans one program joins: more would not fit its registers.
_JOINED = 16
# Queries of one program of ``row_products``.
_ROWS = 32
_THRESHOLDS = ("p_tau", "p_least", "heads", "group")


@dataclass(frozen=True)
class _Gradients:
    """Room for what is asked: those of query, key, value, and by selection those of scores and thresholds."""

    query: Tensor
    key: Tensor
    value: Tensor
    u: Mapping[int, Tensor]
    tau: Mapping[int, Tensor]

    @property
    def tensors(self) -> list[Tensor]:
        return [self.query, self.key, self.value, *self.u.values(), *self.tau.values()]


def gradients(
    call: GatheredCall,
    operands: Sequence[Tensor],
    gates: Sequence[Tensor],
    results: tuple[Tensor, Tensor, Tensor],
    d_out: Tensor,
    d_lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """d_query, d_key and d_value in their dtypes, and those of the gates [B, H_kv or H, S] float32, in their order.

    ``results`` of the forward pass: out, level and share.
    """
    out, level, share = results
    shapes, source = call.shapes, call.source
    d_out, d_lse = d_out if d_out.stride(-1) == 1 else d_out.contiguous(), d_lse.contiguous()
    d_query, d_key, d_value = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in operands)
    d_u = {n: d_key.new_empty(_pairs(call), dtype=torch.float32) for n in source.gated}
    made = _Gradients(d_query, d_key, d_value, d_u, {n: torch.empty_like(level) for n in source.shifted})
    read = tensors_read(call, operands, gates)

    def run() -> None:
        arguments = arguments_of(call, read)
        arguments["WIDE"] = arguments["WIDE"] or is_wide(out, d_out)
        thresholds = {f"{what}_{n}": arguments[f"{what}_{n}"] for n in source.shifted for what in _THRESHOLDS}
        flow = {"p_d_out": d_out, **dict(zip(("stride_ob", "stride_oh", "stride_os"), d_out.stride(), strict=False))}
        rows = level.new_empty(*level.shape, len(row_fields(source.shifted)))
        launch(
            call.module.row_products, (-(-shapes.q_len // _ROWS), shapes.heads, shapes.batch), **flow,
            p_out=out, p_d_lse=d_lse, p_level=level, p_share=share, p_rows=rows, length=shapes.q_len,
            heads=shapes.heads, **thresholds, VALUE_DIM=shapes.value_dim, BLOCK_V=padded(shapes.value_dim), ROWS=_ROWS,
            WIDE=arguments["WIDE"],
        )  # fmt: skip
        _of_keys(call, arguments, flow | {"p_rows": rows}, made)
        launch(
            call.module.query_gradient, (call.chunks, shapes.heads, shapes.batch), **arguments, **flow, p_rows=rows,
            **lists_of(call.lists[:4]), p_d_query=made.query, **{f"p_d_tau_{n}": d for n, d in made.tau.items()},
            **constants_of(call.sizes["query"], shapes),
        )  # fmt: skip

    given = [*read.values(), *call.lists, out, level, share, d_out, d_lse]
    repeated(("backward", call.key), given, made.tensors, run)
    return d_query, d_key, d_value, [*made.u.values(), *made.tau.values()]


def _pairs(call: GatheredCall) -> tuple[int, int, int]:
    return call.shapes.batch, call.shapes.kv_heads, call.shapes.kv_len


def _of_keys(call: GatheredCall, arguments: Mapping[str, Any], flow: Mapping[str, Any], made: _Gradients) -> None:
    """The gradients of keys, values and scores: those of slots first, which the keys' own tiles take over."""
    shapes, source = call.shapes, call.source
    parts: dict[str, Tensor] = {}
    for n in range(len(call.ks)):
        # The first selection's share waits where the sum will stand.
        pair = (made.key, made.value) if n == 0 else (torch.empty_like(made.key), torch.empty_like(made.value))
        own = {f"p_part_key_{n}": pair[0], f"p_part_value_{n}": pair[1]}
        for m in source.slot_gates[n]:
            own[f"p_part_u_{n}_{m}"] = made.key.new_empty(_pairs(call), dtype=torch.float32)
        _gather_slots(call, n, arguments, flow, own)
        parts |= own
    sizes = call.sizes["key"]
    launch(
        call.module.key_gradient, (-(-shapes.kv_len // sizes.keys), shapes.kv_heads, shapes.batch), **arguments,
        **flow, **lists_of(call.lists[4:]), **parts, p_d_key=made.key, p_d_value=made.value,
        **{f"p_d_u_{n}": d for n, d in made.u.items()}, **constants_of(sizes, shapes),
    )  # fmt: skip


def _gather_slots(
    call: GatheredCall, n: int, arguments: Mapping[str, Any], flow: Mapping[str, Any], parts: Mapping[str, Tensor]
) -> None:
    """The gradients of selected keys from the chunks that gathered them, in spans of chunks that are then joined."""
    shapes, k = call.shapes, call.ks[n]
    sizes = call.sizes["slot"]
    blocks, pairs = -(-k // sizes.keys), shapes.batch * shapes.kv_heads
    spans = max(1, min(call.chunks, _BUSY // (blocks * pairs)))
    span = -(-call.chunks // spans)
    spans = -(-call.chunks // span)
    # Besides the rows of a key and a value, a number for each gate.
    width = shapes.head_dim + shapes.value_dim + len(parts) - 2
    ends = torch.empty(pairs * spans * 2 * k * width if spans > 1 else 1, dtype=torch.float32, device=shapes.device)
    own = {**parts, "p_ends": ends, "kv_heads": shapes.kv_heads, "span": span, "SPANS": spans}
    changes = {f"p_next_{n}": next_changes(call.tables[n], sizes.keys)}
    launch(
        getattr(call.module, f"slot_gradient_{n}"), (blocks, spans, pairs), **{**arguments, **changes}, **flow, **own,
        **constants_of(sizes, shapes), THREADS=threads_assembled(sizes, shapes),
    )  # fmt: skip
    if spans > 1:
        constants = constants_of(replace(sizes, keys=_JOINED, registers=0), shapes)
        launch(getattr(call.module, f"join_spans_{n}"), (-(-k // _JOINED), pairs), **arguments, **own, **constants)
