"""Selected keys as rows behind the keys themselves, for an attention that reads one row of tiles after another.

A chunk of queries has a copy of the keys in the slots as it starts; the keys that enter inside it are seen where they
are. Every pair counts once: near pairs in the key's own row, others where the first selection that has them does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from flexsparse.analysis.lists import Listed, Spans
from flexsparse.analysis.tiles import Tiles
from flexsparse.codegen.gathering.parts import near_mask, selected_mask
from flexsparse.ir.nodes import Apply, Node, SelectionNode
from flexsparse.ir.program import Held, Own, Program
from flexsparse.ir.simplify import simplify


@dataclass(frozen=True)
class Rows:
    """Where rows stand: ``length`` keys, then for each selection ``k`` slots of each chunk, all in whole tiles.

    ``chunk`` is a number of queries, a multiple of ``block``.
    """

    length: int
    block: int
    chunk: int
    ks: tuple[int, ...]
    afters: tuple[int, ...]

    @property
    def chunks(self) -> int:
        return -(-self.length // self.chunk)

    @property
    def padded(self) -> int:
        """Rows of the keys themselves, with those that fill their last tile."""
        return _whole(self.length, self.block)

    @property
    def widths(self) -> tuple[int, ...]:
        """Rows of a chunk's slots, by selection."""
        return tuple(_whole(k, self.block) for k in self.ks)

    @property
    def starts(self) -> tuple[int, ...]:
        """The first row of each selection, and the number of all rows."""
        return tuple(accumulate((width * self.chunks for width in self.widths), initial=self.padded))

    @property
    def total(self) -> int:
        return self.starts[-1]


def rows_of(selections: Sequence[SelectionNode], length: int, block: int) -> Rows:
    """The rows of a call. Chunks are half as long as they have slots: copies take twice the memory of the keys."""
    ks, afters = tuple(min(s.k, length) for s in selections), tuple(min(s.after, length) for s in selections)
    return Rows(length, block, _whole(-(-sum(ks) // 2), block), ks, afters)


def _whole(size: int, block: int) -> int:
    return -(-size // block) * block


def program_of_rows(program: Program) -> Program:
    """The program with a mask of rows: every pair that the program's mask allows is seen in one row of its key."""
    near = near_mask(program)
    mask: Node = Apply("and", (near, Own()))
    for n in range(len(program.selections)):
        mask = Apply("or", (mask, Apply("and", (Held(n), selected_mask(program, near, n)))))
    return replace(program, mask=simplify(mask))


def with_rows(near: Tiles, rows: Rows) -> Tiles:
    """The tiles of near pairs, the keys that enter inside a tile's chunk, and its chunk's slots that can be in use."""
    columns, device = rows.total // rows.block, near.partial.count.device
    more = torch.cat([_cells(*span, columns) for span in _spans(rows, device)])
    lead = near.partial.count.shape
    first = torch.arange(lead[0] * lead[1], device=device)[:, None] * (lead[2] * columns)
    partial, full = (_cells_of(tiles, columns) for tiles in (near.partial, near.full))
    partial = torch.cat((partial, (first + more).flatten())).unique()
    partial = partial[~torch.isin(partial, full)]
    # Whether what is added has all pairs of a tile, or none, is for the scores to say.
    undecided = near.undecided + len(partial) - int(near.partial.count.sum())
    return Tiles(
        _listed(partial, lead, columns),
        _listed(full, lead, columns),
        rows.block,
        replace(near.sizes, kv_len=rows.total),
        near.device,
        near.head_rows,
        undecided,
    )


def _spans(rows: Rows, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """First tile and number of tiles, for each tile of queries: what is fresh and what is in slots, by selection."""
    queries = torch.arange(0, rows.length, rows.block, device=device)
    chunk = queries // rows.chunk
    # The keys before this one, less ``after``, may be in slots as the chunk starts.
    behind = chunk * rows.chunk + 1
    last = (queries + rows.block).clamp(max=rows.length) - 1
    spans = []
    for k, after, width, start in zip(rows.ks, rows.afters, rows.widths, rows.starts, strict=False):
        low, high = (behind - after).clamp(min=0), last - after
        fresh = torch.where(high >= low, high // rows.block - low // rows.block + 1, 0)
        spans.append((low // rows.block, fresh))
        used = (behind - after).clamp(min=0, max=k)
        spans.append(((start + chunk * width) // rows.block, (used + rows.block - 1) // rows.block))
    return spans


def _cells(first: Tensor, count: Tensor, columns: int) -> Tensor:
    """Row-major numbers of the tiles of spans, one a row."""
    owner = torch.repeat_interleave(torch.arange(len(count), device=count.device), count)
    inside = torch.arange(len(owner), device=count.device) - (count.cumsum(0) - count)[owner]
    return owner * columns + first[owner] + inside


def _cells_of(tiles: Spans | Listed, columns: int) -> Tensor:
    b, h, row, column = tiles.listed().coordinates()
    _, heads, height = tiles.count.shape
    return ((b * heads + h) * height + row) * columns + column


def _listed(cells: Tensor, lead: torch.Size, columns: int) -> Listed:
    count = torch.bincount(cells // columns, minlength=lead.numel()).int().reshape(lead)
    return Listed(count, (cells % columns).int(), columns)
