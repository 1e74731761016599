"""When the slots of a block get other keys, as a Triton kernel: until then their rows need not be loaded again."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import cdiv

from flexsparse.codegen.kernels.launch import launch
from flexsparse.codegen.kernels.record_layout import LOOKED_AHEAD

# Slots that are compared at a time.
_TOGETHER = 16


@triton.jit
def _least(a, b):
    return tl.minimum(a, b)


@triton.jit
def _next_changes(
    p_table, p_next, n_chunks, k, n_blocks, BLOCK: tl.constexpr, AHEAD: tl.constexpr, TOGETHER: tl.constexpr
):  # fmt: skip
    """For one block of slots, and AHEAD chunks from the last one back."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    end = tl.minimum((tl.program_id(2) + 1) * AHEAD, n_chunks)
    chunk = end - 1 - tl.arange(0, AHEAD)
    m_chunk = chunk >= tl.program_id(2) * AHEAD
    m_next = m_chunk & (chunk + 1 < end)
    changes = tl.zeros([AHEAD], tl.int32)
    for first in tl.static_range(0, BLOCK, TOGETHER):
        slot = block * BLOCK + first + tl.arange(0, TOGETHER)
        m_slot = (slot < k)[None, :]
        entry = p_table + (row * n_chunks + chunk)[:, None] * k + slot[None, :]
        here = tl.load(entry, mask=m_chunk[:, None] & m_slot, other=-1)
        there = tl.load(entry + k, mask=m_next[:, None] & m_slot, other=-1)
        changes += tl.sum((here != there).to(tl.int32), 1)
    # Behind the last chunk all is other.
    found = tl.where(m_next & (changes == 0), 2147483647, chunk + 1)
    found = tl.associative_scan(found, 0, _least)
    tl.store(p_next + (row * n_blocks + block) * n_chunks + chunk, found, mask=m_chunk)


def next_changes(table: Tensor, block: int) -> Tensor:
    """For every chunk the next at whose start a block of slots has other keys: [..., ceil(k / block), chunks] int32.

    table [..., chunks, k] int32: the key in each slot. A multiple of LOOKED_AHEAD counts as such a chunk, and so does
    the number of chunks. ``block`` is a multiple of 16.
    """
    chunks, k = table.shape[-2:]
    blocks, rows = cdiv(k, block), table.numel() // (chunks * k)
    found = torch.empty(*table.shape[:-2], blocks, chunks, dtype=torch.int32, device=table.device)
    launch(
        _next_changes, (rows, blocks, cdiv(chunks, LOOKED_AHEAD)), (table, found), (chunks, k, blocks), BLOCK=block,
        AHEAD=LOOKED_AHEAD, TOGETHER=_TOGETHER,
    )  # fmt: skip
    return found
