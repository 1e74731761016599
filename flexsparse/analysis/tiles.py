"""EMPTY, FULL or PARTIAL for every tile of queries x keys, from bounds; no element is evaluated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from flexsparse.analysis.bounds import Bounds, Region, bounds
from flexsparse.ir.nodes import Load, Node, Symbol, walk
from flexsparse.ir.program import Selected

EMPTY, PARTIAL, FULL = 0, 1, 2


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
    """``kinds`` [B or 1, H or 1, ceil(q_len / block), ceil(kv_len / block)] uint8 of EMPTY, PARTIAL, FULL.

    Sound always: an EMPTY tile has no pair, a FULL tile all of them. A PARTIAL tile may turn out to be either.
    Tiles that hang over the end of the queries or keys are never FULL.
    """

    kinds: Tensor
    block: int
    sizes: Sizes

    def count(self, kind: int) -> int:
        """How many tiles of a kind there are, over all rows and heads of the attention."""
        copies = self.sizes.batch * self.sizes.heads // (self.kinds.shape[0] * self.kinds.shape[1])
        return int((self.kinds == kind).sum()) * copies

    @property
    def total(self) -> int:
        return self.sizes.batch * self.sizes.heads * self.kinds.shape[2] * self.kinds.shape[3]


def depends_on(node: Node, symbol: str) -> bool:
    """Whether a flattened expression can change with the batch row ("b") or the head ("h")."""
    return any(isinstance(n, Selected) or (isinstance(n, Symbol) and n.name == symbol) for n in walk(node))


def classify(
    mask: Node,
    sizes: Sizes,
    tensors: Mapping[str, Tensor] | None = None,
    *,
    block: int = 128,
    device: torch.device | str = "cpu",
) -> Tiles:
    """The class of every tile of a flattened mask.

    ``tensors`` holds the captured tensors, tables and, for selections, ``birth_n``, ``death_n`` and ``group_n``
    by name. A mask that does not depend on the row (or the head) is classified for one.
    """
    device = torch.device(device)
    rows = sizes.batch if depends_on(mask, "b") else 1
    heads = sizes.heads if depends_on(mask, "h") else 1

    def points(count: int, dim: int) -> Bounds:
        shape = [1, 1, 1, 1]
        shape[dim] = count
        value = torch.arange(count, device=device).reshape(shape)
        return Bounds(value, value)

    def stretches(length: int, offset: int, dim: int) -> Bounds:
        starts = torch.arange(0, length, block, device=device)
        shape = [1, 1, 1, 1]
        shape[dim] = len(starts)
        ends = (starts + block).clamp(max=length) - 1
        return Bounds((starts + offset).reshape(shape), (ends + offset).reshape(shape))

    ranges = {
        "b": points(rows, 0),
        "h": points(heads, 1),
        "q": stretches(sizes.q_len, sizes.q_offset, 2),
        "kv": stretches(sizes.kv_len, 0, 3),
    }
    named = {"q_len": sizes.q_len, "kv_len": sizes.kv_len, "heads": sizes.heads}
    found = bounds(mask, Region(ranges, named, tensors or {}, device))
    kinds = found.high.to(torch.uint8) + found.low.to(torch.uint8)
    shape = (rows, heads, ranges["q"].low.shape[2], ranges["kv"].low.shape[3])
    kinds = kinds.expand(shape).contiguous()
    if sizes.q_len % block:
        kinds[:, :, -1].clamp_(max=PARTIAL)
    if sizes.kv_len % block:
        kinds[..., -1].clamp_(max=PARTIAL)
    return Tiles(kinds, block, sizes)


def index_errors(node: Node, sizes: Sizes, tensors: Mapping[str, Tensor]) -> list[tuple[Load, int, int, int]]:
    """Look-ups that can leave their tensor: (look-up, dimension, least index, greatest index)."""
    device = next(iter(tensors.values())).device if tensors else torch.device("cpu")

    def span(first: int, count: int) -> Bounds:
        return Bounds(torch.tensor(first, device=device), torch.tensor(first + count - 1, device=device))

    ranges = {
        "b": span(0, sizes.batch),
        "h": span(0, sizes.heads),
        "q": span(sizes.q_offset, sizes.q_len),
        "kv": span(0, sizes.kv_len),
    }
    named = {"q_len": sizes.q_len, "kv_len": sizes.kv_len, "heads": sizes.heads}
    region = Region(ranges, named, tensors, device)
    found = []
    for load in {n for n in walk(node) if isinstance(n, Load)}:
        for dim, index in enumerate(load.index):
            reach = bounds(index, region)
            low, high = int(reach.low.min()), int(reach.high.max())
            if low < 0 or high >= tensors[load.tensor.name].shape[dim]:
                found.append((load, dim, low, high))
    return found
