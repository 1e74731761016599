"""Classified tiles to what FlexAttention reads: lists in both directions, without a dense grid."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from flexsparse import _torch
from flexsparse.analysis.lists import Listed, Spans
from flexsparse.analysis.tiles import Tiles

BlockLists = tuple[Tensor, ...]


def block_lists(tiles: Tiles) -> BlockLists:
    """Counts and indices of the partial and the full tiles, for the key tiles of queries and the other way round.

    Eight int32 tensors in the order of BlockMask's arguments. Rows that start together, or one tile further each,
    may share the storage of their indices.
    """

    def lists(part: Spans | Listed) -> tuple[Tensor, Tensor]:
        return part.count.contiguous(), part.padded()

    forward = (*lists(tiles.partial), *lists(tiles.full))
    return (*forward, *lists(tiles.partial.transposed()), *lists(tiles.full.transposed()))


def make_block_mask(tiles: Tiles, mask_mod: Callable[..., Tensor]) -> BlockMask:
    """torch's BlockMask with the PARTIAL tiles in its lists and the FULL ones in its full lists."""
    sizes = tiles.sizes
    return _torch.block_mask(block_lists(tiles), tiles.block, mask_mod, sizes.q_len, sizes.kv_len)
