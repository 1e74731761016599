"""Rows gathered behind their keys, and what flows back: sums in a fixed order, without atomics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flexsparse._torch import first_derivatives
from flexsparse.codegen.gathering.rows import Rows
from flexsparse.ops.causal import CausalSelection
from flexsparse.ops.selection import slot_table


@dataclass(frozen=True)
class Tables:
    """For the heads that select for themselves (G of them): whose row each is, and when it stands for that key.

    ``key`` [B, G, rows] int32, 0 where a row is nobody's; ``from_`` and ``until`` like it, by selection; ``holders``
    [B, G, chunks, width] int32 by selection: the key in each slot of each chunk, -1 for none.
    """

    rows: Rows
    key: Tensor
    from_: tuple[Tensor, ...]
    until: tuple[Tensor, ...]
    holders: tuple[Tensor, ...]

    @property
    def heads(self) -> int:
        return self.key.shape[1]

    def gather(self, x: Tensor) -> Tensor:
        """x [B, H, S, D], G dividing H, as rows: [B, H, rows, D], with gradients."""
        gathered: Tensor = _Gather.apply(self, x)
        return gathered

    def gather_scores(self, u: Tensor) -> Tensor:
        """u [B, 1 or so, S] by row and by the heads of the tables: [B, G, rows]."""
        return self.gather(u.repeat_interleave(self.heads // u.shape[1], 1).unsqueeze(-1)).squeeze(-1)


def make_tables(rows: Rows, values: Mapping[str, Any]) -> Tables:
    """The tables of a call from its lifetimes: ``birth_n``, ``death_n`` and ``slot_n`` [B, 1 or H_kv or H, S]."""
    found = [CausalSelection(*(values[f"{name}_{n}"] for name in CausalSelection._fields)) for n in range(len(rows.ks))]
    heads = max(lives.birth.shape[1] for lives in found)
    found = [CausalSelection(*(x.repeat_interleave(heads // x.shape[1], 1) for x in lives)) for lives in found]
    device = found[0].birth.device
    starts = rows.chunk * torch.arange(rows.chunks, dtype=torch.int32, device=device)[:, None]
    key = torch.arange(rows.length, dtype=torch.int32, device=device).expand_as(found[0].birth)
    keys, spans, holders = [_filled(key, rows.padded)], [], []
    for k, width, lives in zip(rows.ks, rows.widths, found, strict=True):
        holder = _filled(slot_table(lives, k, rows.chunk), width, -1).contiguous()
        held = holder.clamp(min=0)
        gone = lives.death.gather(2, held.flatten(2).long()).view_as(held)
        gone = torch.where(holder >= 0, torch.minimum(gone, starts + rows.chunk), 0)
        # A key's own row stands for it until the next chunk starts, which finds it in a slot.
        later = (lives.birth + rows.chunk - 1) // rows.chunk * rows.chunk
        own = (lives.birth, torch.minimum(lives.death, later))
        spans.append((own, (starts.expand_as(held), gone)))
        keys.append(held.flatten(2))
        holders.append(holder)
    from_, until = (
        tuple(_placed(rows, n, own[end], slots[end]) for n, (own, slots) in enumerate(spans)) for end in (0, 1)
    )
    return Tables(rows, torch.cat(keys, 2), from_, until, tuple(holders))


def _filled(x: Tensor, size: int, value: int = 0) -> Tensor:
    return torch.nn.functional.pad(x, (0, size - x.shape[-1]), value=value)


def _placed(rows: Rows, n: int, own: Tensor, slots: Tensor) -> Tensor:
    """By row [B, G, rows]: numbers of the keys' own rows and of the slots of selection ``n``, 0 for the others."""
    placed = own.new_zeros(*own.shape[:2], rows.total)
    placed[:, :, : rows.length] = own
    placed[:, :, rows.starts[n] : rows.starts[n + 1]] = slots.flatten(2)
    return placed


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tables: Tables, x: Tensor) -> Tensor:
        batch, heads, length, size = x.shape
        ctx.tables, ctx.dtype = tables, x.dtype
        row = torch.arange(batch * heads, device=x.device).view(batch, heads, 1) * length
        at = row + tables.key.repeat_interleave(heads // tables.heads, 1)
        return x.reshape(-1, size).index_select(0, at.flatten()).view(batch, heads, -1, size)

    @staticmethod
    @first_derivatives
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        rows, real = ctx.tables.rows, torch.float64 if grad.dtype is torch.float64 else torch.float32
        grad = grad.contiguous()
        total = grad[:, :, : rows.length].to(real, memory_format=torch.contiguous_format, copy=True)
        for first, holder in zip(rows.starts, ctx.tables.holders, strict=False):
            if grad.is_cuda and real is torch.float32:
                from flexsparse.codegen.kernels.slot_sums import add_slot_sums as add
            else:
                add = add_slot_sums
            add(total, grad, first, holder)
        return None, total.to(ctx.dtype)


def add_slot_sums(total: Tensor, rows: Tensor, first: int, holder: Tensor) -> None:
    """What ``codegen.kernels.slot_sums`` computes, in PyTorch operations and any dtype; the same order of sums."""
    heads, length, size = total.shape[1:]
    n_chunks, width = holder.shape[2:]
    holder = holder.repeat_interleave(heads // holder.shape[1], 1).long()
    # One entry past the end takes what belongs to no key.
    found = total.new_zeros(*total.shape[:2], length + 1, size)
    running = total.new_zeros(*total.shape[:2], width, size)
    for chunk in range(n_chunks):
        here = holder[:, :, chunk]
        then = holder[:, :, chunk + 1] if chunk + 1 < n_chunks else torch.full_like(here, -1)
        running = running + rows[:, :, first + chunk * width :][:, :, :width].to(total.dtype)
        to = torch.where((here != then) & (here >= 0), here, length)
        found.scatter_(2, to.unsqueeze(-1).expand_as(running), running)
        running = torch.where((here == then).unsqueeze(-1), running, 0.0)
    total += found[:, :, :length]
