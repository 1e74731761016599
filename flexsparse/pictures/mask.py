"""What a mask looks like: tiles as the compiler classifies them, or single pairs, cut down to a few cells."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flexsparse.analysis.tiles import EMPTY, FULL, PARTIAL
from flexsparse.errors import SettingError
from flexsparse.example_inputs import example_operands
from flexsparse.inspection import InspectedPattern
from flexsparse.ir.nodes import Node
from flexsparse.numbered import at_defaults
from flexsparse.pipeline import Bound, Compiled, bind_call, compile_pattern
from flexsparse.runtime.inputs import Shapes
from flexsparse.settings import Settings

# Counting pairs reads every one of them; beyond this many, by device, a picture shows classes only.
COUNTABLE = {"cpu": 1 << 26, "cuda": 1 << 30}
# The booleans that a selection by query may keep: queries x blocks x heads.
_CHOOSABLE = 1 << 30
Rows = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Picture:
    """Cells of EMPTY, PARTIAL or FULL over ranges of queries and keys.

    A cell is FULL only if everything in it is, EMPTY only if nothing in it is seen. ``shares`` gives the share of
    pairs seen in each cell, None where there are too many to count; ``computed_shares`` the share of its tiles that
    are not EMPTY, None for pairs and for single tiles. ``counts`` are the EMPTY, PARTIAL and FULL units before they
    were cut down to cells, ``cell`` how many queries and keys one cell covers, ``undecided`` how many PARTIAL tiles
    may as well be of another class. ``values`` is a number for each cell, the greatest of its pairs that are seen, NaN
    where none is.
    """

    kinds: tuple[tuple[int, ...], ...]
    shares: Rows | None
    queries: range
    keys: range
    cell: tuple[int, int]
    counts: tuple[int, int, int]
    pairs: float | None
    computed_shares: Rows | None = None
    undecided: int = 0
    values: Rows | None = None

    @property
    def computed(self) -> float:
        """The share of units that are not EMPTY."""
        return 1 - self.counts[EMPTY] / sum(self.counts)


@dataclass(frozen=True)
class Drawable:
    """A compiled pattern bound to lengths and tensors, ready to be looked at."""

    shapes: Shapes
    bound: Bound
    mask: Callable[..., Tensor]
    score: Callable[..., Tensor] | None
    pattern: Node
    compiled: Compiled
    captured: Mapping[str, Tensor]

    @property
    def heads_differ(self) -> bool:
        return self.bound.tiles.distinct_heads > 1

    def computed(self) -> list[float]:
        """For each head (or once, where they agree) the share of tiles that are computed."""
        return [float(x) for x in (self.bound.tiles.kinds[0] != EMPTY).double().mean((-1, -2))]

    def heads_alike(self) -> list[list[int]]:
        """The heads in groups whose masks are known to be one function, in order of their first head."""
        tiles, groups = self.bound.tiles, dict[int, list[int]]()
        heads = range(self.shapes.heads)
        rows = tiles.head_rows or (heads if self.heads_differ else (0,) * len(heads))
        for head, row in zip(heads, rows, strict=True):
            groups.setdefault(row, []).append(head)
        return list(groups.values())

    def tiles(self, head: int, cells: tuple[int, int]) -> Picture:
        """The tiles of a head, at most ``cells`` rows and columns of them; cells are as high as they are wide."""
        tiles, (rows, columns) = self.bound.tiles, cells
        kinds = tiles.kinds[0, head if self.heads_differ else 0].cpu()
        step = max(-(-kinds.shape[0] // rows), -(-kinds.shape[1] // columns))
        queries, keys = range(self.shapes.q_len), range(self.shapes.kv_len)
        cell = (step * tiles.block, step * tiles.block)
        countable = len(queries) * len(keys) <= COUNTABLE[self.shapes.device.type]
        shares = self.shares(head, queries, keys, cell) if countable else None
        empty, full, total = (_pooled(kinds, step, kind) for kind in (EMPTY, FULL, None))
        pooled = torch.where(empty == total, EMPTY, torch.where(full == total, FULL, PARTIAL))
        made = (pooled, shares, queries, keys, cell, _counts(kinds))
        computed = 1 - empty / total if step > 1 else None
        return _picture(*made, computed=computed, undecided=tiles.undecided)

    def pairs(self, head: int, queries: range, keys: range, cells: tuple[int, int]) -> Picture:
        """The pairs of a head in a window, at most ``cells`` rows and columns. Raises SettingError if too large."""
        check_window(self.shapes, queries, keys)
        cell = (-(-len(queries) // cells[0]), -(-len(keys) // cells[1]))
        shares = self.shares(head, queries, keys, cell)
        return self._of_pairs(shares, queries, keys, cell)

    def values(
        self, head: int, queries: range, keys: range, cells: tuple[int, int], function: Callable[..., Tensor]
    ) -> Picture:
        """The pairs of a head in a window, with the greatest ``function(b, h, q, kv)`` of those seen in each cell."""
        check_window(self.shapes, queries, keys)
        cell = (-(-len(queries) // cells[0]), -(-len(keys) // cells[1]))

        def greatest(seen: Tensor, at: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
            found = function(*at).double().expand(seen.shape)
            # A value may be infinite, so what is hidden is told apart by another mark than a number.
            top = torch.where(seen, found, -torch.inf).amax(0)
            return _grouped(seen.sum(0), cell[1], 0).sum(1), _grouped(top, cell[1], -torch.inf).amax(1)

        counts, tops = (
            torch.stack(x).cpu() for x in zip(*self._lines(head, queries, keys, cell, greatest), strict=True)
        )
        made = torch.where(counts > 0, tops, torch.nan)
        return self._of_pairs(counts.double() / _areas(queries, keys, cell), queries, keys, cell, made)

    def _of_pairs(
        self, shares: Tensor, queries: range, keys: range, cell: tuple[int, int], values: Tensor | None = None
    ) -> Picture:
        kinds = (shares > 0).to(torch.uint8) + (shares == 1).to(torch.uint8)
        seen = round(float((shares * _areas(queries, keys, cell)).sum()))
        counts = (len(queries) * len(keys) - seen, 0, seen)
        return _picture(kinds, shares, queries, keys, cell, counts, values=values)

    def shares(self, head: int, queries: range, keys: range, cell: tuple[int, int]) -> Tensor:
        """The share of pairs seen in each cell, [rows, columns] float64, exactly 1 where all are."""

        def count(seen: Tensor, _: tuple[Tensor, ...]) -> Tensor:
            return _grouped(seen.sum(0), cell[1], 0).sum(1)

        lines = self._lines(head, queries, keys, cell, count)
        return torch.stack(lines).double().cpu() / _areas(queries, keys, cell)

    def _lines(
        self, head: int, queries: range, keys: range, cell: tuple[int, int], of: Callable[..., Any]
    ) -> list[Any]:
        """``of(seen, (b, h, q, kv))`` for the queries of each row of cells; ``seen`` is [queries, keys]."""
        device = self.shapes.device
        kv = torch.arange(keys.start, keys.stop, device=device)
        zero, at = torch.tensor(0, device=device), torch.tensor(head, device=device)
        lines = []
        for start in range(queries.start, queries.stop, cell[0]):
            q = torch.arange(start, min(start + cell[0], queries.stop), device=device).unsqueeze(1)
            lines.append(of(self.mask(zero, at, q, kv).expand(len(q), len(kv)), (zero, at, q, kv)))
        return lines


def drawable(
    attention: InspectedPattern, shapes: Shapes, captured: Mapping[str, Tensor], block: int = 128, seed: int = 0
) -> Drawable:
    """Bind a pattern for looking at it, on the device of ``shapes``. Raises what a call with these tensors would.

    A mask that depends on query and key is drawn for random ones, made from ``seed``; SettingError where the blocks
    that the queries choose would not fit into memory.
    """
    pattern = at_defaults(attention.pattern.node)
    compiled = compile_pattern(pattern)
    for topk in attention.ir.chosen:
        choices = shapes.heads * shapes.q_len * -(-shapes.kv_len // topk.block)
        if choices > _CHOOSABLE:
            raise SettingError(
                "length",
                got=f"{shapes.q_len} queries of {shapes.heads} heads that choose blocks of {topk.block} keys",
                expected=f"at most {_CHOOSABLE:,} choices, not {choices:,}",
                mend="Take a shorter length, fewer heads or larger blocks.",
            )
    operands = example_operands(shapes, seed) if attention.ir.chosen else None
    settings = Settings("chunked", block_size=block)
    bound = bind_call(compiled, shapes, captured, settings, operands=operands, validate=True)
    names = compiled.generated.arguments
    functions: dict[str, Any] = compiled.generated.build(**{name: bound.buffers[name] for name in names})
    mask, score = functions["mask_mod"], functions["score_mod"]
    return Drawable(shapes, bound, mask, score, pattern, compiled, captured)


def square_shapes(length: int, heads: int, kv_heads: int | None = None, device: str = "cpu") -> Shapes:
    """Shapes of one row of self-attention for pictures: the size of a head does not matter."""
    group = heads if kv_heads is None else kv_heads
    return Shapes(1, heads, group, length, length, 16, 16, torch.float32, torch.device(device))


def check_window(shapes: Shapes, queries: range, keys: range) -> None:
    """Refuse a window whose pairs are too many to look at one by one. Raises SettingError."""
    limit = COUNTABLE[shapes.device.type]
    if len(queries) * len(keys) > limit:
        raise SettingError(
            "--zoom",
            got=f"{len(queries):,} queries x {len(keys):,} keys",
            expected=f"a window of at most {limit:,} pairs, such as 8192 x 8192, as each of them is looked at",
            mend="For example --zoom 0:1024,0:1024.",
        )


def _picture(
    kinds: Tensor,
    shares: Tensor | None,
    queries: range,
    keys: range,
    cell: tuple[int, int],
    counts: tuple[int, int, int],
    *,
    computed: Tensor | None = None,
    undecided: int = 0,
    values: Tensor | None = None,
) -> Picture:
    seen = None
    if shares is not None:
        seen = float((shares * _areas(queries, keys, cell)).sum()) / (len(queries) * len(keys))
    listed = [None if x is None else rows_of(x) for x in (shares, computed, values)]
    return Picture(rows_of(kinds), listed[0], queries, keys, cell, counts, seen, listed[1], undecided, listed[2])


def rows_of(table: Tensor) -> Any:
    """[rows, columns] as tuples of Python's numbers."""
    return tuple(tuple(row) for row in table.tolist())


def _pooled(kinds: Tensor, step: int, kind: int | None) -> Tensor:
    """How many tiles of a kind, or of any, each group of step x step tiles has: [rows, columns] float64."""
    # Row by row of groups: a grid of a million tokens has 61 million tiles, which are not to be copied at once.
    found = [torch.ones_like(part) if kind is None else part == kind for part in kinds.split(step)]
    return torch.stack([_grouped(part.sum(0), step, 0).sum(1) for part in found]).double()


def _grouped(line: Tensor, size: int, filling: float) -> Tensor:
    """[N] as [ceil(N / size), size]."""
    return torch.nn.functional.pad(line, (0, -len(line) % size), value=filling).reshape(-1, size)


def _areas(queries: range, keys: range, cell: tuple[int, int]) -> Tensor:
    """How many pairs each cell has, [rows, columns]: those at the end may be smaller."""
    sides = []
    for span, size in zip((queries, keys), cell, strict=True):
        starts = torch.arange(0, len(span), size)
        sides.append((starts + size).clamp(max=len(span)) - starts)
    return sides[0].double()[:, None] * sides[1]


def _counts(kinds: Tensor) -> tuple[int, int, int]:
    empty, partial, full = (int((kinds == kind).sum()) for kind in (EMPTY, PARTIAL, FULL))
    return empty, partial, full
