"""Which blocks of keys each query selects: its own, and the past blocks that score highest for it."""

from __future__ import annotations

import torch
from torch import Tensor

# Elements of one slab of block scores at most.
_SLAB = 1 << 22


@torch.no_grad()
def choose_blocks(query: Tensor, key: Tensor, k: int, block: int, score: str = "mean", q_offset: int = 0) -> Tensor:
    """Booleans [B, H, S_q, ceil(S_kv / block)]: the blocks of ``block`` keys that each query selects.

    query [B, H, S_q, D], key [B, H_kv, S_kv, D], H_kv dividing H; query i stands at position i + q_offset, which must
    lie below S_kv. A query selects its own block and the k past blocks with the largest scores, on ties the earlier.
    ``score`` is "mean", the product of the query with the mean of the block's keys (as in MoBA, arXiv 2502.13189), or
    "bounds", the largest product that any key between the block's elementwise minimum and maximum could have (as in
    Quest, arXiv 2406.10774). Scores are computed in float32, in float64 for float64, whatever autocast says, a slab of
    queries at a time; no gradient flows through the choice.
    """
    real = torch.float64 if query.dtype is torch.float64 else torch.float32
    batch, heads, q_len, _ = query.shape
    # Past blocks are whole, as queries lie below the key length; only a query's own block can be cut.
    whole = key.shape[2] // block
    columns = torch.arange(-(-key.shape[2] // block), device=query.device)
    chosen = torch.empty(batch, heads, q_len, len(columns), dtype=torch.bool, device=query.device)
    with torch.autocast(query.device.type, enabled=False):
        blocks = key[:, :, : whole * block].unflatten(2, (whole, block))
        step = max(1, _SLAB // max(1, batch * heads * whole))
        summary = _summary(blocks, score, real)
        for start in range(0, q_len, step):
            rows = query[:, :, start : start + step]
            own = (torch.arange(start, start + rows.shape[2], device=query.device) + q_offset) // block
            past = columns[:whole] < own.unsqueeze(-1)
            scores = _scores(rows.to(real), summary).masked_fill(~past, -torch.inf)
            # A stable descending sort puts the earlier block first on ties.
            best = scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]
            part = (columns == own.unsqueeze(-1)).expand(*rows.shape[:3], -1).clone()
            part[..., :whole] |= torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True) & past
            chosen[:, :, start : start + step] = part
    return chosen


def _summary(blocks: Tensor, score: str, real: torch.dtype) -> tuple[Tensor, ...]:
    """What is kept of blocks [B, H_kv, N, block, D]: their means, or least and greatest entries, [B, H_kv, N, D]."""
    if score == "mean":
        return (blocks.mean(3, dtype=real),)
    return blocks.amin(3).to(real), blocks.amax(3).to(real)


def _scores(query: Tensor, summary: tuple[Tensor, ...]) -> Tensor:
    """Scores [B, H, C, N] of queries [B, H, C, D]."""
    if len(summary) == 1:
        return _products(query, summary[0])
    least, greatest = summary
    # The larger of q * least and q * greatest is that with greatest where q is positive.
    return _products(query.clamp(min=0), greatest) + _products(query.clamp(max=0), least)


def _products(query: Tensor, summary: Tensor) -> Tensor:
    grouped = query.unflatten(1, (summary.shape[1], -1))
    return (grouped @ summary.unsqueeze(2).mT).flatten(1, 2)
