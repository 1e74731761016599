"""Tiles counted query by query: exact for masks that are solved for kv, where ranges of queries say little.

A mask such as ``column == hash(row)`` shows few keys to each query and any key to a range of queries: nothing is
learned from a tile as a whole. But the keys of one query are a few intervals, and their lengths add up to the tile's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flexsparse.analysis.bands import rows
from flexsparse.analysis.region import Bounds, Region
from flexsparse.ir.nodes import Node

# Queries that one mask may have solved, and tiles that it may have counted.
_QUERIES, _TILES = 1 << 18, 1 << 22


def pairs_seen(mask: Node, region: Region, starts: Tensor, end: int, block: int) -> Tensor | None:
    """How many pairs of each tile are seen, [B, H, R, T_kv], for rows of tiles whose first queries are ``starts`` [R].

    ``end`` is behind the last query. None where there would be too much to count, or where the keys of a single query
    are not known exactly.
    """
    batch, heads = (region.ranges[name].low.numel() for name in ("b", "h"))
    count, columns = batch * heads * len(starts), -(-region.sizes["kv_len"] // block)
    if count * block > _QUERIES or count * columns > _TILES:
        return None
    q = (starts[:, None] + torch.arange(block, device=starts.device)).flatten()
    at = q.clamp(max=end - 1).reshape(1, 1, -1)
    found = rows(mask, region.over({**region.ranges, "q": Bounds(at, at)}))
    may, must = found.may.canonical(), found.must.canonical()
    if not found.solved or not (torch.equal(may.low, must.low) and torch.equal(may.high, must.high)):
        return None
    shape = (batch, heads, len(q), must.slots)
    missing = (must.low > must.high).expand(shape) | (q >= end).reshape(1, 1, -1, 1)
    ends = ((must.low.expand(shape), 1), (must.high.expand(shape) + 1, -1))
    row = torch.arange(count, device=q.device).repeat_interleave(block * must.slots)
    # From key a on, a tile has block - a % block keys, and each tile behind it has block.
    changes = torch.zeros(count * (columns + 2), dtype=torch.long, device=q.device)
    for key, sign in ends:
        key = key.flatten().long()
        tile = row * (columns + 2) + key // block
        for where, keys in ((tile, block - key % block), (tile + 1, key % block)):
            changes.index_add_(0, where, (sign * keys).masked_fill(missing.flatten(), 0))
    return changes.reshape(batch, heads, len(starts), columns + 2).cumsum(-1)[..., :columns]
