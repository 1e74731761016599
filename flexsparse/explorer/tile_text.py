"""The tiles of a plan as text: for each tile of queries, the tiles of keys that are computed."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

from torch import Tensor

from flexsparse.analysis.tiles import EMPTY, FULL, Tiles
from flexsparse.plan import count_tiles


def tile_text(tiles: Tiles | None) -> str:
    """Counts over all rows and heads, then the lists of each mask that differs; None is for tiles that nobody knows."""
    if tiles is None:
        return "# Tiles depend on tensors of the call; `flexsparse show` draws them for example tensors."
    counts = count_tiles(tiles)
    lines = [
        f"# {counts.total:,} tiles of {counts.block} queries x {counts.block} keys: {counts.full:,} full, "
        f"{counts.partial:,} partial, {counts.empty:,} empty ({counts.density:.1%} computed)"
    ]
    rows, heads = tiles.kinds.shape[:2]
    for row in range(rows):
        for head in range(heads):
            if rows * heads == 1 and counts.total > tiles.kinds.numel():
                lines.append("# the same for all heads and rows of the batch")
            elif rows * heads > 1:
                lines.append(f"# row {row} of the batch, head {head}")
            lines += _lists(tiles.kinds[row, head], tiles.block)
    return "\n".join(lines)


def _lists(kinds: Tensor, block: int) -> Iterator[str]:
    wide = len(f"{(len(kinds) - 1) * block}")
    for number, row in enumerate(kinds.tolist()):
        yield f"q {number * block:>{wide}}  {', '.join(_runs(row, block)) or 'nothing'}"


def _runs(kinds: list[int], block: int) -> Iterator[str]:
    """Neighbours of one kind, as keys from the first to before the last."""
    at = 0
    for kind, group in groupby(kinds):
        length = len(list(group))
        if kind != EMPTY:
            yield f"{'full' if kind == FULL else 'partial'} kv {at * block}:{(at + length) * block}"
        at += length
