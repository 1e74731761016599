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
_BLOCK = 1024


@triton.jit
def _records(
    p_table, p_death, p_u, p_records, times, n_chunks, k, CHUNK: tl.constexpr, SCORED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64)
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_entry = entry < n_chunks * k
    key = tl.load(p_table + row * n_chunks * k + entry, mask=m_entry, other=-1)
    m_key = key >= 0
    key = tl.maximum(key, 0)
    death = tl.load(p_death + row * times + key, mask=m_key, other=0)
    stays = tl.where(m_key, tl.minimum(death - entry // k * CHUNK, CHUNK), 0)
    bits = tl.zeros([BLOCK], tl.int32)
    if SCORED:
        u = tl.load(p_u + row * times + key, mask=m_key, other=0.0)
        # A key whose score is not a number is not selected; another's must not bring one.
        bits = tl.where(u == u, u, 0.0).to(tl.int32, bitcast=True)
    at = (row * n_chunks * k + entry)[:, None] * 2 + tl.arange(0, 2)[None, :]  # [BLOCK, 2]
    tl.store(p_records + at, tl.join(key | (stays << _KEY_BITS), bits), mask=m_entry[:, None])


def slot_records(table: Tensor, death: Tensor, u: Tensor | None, chunk: int) -> Tensor:
    """Two numbers for each slot of each chunk: [..., chunks, k, 2] int32.

    table [..., chunks, k] int32: the key in each slot, -1 for none; death [..., S] int32; u [..., S] float32 or none;
    ``chunk`` queries, at most 127. The first number is the key, and in the bits from ``KEY_BITS`` on for how many
    queries of the chunk it stays, 0 in an empty slot; the second is the bits of the key's score.
    """
    n_chunks, k = table.shape[-2:]
    times = death.shape[-1]
    records = torch.empty(*table.shape, 2, dtype=torch.int32, device=table.device)
    launch(
        _records, (cdiv(n_chunks * k, _BLOCK), death.numel() // times),
        (table, death, death if u is None else u, records), (times, n_chunks, k),
        CHUNK=chunk, SCORED=u is not None, BLOCK=_BLOCK,
    )  # fmt: skip
    return records
