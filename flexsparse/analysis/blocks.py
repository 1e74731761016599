"""Blocks of keys that queries select, reduced to tiles: exact answers about whole tiles without S x S work."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class BlockCounts:
    """For each row of query tiles, how many of the blocks before a column some query, or every query, selects.

    ``some`` and ``every`` are [B, H, T_q, N + 1] int32; ``rows`` is the tile's number of queries, ``offset`` the
    position of query 0 and ``block`` the number of keys in a block.
    """

    some: Tensor
    every: Tensor
    rows: int
    offset: int
    block: int

    def bounds(
        self, b: Tensor, h: Tensor, q: tuple[Tensor, Tensor], kv: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Whether every pair, and whether some pair, of the queries ``q`` and keys ``kv`` (first, last) is selected.

        Exact for all queries of one tile; for a part of them sound.
        """
        row = (q[0] - self.offset) // self.rows
        first, last = kv[0] // self.block, kv[1] // self.block
        some, every = (x[b, h, row, last + 1] - x[b, h, row, first] for x in (self.some, self.every))
        one_tile = row == (q[1] - self.offset) // self.rows
        return one_tile & (every == last - first + 1), ~one_tile | (some > 0)


def block_counts(chosen: Tensor, rows: int, offset: int, block: int) -> BlockCounts:
    """From ``chosen`` [B, H, S_q, N] booleans, tiles having ``rows`` queries each, the last perhaps fewer."""
    whole = chosen.shape[2] // rows * rows
    body, tail = chosen[:, :, :whole].unflatten(2, (-1, rows)), chosen[:, :, whole:].unsqueeze(2)
    parts = [body, tail] if tail.shape[3] else [body]
    some, every = (torch.cat([f(part) for part in parts], 2) for f in (_some, _every))
    return BlockCounts(_before(some), _before(every), rows, offset, block)


def _some(tiles: Tensor) -> Tensor:
    return tiles.any(3)


def _every(tiles: Tensor) -> Tensor:
    return tiles.all(3)


def _before(marks: Tensor) -> Tensor:
    """Marks [.., N] to the number of them before each column, [.., N + 1] int32."""
    return torch.nn.functional.pad(marks.cumsum(-1, dtype=torch.int32), (1, 0))
