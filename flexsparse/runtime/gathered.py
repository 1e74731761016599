"""Attention by kernels that gather selected rows: forward and every gradient, in a fixed order, without atomics."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from flexsparse.codegen.block_mask import block_lists
from flexsparse.codegen.gathered import GatheredSource, load_module
from flexsparse.codegen.gathering.tiles import row_fields
from flexsparse.codegen.kernels.launch import launch
from flexsparse.ir.nodes import SelectionNode
from flexsparse.ops.causal import CausalSelection
from flexsparse.ops.selection import slot_table
from flexsparse.runtime.chunked import Work
from flexsparse.runtime.gathered_sizes import KERNELS, Sizes, padded, sizes_of
from flexsparse.runtime.inputs import Shapes
from flexsparse.runtime.slot_records import slot_records
from flexsparse.settings import CHUNK

# Programs that keep every multiprocessor busy; spans of chunks are cut until there are so many.
_BUSY = 512
# Slots whose spans one program joins: more would not fit its registers.
_JOINED = 16


@dataclass(frozen=True)
class GatheredCall:
    """Everything but query, key, value and the scores that the kernels of one call read.

    ``values`` are those of ``make_buffers``; ``lists`` the block mask of what is near, in tiles of CHUNK; ``sizes`` the
    tiles of each kernel.
    """

    source: GatheredSource
    shapes: Shapes
    scale: float
    values: Mapping[str, Any]
    lists: tuple[Tensor, ...]
    ks: tuple[int, ...]
    afters: tuple[int, ...]
    sizes: Mapping[str, Sizes]

    @property
    def module(self) -> ModuleType:
        return load_module(self.source.text)

    @property
    def chunks(self) -> int:
        return -(-self.shapes.q_len // CHUNK)


def attend_gathered(
    call: GatheredCall, query: Tensor, key: Tensor, value: Tensor, kept: list[Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """out [B, H, S, D_v] in query's dtype and lse [B, H, S] float32, with gradients to all of them, u and tau.

    Where each query head selects for itself, a key has a slot for each of them: key and value are repeated to H heads.
    An empty list ``kept`` receives what the backward pass wants of the forward pass; given such a list, the kernels
    of the forward pass do not run again.
    """
    shapes = call.shapes
    if any(call.values[f"birth_{n}"].shape[1] not in (1, shapes.kv_heads) for n in range(len(call.ks))):
        key, value = (x.repeat_interleave(shapes.heads // shapes.kv_heads, 1) for x in (key, value))
        call = replace(call, shapes=replace(shapes, kv_heads=shapes.heads))
    thresholds = [call.values[f"tau_{n}"] for n in call.source.shifted]
    scores = [call.values[f"u_{n}"] for n in call.source.gated]
    return _Gathered.apply(call, kept, query, key, value, *scores, *thresholds)


def make_call(
    source: GatheredSource, work: Work, values: Mapping[str, Any], selections: tuple[SelectionNode, ...]
) -> GatheredCall:
    """The call of ``work``, whose tiles are those of the near mask in tiles of CHUNK."""
    ks, afters = call_sizes(selections, work.shapes)
    sizes = {kernel: sizes_of(kernel, work.shapes) for kernel in KERNELS}
    return GatheredCall(source, work.shapes, work.scale, values, block_lists(work.tiles), ks, afters, sizes)


def call_sizes(selections: tuple[SelectionNode, ...], shapes: Shapes) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """``k`` and ``after`` of each selection, no greater than the sequence is long."""
    size = shapes.kv_len
    return tuple(min(s.k, size) for s in selections), tuple(min(s.after, size) for s in selections)


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
        query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
        arguments = _arguments(call, query, key, value, scores)
        out, lse, level, share = kept or _forward(call, query, arguments)
        if kept is not None and not kept:
            kept += (out, lse, level, share)
        ctx.save_for_backward(query, key, value, out, level, share, *scores)
        ctx.call, ctx.tables = call, {n: arguments[f"p_slots_{n}"] for n in range(len(call.ks))}
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor, d_lse: Tensor) -> tuple[Any, ...]:
        query, key, value, out, level, share, *scores = ctx.saved_tensors
        call, shapes = ctx.call, ctx.call.shapes
        d_out = d_out if d_out.stride(-1) == 1 else d_out.contiguous()
        strides = dict(zip(("stride_ob", "stride_oh", "stride_os"), d_out.stride(), strict=False))
        arguments = _arguments(call, query, key, value, tuple(scores), ctx.tables)
        rows = _row_records(call, arguments, out, d_out, d_lse, level, share)
        arguments |= {"p_d_out": d_out, "p_rows": rows, **strides}
        pairs = (shapes.batch, shapes.kv_heads, shapes.kv_len)
        d_key = torch.empty_like(key, memory_format=torch.contiguous_format)
        d_value = torch.empty_like(value, memory_format=torch.contiguous_format)
        d_u = {n: query.new_empty(pairs, dtype=torch.float32) for n in call.source.gated}
        d_tau = {n: torch.empty_like(level) for n in call.source.shifted}
        # The first selection's share waits where the sum will stand.
        shares = {
            n: (d_key, d_value) if n == 0 else (torch.empty_like(d_key), torch.empty_like(d_value))
            for n in range(len(call.ks))
        }
        part_u = {
            (n, m): query.new_empty(pairs, dtype=torch.float32)
            for n, own in call.source.slot_gates.items()
            for m in own
        }
        for n, part in shares.items():
            _gather_slots(call, n, arguments, part, {m: x for (of, m), x in part_u.items() if of == n})
        d_query = torch.empty_like(query, memory_format=torch.contiguous_format)
        launch(
            call.module.query_gradient, (call.chunks, shapes.heads, shapes.batch), **arguments, **_lists(call, 0),
            p_d_query=d_query, **{f"p_d_tau_{n}": d for n, d in d_tau.items()},
            **_constants(call.sizes["query"], shapes),
        )  # fmt: skip
        parts = {f"p_part_key_{n}": part[0] for n, part in shares.items()}
        parts |= {f"p_part_value_{n}": part[1] for n, part in shares.items()}
        parts |= {f"p_part_u_{n}_{m}": x for (n, m), x in part_u.items()}
        sizes = call.sizes["key"]
        grid = (-(-shapes.kv_len // sizes.keys), shapes.kv_heads, shapes.batch)
        launch(
            call.module.key_gradient, grid, **arguments, **_lists(call, 4), **parts, p_d_key=d_key, p_d_value=d_value,
            **{f"p_d_u_{n}": d for n, d in d_u.items()}, **_constants(sizes, shapes),
        )  # fmt: skip
        found = [_over_heads(d_u[n], call.values[f"u_{n}"]) for n in call.source.gated]
        found += [_over_heads(d_tau[n], call.values[f"tau_{n}"]) for n in call.source.shifted]
        return None, None, d_query, d_key, d_value, *found


def _row_records(
    call: GatheredCall,
    arguments: Mapping[str, Any],
    out: Tensor,
    d_out: Tensor,
    d_lse: Tensor,
    level: Tensor,
    share: Tensor,
) -> Tensor:
    """``row_fields`` of every query: [B, H, S, fields] float32."""
    shapes, shifted = call.shapes, call.source.shifted
    rows = level.new_empty(*level.shape, len(row_fields(shifted)))
    thresholds = {f"{what}_{n}": arguments[f"{what}_{n}"] for n in shifted for what in _THRESHOLDS}
    strides = dict(zip(("stride_ob", "stride_oh", "stride_os"), d_out.stride(), strict=False))
    launch(
        call.module.row_products, (-(-shapes.q_len // 32), shapes.heads, shapes.batch), p_out=out, p_d_out=d_out,
        **strides, p_d_lse=d_lse.contiguous(), p_level=level, p_share=share, p_rows=rows, length=shapes.q_len,
        heads=shapes.heads, **thresholds, VALUE_DIM=shapes.value_dim, BLOCK_V=padded(shapes.value_dim), ROWS=32,
    )  # fmt: skip
    return rows


def _forward(call: GatheredCall, query: Tensor, arguments: Mapping[str, Any]) -> list[Tensor]:
    """out, lse, and by query what the softmax is measured against: ``level``, and ``share``, 1 / its sum."""
    shapes = call.shapes
    out = query.new_empty(shapes.batch, shapes.heads, shapes.q_len, shapes.value_dim)
    lse, level, share = (query.new_empty(out.shape[:3], dtype=torch.float32) for _ in range(3))
    launch(
        call.module.forward, (call.chunks, shapes.heads, shapes.batch), **arguments, **_lists(call, 0), p_out=out,
        p_lse=lse, p_level=level, p_share=share, **_constants(call.sizes["forward"], shapes),
    )  # fmt: skip
    return [out, lse, level, share]


def _over_heads(gradient: Tensor, of: Tensor) -> Tensor:
    """A gradient by head, summed over the heads that share a row of scores."""
    heads = of.shape[1]
    return gradient.unflatten(1, (heads, -1)).sum(2).to(of.dtype)


def _gather_slots(
    call: GatheredCall,
    n: int,
    arguments: Mapping[str, Any],
    part: tuple[Tensor, Tensor],
    part_u: Mapping[int, Tensor],
) -> None:
    """The gradients of selected keys from the chunks that gathered them, in spans of chunks that are then joined."""
    shapes, k = call.shapes, call.ks[n]
    sizes = call.sizes["slot"]
    blocks, pairs = -(-k // sizes.keys), shapes.batch * shapes.kv_heads
    spans = max(1, min(call.chunks, _BUSY // (blocks * pairs)))
    span = -(-call.chunks // spans)
    spans = -(-call.chunks // span)
    width = shapes.head_dim + shapes.value_dim + len(part_u)
    ends = torch.empty(pairs * spans * 2 * k * width if spans > 1 else 1, dtype=torch.float32, device=shapes.device)
    arguments = {**arguments, f"p_next_{n}": next_changes(arguments[f"p_slots_{n}"], sizes.keys)}
    own = {f"p_part_key_{n}": part[0], f"p_part_value_{n}": part[1], "p_ends": ends, "kv_heads": shapes.kv_heads}
    own |= {"span": span, "SPANS": spans, **{f"p_part_u_{n}_{m}": x for m, x in part_u.items()}}
    constants = _constants(sizes, shapes)
    launch(getattr(call.module, f"slot_gradient_{n}"), (blocks, spans, pairs), **arguments, **own, **constants)
    if spans > 1:
        forward = {name: x for name, x in arguments.items() if name not in _GRADIENTS}
        constants = _constants(replace(sizes, keys=_JOINED, registers=0), shapes)
        launch(getattr(call.module, f"join_spans_{n}"), (-(-k // _JOINED), pairs), **forward, **own, **constants)


_GRADIENTS = ("p_d_out", "p_rows", "stride_ob", "stride_oh", "stride_os")
_THRESHOLDS = ("p_tau", "p_least", "heads", "group")


def _arguments(
    call: GatheredCall,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scores: tuple[Tensor, ...],
    tables: Mapping[int, Tensor] | None = None,
) -> dict[str, Any]:
    shapes, values, source = call.shapes, call.values, call.source
    made: dict[str, Any] = {"p_query": query, "p_key": key, "p_value": value, "scale": call.scale}
    for name, tensor in (("q", query), ("k", key), ("v", value)):
        made |= {f"stride_{name}{dim}": tensor.stride(i) for i, dim in enumerate("bhs")}
    made |= {"length": shapes.q_len, "heads": shapes.heads, "group": shapes.heads // shapes.kv_heads}
    made["n_chunks"] = call.chunks
    names = [*(f"u_{n}" for n in source.gated), *(f"tau_{n}" for n in source.shifted)]
    gates = {name: tensor.float().contiguous() for name, tensor in zip(names, scores, strict=True)}
    for n, (k, after) in enumerate(zip(call.ks, call.afters, strict=True)):
        birth, death, slot = (values[f"{what}_{n}"] for what in ("birth", "death", "slot"))
        table = slot_table(CausalSelection(birth, death, slot), k, CHUNK) if tables is None else tables[n]
        made |= {f"p_birth_{n}": birth, f"p_death_{n}": death, f"p_slots_{n}": table, f"p_next_{n}": table}
        own = gates.get(f"u_{n}") if n in source.slot_gates[n] else None
        made[f"p_records_{n}"] = slot_records(table, death, own, CHUNK)
        made |= {f"heads_{n}": birth.shape[1], f"group_{n}": shapes.heads // birth.shape[1]}
        made |= {f"k_{n}": k, f"after_{n}": after}
        if n in source.shifted:
            made[f"p_least_{n}"] = values[f"least_{n}"].float().contiguous()
    made |= {f"p_{name}": tensor for name, tensor in gates.items()}
    for name, dims in source.captured:
        tensor = values[name]
        made |= {f"p_of_{name}": tensor, **{f"of_{name}_stride_{d}": tensor.stride(d) for d in range(dims)}}
    sizes = {**values, "q_len": shapes.q_len, "kv_len": shapes.kv_len, "heads": shapes.heads}
    made |= {name: eval(text, {"math": math, "min": min, "max": max, "abs": abs}, sizes) for name, text in
             source.numbers.items()}  # fmt: skip
    return made


def _lists(call: GatheredCall, first: int) -> dict[str, Any]:
    """The four lists from ``first`` on: partial and full tiles, of queries (0) or of keys (4)."""
    near_count, near_index, full_count, full_index = call.lists[first : first + 4]
    rows, heads = near_count.shape[:2]
    one_b, one_h = int(rows > 1), int(heads > 1)
    return {
        "p_near_count": near_count, "p_near_index": near_index, "p_full_count": full_count,
        "p_full_index": full_index, "count_b": one_b * near_count.stride(0), "count_h": one_h * near_count.stride(1),
        "index_b": one_b * near_index.stride(0), "index_h": one_h * near_index.stride(1),
        "index_row": near_index.stride(2),
    }  # fmt: skip


def next_changes(table: Tensor, block: int) -> Tensor:
    """For every chunk the next at whose start a block of slots has other keys: [..., ceil(k / block), chunks] int32.

    table [..., chunks, k]: the key in each slot. The number of chunks stands where no change follows.
    """
    chunks, k = table.shape[-2:]
    changed = torch.nn.functional.pad(table[..., 1:, :] != table[..., :-1, :], (0, -k % block))
    changed = changed.unflatten(-1, (-1, block)).any(-1).transpose(-1, -2)
    at = torch.arange(1, chunks, dtype=torch.int32, device=table.device)
    later = torch.where(changed, at, chunks).flip(-1).cummin(-1).values.flip(-1)
    return torch.nn.functional.pad(later, (0, 1), value=chunks).int().contiguous()


def _constants(sizes: Sizes, shapes: Shapes) -> dict[str, Any]:
    return {
        "HEAD_DIM": shapes.head_dim, "VALUE_DIM": shapes.value_dim,
        "BLOCK_D": padded(shapes.head_dim), "BLOCK_V": padded(shapes.value_dim),
        "BLOCK_M": CHUNK, "BLOCK_Q": sizes.queries, "BLOCK_N": sizes.keys,
        "PRECISION": "ieee" if shapes.dtype is torch.float32 else "tf32",
        "num_warps": sizes.warps, "num_stages": sizes.stages,
        # An option of NVIDIA's backend alone.
        **({"maxnreg": sizes.registers} if sizes.registers and torch.version.hip is None else {}),
    }  # fmt: skip
