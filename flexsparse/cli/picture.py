"""What a mask looks like: tiles as the compiler classifies them, or single pairs, cut down to a few cells."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flexsparse.analysis.tiles import EMPTY, FULL, PARTIAL
from flexsparse.compiler import CompiledAttention
from flexsparse.example_inputs import example_operands
from flexsparse.pipeline import Bound, bind_call, compile_pattern
from flexsparse.runtime.inputs import Shapes
from flexsparse.settings import Settings

# Counting pairs reads every one of them; beyond this many, by device, a picture shows classes only.
COUNTABLE = {"cpu": 1 << 26, "cuda": 1 << 30}


@dataclass(frozen=True)
class Picture:
    """Cells of EMPTY, PARTIAL or FULL over ranges of queries and keys.

    A cell is FULL only if everything in it is, EMPTY only if nothing is seen. ``shares`` gives the share of pairs
    seen in each cell, None where there are too many to count; ``counts`` are the EMPTY, PARTIAL and FULL units
    before they were cut down to cells, and ``cell`` how many queries and keys one cell covers.
    """

    kinds: tuple[tuple[int, ...], ...]
    shares: tuple[tuple[float, ...], ...] | None
    queries: range
    keys: range
    cell: tuple[int, int]
    counts: tuple[int, int, int]
    pairs: float | None

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

    @property
    def heads_differ(self) -> bool:
        return self.bound.tiles.kinds.shape[1] > 1

    def computed(self) -> list[float]:
        """For each head (or once, where they agree) the share of tiles that are computed."""
        return [float(x) for x in (self.bound.tiles.kinds[0] != EMPTY).double().mean((-1, -2))]

    def tiles(self, head: int, cells: tuple[int, int]) -> Picture:
        """The tiles of a head, at most ``cells`` rows and columns of them."""
        tiles, (rows, columns) = self.bound.tiles, cells
        kinds = tiles.kinds[0, head if self.heads_differ else 0].cpu()
        step = (-(-kinds.shape[0] // rows), -(-kinds.shape[1] // columns))
        queries, keys = range(self.shapes.q_len), range(self.shapes.kv_len)
        cell = (step[0] * tiles.block, step[1] * tiles.block)
        countable = len(queries) * len(keys) <= COUNTABLE[self.shapes.device.type]
        shares = self._shares(head, queries, keys, cell) if countable else None
        return _picture(_pooled(kinds, step), shares, queries, keys, cell, _counts(kinds))

    def pairs(self, head: int, queries: range, keys: range, cells: tuple[int, int]) -> Picture:
        """The pairs of a head in a window, at most ``cells`` rows and columns."""
        cell = (-(-len(queries) // cells[0]), -(-len(keys) // cells[1]))
        shares = self._shares(head, queries, keys, cell)
        kinds = (shares > 0).to(torch.uint8) + (shares == 1).to(torch.uint8)
        seen = round(float((shares * _areas(queries, keys, cell)).sum()))
        counts = (len(queries) * len(keys) - seen, 0, seen)
        return _picture(kinds, shares, queries, keys, cell, counts)

    def _shares(self, head: int, queries: range, keys: range, cell: tuple[int, int]) -> Tensor:
        """The share of pairs seen in each cell, [rows, columns] float64, exactly 1 where all are."""
        device = self.shapes.device
        kv = torch.arange(keys.start, keys.stop, device=device)
        zero, at = torch.tensor(0, device=device), torch.tensor(head, device=device)
        lines = []
        for start in range(queries.start, queries.stop, cell[0]):
            q = torch.arange(start, min(start + cell[0], queries.stop), device=device).unsqueeze(1)
            seen = self.mask(zero, at, q, kv).expand(len(q), len(kv)).sum(0)
            padded = torch.nn.functional.pad(seen, (0, -len(kv) % cell[1]))
            lines.append(padded.reshape(-1, cell[1]).sum(1))
        return torch.stack(lines).double().cpu() / _areas(queries, keys, cell)


def drawable(
    attention: CompiledAttention, shapes: Shapes, captured: Mapping[str, Tensor], block: int = 128, seed: int = 0
) -> Drawable:
    """Bind a pattern for looking at it, on the device of ``shapes``. Raises what a call with these tensors would.

    A mask that depends on query and key is drawn for random ones, made from ``seed``.
    """
    compiled = compile_pattern(attention.pattern.node)
    operands = example_operands(shapes, seed) if attention.ir.chosen else None
    settings = Settings("chunked", block_size=block)
    bound = bind_call(compiled, shapes, captured, settings, operands=operands, validate=True)
    names = compiled.generated.arguments
    functions: dict[str, Any] = compiled.generated.build(**{name: bound.buffers[name] for name in names})
    return Drawable(shapes, bound, functions["mask_mod"], functions["score_mod"])


def square_shapes(length: int, heads: int, kv_heads: int | None = None, device: str = "cpu") -> Shapes:
    """Shapes of one row of self-attention for pictures: the size of a head does not matter."""
    group = heads if kv_heads is None else kv_heads
    return Shapes(1, heads, group, length, length, 16, 16, torch.float32, torch.device(device))


def _picture(
    kinds: Tensor,
    shares: Tensor | None,
    queries: range,
    keys: range,
    cell: tuple[int, int],
    counts: tuple[int, int, int],
) -> Picture:
    listed = None if shares is None else tuple(tuple(row) for row in shares.tolist())
    seen = None
    if shares is not None:
        seen = float((shares * _areas(queries, keys, cell)).sum()) / (len(queries) * len(keys))
    return Picture(tuple(tuple(row) for row in kinds.tolist()), listed, queries, keys, cell, counts, seen)


def _pooled(kinds: Tensor, step: tuple[int, int]) -> Tensor:
    """FULL where a whole group of tiles is, EMPTY where all of it is, else PARTIAL."""
    stacked = kinds.double()[None, None]
    highest, lowest = (
        sign * torch.nn.functional.max_pool2d(sign * stacked, step, ceil_mode=True)[0, 0] for sign in (1, -1)
    )
    return torch.where(lowest == FULL, FULL, torch.where(highest == EMPTY, EMPTY, PARTIAL))


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
