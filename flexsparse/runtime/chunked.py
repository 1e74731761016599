"""The chunked path: exact attention in PyTorch, chunk by chunk of queries, in bounded memory, on any device.

A chunk is a block of queries of some rows and heads. Its keys are those that any of its queries sees, found
first among the tiles that are not EMPTY and then by the mask itself, so work follows the pattern. The backward
pass computes each chunk again. It runs the generated functions on broadcast index tensors, trains on CPU, and
takes float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flexsparse._torch import first_derivatives
from flexsparse.analysis.tiles import EMPTY, Tiles
from flexsparse.codegen.emitter import ARGUMENT
from flexsparse.runtime.inputs import Shapes
from flexsparse.runtime.numbers import as_it_is

# Elements of one chunk's score tile at most; some ten tensors of that size live at once.
_CHUNK_ELEMENTS = 1 << 21


@dataclass(frozen=True)
class Work:
    """What one call computes. ``build`` turns tensors (in the order of ``names``) into the generated functions.

    ``sequence_dims`` names, for each tensor, the dimensions that change with the lengths. ``sink`` says that the
    chunked path counts the pattern's sink itself.
    """

    shapes: Shapes
    tiles: Tiles
    scale: float
    names: tuple[str, ...]
    constants: dict[str, Any]
    build: Callable[..., dict[str, Any]]
    sequence_dims: tuple[tuple[int, ...], ...] = ()
    opaque: Mapping[str, Callable[..., Tensor]] = field(default_factory=dict)
    sink: bool = False

    def functions(self, tensors: tuple[Tensor, ...], *, broadcast: bool) -> dict[str, Any]:
        """The generated functions, of scalars or of broadcast index tensors; only untraced functions differ."""
        opaque = {name: broadcasting(f) if broadcast else f for name, f in self.opaque.items()}
        constants = self.constants
        if broadcast and ARGUMENT in constants:
            # Python's numbers are as exact as those that a pattern is written with.
            constants = {**constants, ARGUMENT: as_it_is}
        return self.build(**constants, **opaque, **dict(zip(self.names, tensors, strict=True)))


def broadcasting(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function of scalar tensors, applied to every element of tensors that broadcast together."""

    def applied(*args: Tensor) -> Tensor:
        shape = torch.broadcast_shapes(*(a.shape for a in args))
        return torch.vmap(function)(*(a.expand(shape).flatten() for a in args)).reshape(shape)

    return applied


@dataclass(frozen=True)
class _Chunk:
    """Slices of rows, KV heads and queries, and the keys that they see: [N] int64."""

    rows: slice
    kv_heads: slice
    queries: slice
    keys: Tensor


def attend_chunked(
    work: Work,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tensors: tuple[Tensor, ...],
    kept: list[Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """out [B, H, S_q, D_v] in query's dtype, and lse [B, H, S_q] in float32 (float64 for float64).

    ``kept`` are both where they are known, and only their gradients are wanted.
    """
    return _Chunked.apply(work, kept, query, key, value, *tensors)


def chunks(work: Work, functions: dict[str, Any]) -> Iterator[_Chunk]:
    """The chunks of a call in order; chunks that see nothing are left out."""
    shapes, kinds, block = work.shapes, work.tiles.kinds, work.tiles.block
    group = shapes.heads // shapes.kv_heads
    rows = [slice(0, shapes.batch)] if kinds.shape[0] == 1 else [slice(r, r + 1) for r in range(shapes.batch)]
    heads = [slice(0, shapes.kv_heads)]
    if kinds.shape[1] != 1:
        heads = [slice(n, n + 1) for n in range(shapes.kv_heads)]
    for row in rows:
        for head in heads:
            seen_rows = kinds if kinds.shape[0] == 1 else kinds[row]
            seen = seen_rows if kinds.shape[1] == 1 else seen_rows[:, head.start * group : head.stop * group]
            for tile in range(kinds.shape[2]):
                tiles = (seen[:, :, tile] != EMPTY).any(dim=(0, 1)).nonzero().flatten()
                keys = (tiles[:, None] * block + torch.arange(block, device=tiles.device)).flatten()
                keys = keys[keys < shapes.kv_len]
                if not len(keys):
                    continue
                first, last = tile * block, min((tile + 1) * block, shapes.q_len)
                cells = (row.stop - row.start) * (head.stop - head.start) * group
                step = max(1, min(block, _CHUNK_ELEMENTS // max(1, cells * len(keys))))
                for start in range(first, last, step):
                    queries = slice(start, min(start + step, last))
                    mask = functions["mask_mod"](*_indices(work, row, head, queries, keys))
                    visible = keys[mask.flatten(end_dim=-2).any(0).expand(len(keys))]
                    if len(visible):
                        yield _Chunk(row, head, queries, visible)


def _indices(work: Work, rows: slice, kv_heads: slice, queries: slice, keys: Tensor) -> tuple[Tensor, ...]:
    """b, h, q, kv as int64 tensors that broadcast to [B, H, C, N]."""
    group = work.shapes.heads // work.shapes.kv_heads
    device = keys.device
    b = torch.arange(rows.start, rows.stop, device=device).reshape(-1, 1, 1, 1)
    h = torch.arange(kv_heads.start * group, kv_heads.stop * group, device=device).reshape(1, -1, 1, 1)
    q = torch.arange(queries.start, queries.stop, device=device).reshape(1, 1, -1, 1)
    return b, h, q, keys.reshape(1, 1, 1, -1)


def _attend(
    work: Work, chunk: _Chunk, functions: dict[str, Any], query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor]:
    """One chunk: query [B, H, C, D], key and value [B, H_kv, N, .] of the chunk, in the accumulation dtype.

    Autocast, which would round the products, is off.
    """
    with torch.autocast(query.device.type, enabled=False):
        return _attended(work, chunk, functions, query, key, value)


def _attended(
    work: Work, chunk: _Chunk, functions: dict[str, Any], query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor]:
    weights, lse = _weights(work, chunk, functions, query, key)
    if functions["value_gate"] is not None:
        at = _indices(work, chunk.rows, chunk.kv_heads, chunk.queries, chunk.keys)
        weights = weights * functions["value_gate"](*at).to(weights.dtype)
    return (weights.unflatten(1, (key.shape[1], -1)) @ value.unsqueeze(2)).flatten(1, 2), lse


def _weights(work: Work, chunk: _Chunk, functions: dict[str, Any], query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """The softmax [B, H, C, N] of a chunk, before any gate on V, and its lse [B, H, C]."""
    at = _indices(work, chunk.rows, chunk.kv_heads, chunk.queries, chunk.keys)
    grouped = query.unflatten(1, (key.shape[1], -1))
    scores = (grouped @ key.unsqueeze(2).transpose(-1, -2)).flatten(1, 2) * work.scale
    seen = functions["mask_mod"](*at)
    if functions["score_mod"] is not None:
        scores = functions["score_mod"](scores, *at)
    scores = scores.masked_fill(~seen, -torch.inf)
    top = scores.detach().amax(-1, keepdim=True)
    sink = sink_logits(functions, top, *at[:3]) if work.sink else None
    top = top if sink is None else torch.maximum(top, sink.detach())
    top = top.masked_fill(top == -torch.inf, 0.0)
    weights = torch.exp(scores - top)
    total = weights.sum(-1, keepdim=True)
    total = total if sink is None else total + torch.exp(sink - top)
    empty = total == 0
    safe = total.masked_fill(empty, 1.0)
    lse = (safe.log() + top).masked_fill(empty, -torch.inf).squeeze(-1)
    return weights / safe, lse


@torch.no_grad()
def mass_of_keys(work: Work, query: Tensor, key: Tensor, tensors: tuple[Tensor, ...]) -> Tensor:
    """What each key receives of every query's softmax, summed over queries: [B, H, S_kv], chunk by chunk."""
    real = torch.float64 if query.dtype is torch.float64 else torch.float32
    group = work.shapes.heads // work.shapes.kv_heads
    mass = query.new_zeros(work.shapes.batch, work.shapes.heads, work.shapes.kv_len, dtype=real)
    functions = work.functions(tensors, broadcast=True)
    for chunk in chunks(work, functions):
        mine, keys, _ = _sliced(chunk, query, key, key, group, real)
        with torch.autocast(query.device.type, enabled=False):
            weights, _ = _weights(work, chunk, functions, mine, keys)
        heads = slice(chunk.kv_heads.start * group, chunk.kv_heads.stop * group)
        mass[chunk.rows, heads].index_add_(2, chunk.keys, weights.sum(2))
    return mass


def sink_logits(functions: dict[str, Any], like: Tensor, b: Tensor, h: Tensor, q: Tensor) -> Tensor:
    """The sink's logit of the rows that the indices name, with the shape and dtype of ``like``."""
    sink: Tensor = functions["sink_logit"](like, b, h, q)
    return sink.to(like.dtype).expand(like.shape)


def row_indices(shapes: Shapes, device: torch.device) -> list[Tensor]:
    """b, h and q of every row, int64, that broadcast to [B, H, S_q]."""
    counts = (shapes.batch, shapes.heads, shapes.q_len)
    return [
        torch.arange(count, device=device).reshape([-1 if d == n else 1 for d in range(3)])
        for n, count in enumerate(counts)
    ]


def _sliced(chunk: _Chunk, query: Tensor, key: Tensor, value: Tensor, group: int, dtype: torch.dtype) -> list[Tensor]:
    """The chunk's own query, key and value, in the accumulation dtype."""
    heads = slice(chunk.kv_heads.start * group, chunk.kv_heads.stop * group)
    mine = [query[chunk.rows, heads, chunk.queries]]
    mine += [x[chunk.rows, chunk.kv_heads].index_select(2, chunk.keys) for x in (key, value)]
    return [x.to(dtype) for x in mine]


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, work: Work, kept: list[Tensor] | None, query: Tensor, key: Tensor, value: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, Tensor]:
        out, lse = kept or _forward(work, query, key, value, tensors)
        ctx.work = work
        ctx.save_for_backward(query, key, value, *tensors)
        return out, lse

    @staticmethod
    @first_derivatives
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Any, ...]:
        query, key, value, *tensors = ctx.saved_tensors
        wanted = ctx.needs_input_grad[2:]
        return (None, None, *gradients(ctx.work, query, key, value, tuple(tensors), wanted, grad_out, grad_lse))


def _forward(
    work: Work, query: Tensor, key: Tensor, value: Tensor, tensors: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    shapes = work.shapes
    real = torch.float64 if query.dtype is torch.float64 else torch.float32
    group = shapes.heads // shapes.kv_heads
    out = query.new_zeros(shapes.batch, shapes.heads, shapes.q_len, shapes.value_dim)
    lse = query.new_full((shapes.batch, shapes.heads, shapes.q_len), -torch.inf, dtype=real)
    functions = work.functions(tensors, broadcast=True)
    if work.sink:
        # Rows that no chunk reaches see no key, and the sink alone.
        lse.copy_(sink_logits(functions, lse, *row_indices(shapes, lse.device)))
    for chunk in chunks(work, functions):
        mine = _sliced(chunk, query, key, value, group, real)
        part, part_lse = _attend(work, chunk, functions, *mine)
        heads = slice(chunk.kv_heads.start * group, chunk.kv_heads.stop * group)
        out[chunk.rows, heads, chunk.queries] = part.to(out.dtype)
        lse[chunk.rows, heads, chunk.queries] = part_lse
    return out, lse


def gradients(
    work: Work,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tensors: tuple[Tensor, ...],
    wanted: tuple[bool, ...],
    grad_out: Tensor,
    grad_lse: Tensor,
) -> list[Tensor | None]:
    """Gradients of query, key, value and tensors where wanted, each chunk computed again; no atomics."""
    real = torch.float64 if query.dtype is torch.float64 else torch.float32
    group = work.shapes.heads // work.shapes.kv_heads
    leaves = tuple(t.detach().requires_grad_(w) for t, w in zip(tensors, wanted[3:], strict=True))
    totals = [
        torch.zeros_like(x, dtype=real) if w else None
        for x, w in zip((query, key, value, *tensors), wanted, strict=True)
    ]
    with torch.enable_grad():
        functions = work.functions(leaves, broadcast=True)
    # What flows into rows that no chunk reaches: the sink alone receives it.
    unseen = grad_lse.to(real, copy=True) if work.sink else None
    for chunk in chunks(work, functions):
        mine = _sliced(chunk, query, key, value, group, real)
        mine = [x.detach().requires_grad_(w) for x, w in zip(mine, wanted[:3], strict=True)]
        with torch.enable_grad():
            out, lse = _attend(work, chunk, functions, *mine)
        inputs = [x for x, w in zip((*mine, *leaves), wanted, strict=True) if w]
        heads = slice(chunk.kv_heads.start * group, chunk.kv_heads.stop * group)
        at = (chunk.rows, heads, chunk.queries)
        # An empty row's lse is constant; what flows into it stops here.
        flow = grad_lse[at].to(real).masked_fill(lse == -torch.inf, 0.0)
        if unseen is not None:
            unseen[at] = 0.0
        flows = [(x, g) for x, g in ((out, grad_out[at].to(real)), (lse, flow)) if x.requires_grad]
        outputs, incoming = zip(*flows, strict=True)
        found = iter(torch.autograd.grad(outputs, inputs, incoming, allow_unused=True))
        for position, total in enumerate(totals):
            part = next(found) if total is not None else None
            if total is None or part is None:
                continue
            if position == 0:
                total[at] += part
            elif position in (1, 2):
                total[chunk.rows, chunk.kv_heads].index_add_(2, chunk.keys, part)
            else:
                total += part
    if unseen is not None:
        _add_unseen(work, functions, leaves, totals[3:], unseen)
    originals = (query, key, value, *tensors)
    return [None if t is None else t.to(x.dtype) for t, x in zip(totals, originals, strict=True)]


def _add_unseen(
    work: Work, functions: dict[str, Any], leaves: tuple[Tensor, ...], totals: list[Tensor | None], flow: Tensor
) -> None:
    """Add to ``totals`` what ``flow`` [B, H, S_q] into the lse of rows without keys gives the sink's tensors."""
    with torch.enable_grad():
        sink = sink_logits(functions, flow, *row_indices(work.shapes, flow.device))
    wanted = [leaf for leaf, total in zip(leaves, totals, strict=True) if total is not None]
    if not sink.requires_grad or not wanted:
        return
    found = iter(torch.autograd.grad(sink, wanted, flow.masked_fill(torch.isneginf(sink), 0.0), allow_unused=True))
    for total in totals:
        part = next(found) if total is not None else None
        if total is not None and part is not None:
            total += part
