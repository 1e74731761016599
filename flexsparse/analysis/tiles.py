"""EMPTY, FULL or PARTIAL for every tile of queries x keys, as lists; no S x S work.

Masks are first solved for kv, one row of tiles at a time (``bands``). Tiles that this leaves open are decided
from bounds, and where those do not decide, by halving (``decide``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from flexsparse.analysis.bands import rows
from flexsparse.analysis.blocks import block_counts
from flexsparse.analysis.bounds import bounds
from flexsparse.analysis.decide import EMPTY, FULL, PARTIAL, Boxes, Look, decide, look_at_grid
from flexsparse.analysis.edges import TileSets, query_ranges, ragged, tile_sets
from flexsparse.analysis.heads import first_alike
from flexsparse.analysis.lists import Listed, Spans, from_mask, merged, outside
from flexsparse.analysis.queries import pairs_seen
from flexsparse.analysis.region import Bounds, Region
from flexsparse.ir import nodes
from flexsparse.ir.nodes import Load, Node, Opaque, walk
from flexsparse.ir.program import Chosen, Selected, Tables, table_name

__all__ = ["EMPTY", "FULL", "PARTIAL", "Sizes", "Tiles", "classify", "depends_on", "index_errors", "region_of"]

# Rows of tiles up to this many are found on the host, for masks on an accelerator too. Beyond it a host would start
# threads for arrays of a few entries a row, and those cost more than an accelerator's calls.
_HOST_ROWS = 1 << 12
# Tiles that are looked at together where all tiles of a row are.
_GRID = 1 << 18
# Values of ``after`` whose tiles are kept; as a number of the call it may be another each time.
_KEPT = 4
# Tiles of all heads from which an untraced function is looked at on an accelerator. A look is made anew at each call,
# of many small operations: some 50 ms, in which an H200 computes so many tiles, forward and backward.
LOOKED_AT = 1 << 19
# Unknown tiles a row from which on its queries are solved one by one instead.
_MANY = 4


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

    Rows are [B or 1, distinct heads or 1, ceil(q_len / block)]; ``head_rows`` says which of them each head has, and
    is empty where the heads are in order or share one. Sound always: a tile in neither list has no pair, a FULL
    tile has all of them. ``undecided`` counts PARTIAL tiles of the rows that may be either; 0 means that the classes
    are exact. Tiles that hang over the end of the queries or keys are never FULL. The lists may live on the host.
    """

    partial: Spans | Listed
    full: Spans | Listed
    block: int
    sizes: Sizes
    device: torch.device
    head_rows: tuple[int, ...] = ()
    undecided: int = 0
    # Filled when first asked for: the dense grid, and the tensors of a block mask.
    _grid: list[Tensor] = field(default_factory=list, compare=False, repr=False)
    lists: list[Tensor] = field(default_factory=list, compare=False, repr=False)
    _apart: dict[int, Tiles] = field(default_factory=dict, compare=False, repr=False)

    @property
    def q_tiles(self) -> int:
        return -(-self.sizes.q_len // self.block)

    @property
    def kv_tiles(self) -> int:
        return -(-self.sizes.kv_len // self.block)

    @property
    def distinct_heads(self) -> int:
        """Heads with a mask of their own: how many were analysed."""
        return self.partial.count.shape[1]

    def apart_from_entries(self, after: int) -> Tiles:
        """Without the tiles that a row of tiles has the keys in which are ``after`` queries old in one of its queries.

        The first query of a row is left out: what is as old there was so before the row.
        """
        if after not in self._apart:
            # What is kept serves training as well, so it must not be made of inference tensors.
            with torch.inference_mode(False):
                first = torch.arange(self.q_tiles, device=self.partial.count.device) * self.block
                low, high = ((first + by - after).div(self.block, rounding_mode="floor") for by in (1, self.block - 1))
                partial, full = (outside(tiles, low, high) for tiles in (self.partial, self.full))
            if len(self._apart) >= _KEPT:
                self._apart.clear()
            self._apart[after] = replace(self, partial=partial, full=full, _grid=[], lists=[], _apart={})
        return self._apart[after]

    @property
    def kinds(self) -> Tensor:
        """The dense grid [B or 1, H or 1, T_q, T_kv] uint8, made when asked for; for pictures and small sizes."""
        if not self._grid:
            shape = (*self.partial.count.shape, self.kv_tiles)
            grid = torch.zeros(shape, dtype=torch.uint8, device=self.partial.count.device)
            for tiles, kind in ((self.partial, PARTIAL), (self.full, FULL)):
                grid[tiles.listed().coordinates()] = kind
            grid = grid.to(self.device)
            self._grid.append(grid[:, list(self.head_rows)] if self.head_rows else grid)
        return self._grid[0]

    def count(self, kind: int) -> int:
        """How many tiles of a kind there are, over all rows and heads of the attention."""
        partial, full = (self._counted(x) for x in (self.partial, self.full))
        return {PARTIAL: partial, FULL: full, EMPTY: self.total - partial - full}[kind]

    def _counted(self, tiles: Spans | Listed) -> int:
        rows_, heads, _ = tiles.count.shape
        by_head = tiles.count.sum((0, 2), dtype=torch.long).tolist()
        heads_of = self.head_rows or range(heads)
        return sum(by_head[row] for row in heads_of) * (self.sizes.batch // rows_) * (self.sizes.heads // len(heads_of))

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
    tables: Tables = (),
) -> Tiles:
    """The class of every tile of a flattened mask.

    ``tensors`` holds the captured tensors and, for selections, ``birth_n``, ``death_n`` and ``group_n`` by name,
    and the blocks that queries chose;
    ``tables`` the numbers of the ``per_head`` lists. A mask that does not depend on the row is classified for one,
    and once for each head whose mask differs. Results are on ``device``, or on the host where they are few.
    """
    device = torch.device(device)
    first = first_alike(mask, tables, sizes.heads)
    heads = sorted(set(first))
    count = (sizes.batch if depends_on(mask, "b") else 1, len(heads), -(-sizes.q_len // block))
    head_rows = tuple(heads.index(head) for head in first) if 1 < len(heads) < sizes.heads else ()
    # An accelerator takes longer to be asked for a few numbers than the host takes to find them.
    topks = {n.topk for n in walk(mask) if isinstance(n, Chosen)}
    home = torch.device("cpu") if math.prod(count) <= _HOST_ROWS and not topks else device
    known = dict(tensors or {})
    for topk in topks:
        known[f"{topk.name}_counts"] = block_counts(known[topk.name], block, sizes.q_offset, topk.block)
    region = region_of(sizes, _with_numbers(known, tables, home), count[0], heads, block, home)
    found = rows(mask, region)
    sets = tile_sets(found.keys, count, sizes.q_len, sizes.kv_len, block)
    if sets.unknown is None:
        return Tiles(Spans(sets.partial), Spans(sets.full), block, sizes, device, head_rows)
    if home != device:
        region = region_of(sizes, _with_numbers(known, tables, device), count[0], heads, block, device)
    partial, full, undecided = _decided(mask, sets, sizes, region, block, solved=found.solved)
    return Tiles(partial, full, block, sizes, device, head_rows, undecided)


def _decided(
    mask: Node, sets: TileSets, sizes: Sizes, region: Region, block: int, *, solved: bool
) -> tuple[Spans | Listed, Spans | Listed, int]:
    """The PARTIAL and the FULL tiles once the unknown ones were examined one by one, and how many stay undecided."""
    assert sets.unknown is not None
    unknown = Spans(sets.unknown.to(region.device)).listed()
    kind, undecided = _counted(mask, unknown, sizes, region, block) if solved else None, 0
    if kind is None:
        kind, undecided = _looked_at(mask, unknown, sizes, region, block)
    partial, full = (
        merged(Spans(known.to(region.device)), from_mask(unknown, kind == wanted))
        for known, wanted in ((sets.partial, PARTIAL), (sets.full, FULL))
    )
    return partial, full, undecided


def _counted(mask: Node, tiles: Listed, sizes: Sizes, region: Region, block: int) -> Tensor | None:
    """The kinds of listed tiles from what each query sees; None where looking at the tiles is easier."""
    b, h, row, column = tiles.coordinates()
    used = (tiles.count > 0).any(0).any(0).nonzero().flatten()
    if len(row) <= _MANY * len(used):
        return None
    starts = used * block + sizes.q_offset
    seen = pairs_seen(mask, region, starts, sizes.q_offset + sizes.q_len, block)
    if seen is None:
        return None
    pairs = seen[b, h, torch.searchsorted(used, row), column]
    return torch.where(pairs == block * block, FULL, torch.where(pairs == 0, EMPTY, PARTIAL))


def _looked_at(mask: Node, tiles: Listed, sizes: Sizes, region: Region, block: int) -> tuple[Tensor, int]:
    """The kinds of listed tiles by looks at them, and how many stay undecided."""
    at = tiles.coordinates()
    _, _, row, column = at
    b, h = region.ranges["b"].low.flatten(), region.ranges["h"].low.flatten()
    boxes = _boxes(b[at[0]], h[at[1]], row, column, sizes, block)
    # Selections change with every call: their tiles are judged by bounds alone, which is sound and quick.
    exact = not any(isinstance(n, Selected | Chosen) for n in walk(mask)) and _repays(mask, tiles, sizes, region.device)
    look = None
    if exact and _fills_its_grid(mask, tiles):
        look = _look_by_rows(mask, tiles, sizes, block, region).at(at)
    kind, undecided = decide(mask, boxes, region, exact=exact, look=look)
    over = ragged(row, column, sizes.q_len, sizes.kv_len, block)
    return torch.where(over & (kind == FULL), PARTIAL, kind), undecided


def _with_numbers(tensors: Mapping[str, Any], tables: Tables, device: torch.device) -> dict[str, Any]:
    """The tensors with the ``per_head`` lists of integers on ``device``; those of reals come as a call has them."""
    made = {table_name(number): values for number, values in enumerate(tables)}
    here = {name: v for name, v in made.items() if name not in tensors or all(isinstance(x, int) for x in v)}
    return {**tensors, **{name: torch.tensor(values, device=device) for name, values in here.items()}}


def region_of(
    sizes: Sizes, tensors: Mapping[str, Any], batch: int, heads: list[int], block: int, device: torch.device
) -> Region:
    """The rows of tiles of ``batch`` rows and of these heads; kv ranges over all keys."""
    b = torch.arange(batch, device=device).reshape(-1, 1, 1)
    h = torch.tensor(heads, device=device).reshape(1, -1, 1)
    ranges = {
        "b": Bounds(b, b),
        "h": Bounds(h, h),
        "q": query_ranges(sizes.q_len, block, sizes.q_offset, device),
        "kv": Bounds(torch.tensor(0, device=device), torch.tensor(sizes.kv_len - 1, device=device)),
    }
    return Region(ranges, _named(sizes), tensors, device)


def _named(sizes: Sizes) -> dict[str, int]:
    return {"q_len": sizes.q_len, "kv_len": sizes.kv_len, "heads": sizes.heads}


def _boxes(b: Tensor, h: Tensor, row: Tensor, column: Tensor, sizes: Sizes, block: int) -> Boxes:
    q_low, kv_low = row * block + sizes.q_offset, column * block
    q_high = (q_low + block - 1).clamp(max=sizes.q_offset + sizes.q_len - 1)
    return Boxes(b, h, q_low, q_high, kv_low, (kv_low + block - 1).clamp(max=sizes.kv_len - 1))


def _repays(mask: Node, tiles: Listed, sizes: Sizes, device: torch.device) -> bool:
    """Whether knowing the kinds of tiles saves more than looking at them takes."""
    if device.type == "cpu" or not any(isinstance(n, Opaque) for n in walk(mask)):
        return True
    batch, heads, _ = tiles.count.shape
    return len(tiles.column) * (sizes.batch // batch) * (sizes.heads // heads) >= LOOKED_AT


def _fills_its_grid(mask: Node, tiles: Listed) -> bool:
    """Whether a look at every tile costs less than at those listed; untraced functions are looked at one by one."""
    opaque = any(isinstance(n, Opaque) for n in walk(mask))
    return not opaque and 8 * len(tiles.column) >= tiles.count.numel() * tiles.columns


def _look_by_rows(mask: Node, tiles: Listed, sizes: Sizes, block: int, region: Region) -> Look:
    """A first look at every tile, [B, H, R, C]; so many rows at once that memory stays bounded."""
    batch, heads, rows_ = tiles.count.shape
    b, h = region.ranges["b"].low.reshape(-1, 1, 1, 1), region.ranges["h"].low.reshape(1, -1, 1, 1)
    column = torch.arange(tiles.columns, device=region.device).reshape(1, 1, 1, -1)
    step = max(1, _GRID // (batch * heads * tiles.columns))
    looks = []
    for first in range(0, rows_, step):
        row = torch.arange(first, min(first + step, rows_), device=region.device).reshape(1, 1, -1, 1)
        looks.append(look_at_grid(mask, _boxes(b, h, row, column, sizes, block), region))
    seen, hidden, still = (torch.cat([getattr(x, name) for x in looks], 2) for name in ("seen", "hidden", "open"))
    return Look(seen, hidden, still)


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
