"""Sums along the life of a key in its slot, as a Triton kernel."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from flexsparse.codegen.kernels.arithmetic import cdiv, next_power_of_2

# Elements of a program's tile.
_TILE = 2048


@triton.jit
def _slot_sums(
    p_rows, p_holder, p_total, n_chunks, width, n_rows, first, length, size, group,
    BLOCK: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """One block of slots from chunk to chunk: what a key has gathered is added to it as it leaves."""
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(1).to(tl.int64)
    feature = tl.program_id(2) * FEATURES + tl.arange(0, FEATURES)
    m_slot, m_feature = slot < width, feature < size
    holders = p_holder + row // group * n_chunks * width
    running = tl.zeros([BLOCK, FEATURES], tl.float32)
    holder = tl.load(holders + slot, mask=m_slot, other=-1)
    for chunk in range(n_chunks):
        at = ((row * n_rows + first + chunk * width) + slot)[:, None] * size + feature[None, :]
        m_row = (holder >= 0)[:, None] & m_feature[None, :]
        running += tl.load(p_rows + at, mask=m_row, other=0.0).to(tl.float32)
        later = (chunk + 1) * width + slot
        then = tl.load(holders + later, mask=m_slot & (later < n_chunks * width), other=-1)
        stays = (holder == then)[:, None]
        to = p_total + (row * length + tl.maximum(holder, 0))[:, None] * size + feature[None, :]
        # A key has one slot, and leaves it once: nobody else writes here.
        m_left = m_row & ~stays
        tl.store(to, tl.load(to, mask=m_left, other=0.0) + running, mask=m_left)
        running = tl.where(stays, running, 0.0)
        holder = then


def add_slot_sums(total: Tensor, rows: Tensor, first: int, holder: Tensor) -> None:
    """Add to total [B, H, S, D] float32 what the rows from ``first`` on of rows [B, H, N, D] hold for each key.

    holder [B, G, chunks, width] int32, G dividing H: the key in each slot of each chunk, -1 for none. All contiguous.
    Each key's rows are added up in the order of the chunks.
    """
    batch, heads, length, size = total.shape
    n_chunks, width = holder.shape[2:]
    features = min(next_power_of_2(size), 128)
    block = min(_TILE // features, 256)
    grid = (cdiv(width, block), batch * heads, cdiv(size, features))
    _slot_sums[grid](
        rows, holder, total, n_chunks, width, rows.shape[2], first, length, size, heads // holder.shape[1],
        BLOCK=block, FEATURES=features,
    )  # fmt: skip
