"""What a gather wants to know of the key in each slot, side by side.

That is one load where there were three, two of them from places that the first had to name.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import cdiv

from flexsparse.codegen.kernels.launch import launch
from flexsparse.codegen.kernels.record_layout import KEY_BITS

_KEY_BITS = tl.constexpr(KEY_BITS)
# Slots of a program, and chunks: many where there are many programs, for a key stays in its slot for long.
_BLOCK = 128
_FEW, _MANY = 4, 16
# Programs of four warps that keep a GPU busy.
_BUSY = 1024


@triton.jit
def _looked_up(p, key, changed, before):
    """What is kept of each key, looked up for those that are others than ``before``."""
    return tl.where(changed, tl.load(p + tl.maximum(key, 0), mask=changed & (key >= 0), other=0), before)


@triton.jit
def _put(p_records, entry, key, u, death, query, m_slot, CHUNK: tl.constexpr):
    stays = tl.where(key >= 0, tl.minimum(death - query, CHUNK), 0)
    # A key whose score is not a number is not selected; another's must not bring one.
    bits = tl.where((key >= 0) & (u == u), u, 0.0).to(tl.int32, bitcast=True)
    at = entry[:, None] * 2 + tl.arange(0, 2)[None, :]  # [BLOCK, 2]
    tl.store(p_records + at, tl.join(tl.maximum(key, 0) | (stays << _KEY_BITS), bits), mask=m_slot[:, None])


@triton.jit
def _records(
    p_table, p_death, p_u, p_records, times, n_chunks, k, CHUNK: tl.constexpr, SCORED: tl.constexpr,
    GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(2).to(tl.int64)
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_slot = slot < k
    p_death += row * times
    p_u += row * times
    latest = tl.full([BLOCK], -1, tl.int32)
    death = tl.zeros([BLOCK], tl.int32)
    u = tl.zeros([BLOCK], tl.float32)
    part = tl.program_id(1) * GROUP
    stop = tl.minimum(part + GROUP, n_chunks)
    while part < stop:
        # Two chunks at a time: what they load does not wait for one another.
        entry = (row * n_chunks + part) * k + slot
        m_next = m_slot & (entry + k < (row + 1) * n_chunks * k)
        first = tl.load(p_table + entry, mask=m_slot, other=-1)
        second = tl.load(p_table + entry + k, mask=m_next, other=-1)
        changed, again = first != latest, second != first
        death = _looked_up(p_death, first, changed, death)
        death_again = _looked_up(p_death, second, again, death)
        u_again = u
        if SCORED:
            u = _looked_up(p_u, first, changed, u)
            u_again = _looked_up(p_u, second, again, u)
        _put(p_records, entry, first, u, death, part * CHUNK, m_slot, CHUNK)
        _put(p_records, entry + k, second, u_again, death_again, (part + 1) * CHUNK, m_next, CHUNK)
        latest, death, u = second, death_again, u_again
        part += 2


def slot_records(table: Tensor, death: Tensor, u: Tensor | None, chunk: int) -> Tensor:
    """Two numbers for each slot of each chunk: [..., chunks, k, 2] int32.

    table [..., chunks, k] int32: the key in each slot, -1 for none; death [..., S] int32; u [..., S] float32 or none;
    ``chunk`` queries, at most 127. The first number is the key, and in the bits from ``KEY_BITS`` on for how many
    queries of the chunk it stays, 0 in an empty slot; the second is the bits of the key's score.
    """
    n_chunks, k = table.shape[-2:]
    times = death.shape[-1]
    records = torch.empty(*table.shape, 2, dtype=torch.int32, device=table.device)
    rows, blocks = death.numel() // times, cdiv(k, _BLOCK)
    group = _MANY if rows * blocks * n_chunks >= _MANY * _BUSY else _FEW
    launch(
        _records, (blocks, cdiv(n_chunks, group), rows), (table, death, death if u is None else u, records),
        (times, n_chunks, k), CHUNK=chunk, SCORED=u is not None, GROUP=group, BLOCK=_BLOCK,
    )  # fmt: skip
    return records
