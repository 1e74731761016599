"""EMPTY, FULL or PARTIAL for every tile of queries x keys, as lists; no S x S work.

Masks are first solved for kv, one row of tiles at a time (``bands``). Tiles that this leaves open are decided
from bounds, and where those do not decide, by halving (``decide``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flexsparse.analysis.bands import rows
from flexsparse.analysis.blocks import block_counts
from flexsparse.analysis.bounds import Bounds, Region, bounds
from flexsparse.analysis.decide import EMPTY, FULL, PARTIAL, Boxes, decide
from flexsparse.analysis.intervals import Intervals, normal
from flexsparse.analysis.lists import Listed, Spans, from_mask, merged
from flexsparse.ir import nodes
from flexsparse.ir.nodes import Load, Node, walk
from flexsparse.ir.program import Chosen, Selected

__all__ = ["EMPTY", "FULL", "PARTIAL", "Sizes", "Tiles", "classify", "depends_on", "index_errors", "region_of"]


@dataclass(frozen=True)
class Sizes:
    """The lengths and counts that a mask may depend on."""

    batch: int
    heads: int
    q_len: int
    kv_len: int
    q_offset: int = 0


@dataclass(frozen=True)
class Tiles:
    """The tiles that are not EMPTY: ``partial`` and ``full`` list the key tiles of each row of query tiles.

    Rows are [B or 1, H or 1, ceil(q_len / block)]. Sound always: a tile in neither list has no pair, a FULL tile
    has all of them. ``undecided`` counts PARTIAL tiles that may be either; 0 means that the classes are exact.
    Tiles that hang over the end of the queries or keys are never FULL.
    """

    partial: Spans | Listed
    full: Spans | Listed
    block: int
    sizes: Sizes
    undecided: int = 0
    # Filled when first asked for: the dense grid, and the tensors of a block mask.
    _grid: list[Tensor] = field(default_factory=list, compare=False, repr=False)
    lists: list[Tensor] = field(default_factory=list, compare=False, repr=False)

    @property
    def q_tiles(self) -> int:
        return -(-self.sizes.q_len // self.block)

    @property
    def kv_tiles(self) -> int:
        return -(-self.sizes.kv_len // self.block)

    @property
    def kinds(self) -> Tensor:
        """The dense grid [B or 1, H or 1, T_q, T_kv] uint8, made when asked for; for pictures and small sizes."""
        if not self._grid:
            shape = (*self.partial.count.shape, self.kv_tiles)
            grid = torch.zeros(shape, dtype=torch.uint8, device=self.partial.count.device)
            for tiles, kind in ((self.partial, PARTIAL), (self.full, FULL)):
                grid[tiles.listed().coordinates()] = kind
            self._grid.append(grid)
        return self._grid[0]

    def count(self, kind: int) -> int:
        """How many tiles of a kind there are, over all rows and heads of the attention."""
        rows_, heads, _ = self.partial.count.shape
        copies = self.sizes.batch * self.sizes.heads // (rows_ * heads)
        partial, full = (int(x.count.sum(dtype=torch.long)) * copies for x in (self.partial, self.full))
        return {PARTIAL: partial, FULL: full, EMPTY: self.total - partial - full}[kind]

    @property
    def total(self) -> int:
        return self.sizes.batch * self.sizes.heads * self.q_tiles * self.kv_tiles


def depends_on(node: Node, symbol: str) -> bool:
    """Whether a flattened expression can change with the batch row ("b") or the head ("h")."""
    return nodes.depends_on(node, symbol) or any(isinstance(n, Selected) for n in walk(node))


def classify(
    mask: Node,
    sizes: Sizes,
    tensors: Mapping[str, Any] | None = None,
    *,
    block: int = 128,
    device: torch.device | str = "cpu",
) -> Tiles:
    """The class of every tile of a flattened mask.

    ``tensors`` holds the captured tensors, tables and, for selections, ``birth_n``, ``death_n`` and ``group_n``
    by name, and the blocks that queries chose. A mask that does not depend on the row (or the head) is classified
    for one.
    """
    device = torch.device(device)
    count = (
        sizes.batch if depends_on(mask, "b") else 1,
        sizes.heads if depends_on(mask, "h") else 1,
        -(-sizes.q_len // block),
    )
    known = dict(tensors or {})
    for topk in {n.topk for n in walk(mask) if isinstance(n, Chosen)}:
        known[f"{topk.name}_counts"] = block_counts(known[topk.name], block, sizes.q_offset, topk.block)
    region = region_of(sizes, known, count, block, device)
    found = rows(mask, region)
    may, must = (_expanded(x, count) for x in (found.may, found.must))
    touched = _touched(may, sizes.kv_len, block)
    full = _covered(must, sizes, block)
    open_spans = Spans(touched & ~full)
    open_tiles = open_spans.listed()
    if not len(open_tiles.column):
        return Tiles(open_spans, Spans(full), block, sizes)
    # Selections change with every call: their tiles are judged by bounds alone, which is sound and quick.
    exact = not any(isinstance(n, Selected | Chosen) for n in walk(mask))
    kind, undecided = decide(mask, _boxes(open_tiles, sizes, block), region, exact=exact)
    ragged = _ragged(open_tiles, sizes, block)
    kind = torch.where(ragged & (kind == FULL), PARTIAL, kind)
    if bool((kind == PARTIAL).all()):
        return Tiles(open_spans, Spans(full), block, sizes, undecided)
    partial = from_mask(open_tiles, kind == PARTIAL)
    all_full = merged(Spans(full), from_mask(open_tiles, kind == FULL))
    return Tiles(partial, all_full, block, sizes, undecided)


def region_of(
    sizes: Sizes, tensors: Mapping[str, Any], count: tuple[int, int, int], block: int, device: torch.device
) -> Region:
    """The ranges of every row of query tiles, ``count`` being [B, H, T_q]; kv ranges over all keys."""

    def points(number: int, *shape: int) -> Bounds:
        value = torch.arange(number, device=device).reshape(shape)
        return Bounds(value, value)

    starts = torch.arange(0, sizes.q_len, block, device=device)
    ends = (starts + block).clamp(max=sizes.q_len) - 1
    every_key = Bounds(torch.tensor(0, device=device), torch.tensor(sizes.kv_len - 1, device=device))
    ranges = {
        "b": points(count[0], -1, 1, 1),
        "h": points(count[1], 1, -1, 1),
        "q": Bounds((starts + sizes.q_offset).reshape(1, 1, -1), (ends + sizes.q_offset).reshape(1, 1, -1)),
        "kv": every_key,
    }
    return Region(ranges, _named(sizes), tensors, device)


def _named(sizes: Sizes) -> dict[str, int]:
    return {"q_len": sizes.q_len, "kv_len": sizes.kv_len, "heads": sizes.heads}


def _expanded(x: Intervals, count: tuple[int, int, int]) -> Intervals:
    shape = (*count, x.low.shape[-1])
    return Intervals(x.low.expand(shape), x.high.expand(shape), x.size)


def _touched(may: Intervals, kv_len: int, block: int) -> Intervals:
    """Tiles that hold a key of ``may``."""
    empty = may.low > may.high
    low = (may.low // block).masked_fill(empty, kv_len)
    high = (may.high // block).masked_fill(empty, -1)
    return normal(low, high, -(-kv_len // block))


def _covered(must: Intervals, sizes: Sizes, block: int) -> Intervals:
    """Whole tiles inside ``must``, the ragged ones left out."""
    low = (must.low + block - 1) // block
    high = (must.high + 1) // block - 1
    tiles = normal(low, high, -(-sizes.kv_len // block), apart=True)
    if sizes.q_len % block == 0:
        return tiles
    last = torch.arange(tiles.low.shape[-2], device=tiles.low.device) == tiles.low.shape[-2] - 1
    ragged = last.unsqueeze(-1)
    return Intervals(tiles.low.masked_fill(ragged, tiles.size), tiles.high.masked_fill(ragged, -1), tiles.size)


def _boxes(tiles: Listed, sizes: Sizes, block: int) -> Boxes:
    b, h, row, column = tiles.coordinates()
    q_low, kv_low = row * block + sizes.q_offset, column * block
    q_high = (q_low + block - 1).clamp(max=sizes.q_offset + sizes.q_len - 1)
    return Boxes(b, h, q_low, q_high, kv_low, (kv_low + block - 1).clamp(max=sizes.kv_len - 1))


def _ragged(tiles: Listed, sizes: Sizes, block: int) -> Tensor:
    """Which tiles hang over the end of the queries or keys."""
    _, _, row, column = tiles.coordinates()
    over_q = (row + 1) * block > sizes.q_len
    return over_q | ((column + 1) * block > sizes.kv_len)


def index_errors(node: Node, sizes: Sizes, tensors: Mapping[str, Tensor]) -> list[tuple[Load, int, int, int]]:
    """Look-ups that can leave their tensor: (look-up, dimension, least index, greatest index)."""
    loads = {n for n in walk(node) if isinstance(n, Load)}
    if not loads:
        return []
    # Where no index is itself looked up, the bounds are a few numbers, and the host finds them without waiting.
    nested = any(isinstance(n, Load) for load in loads for index in load.index for n in walk(index))
    device = next(iter(tensors.values())).device if nested else torch.device("cpu")

    def span(first: int, count: int) -> Bounds:
        return Bounds(torch.tensor(first, device=device), torch.tensor(first + count - 1, device=device))

    ranges = {
        "b": span(0, sizes.batch),
        "h": span(0, sizes.heads),
        "q": span(sizes.q_offset, sizes.q_len),
        "kv": span(0, sizes.kv_len),
    }
    region = Region(ranges, _named(sizes), tensors, device)
    found = []
    for load in loads:
        for dim, index in enumerate(load.index):
            reach = bounds(index, region)
            low, high = int(reach.low.min()), int(reach.high.max())
            if low < 0 or high >= tensors[load.tensor.name].shape[dim]:
                found.append((load, dim, low, high))
    return found
