"""Classified tiles to what FlexAttention reads: lists in both directions, without a dense grid."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from flexsparse import _torch
from flexsparse.analysis.lists import index_pair
from flexsparse.analysis.tiles import Tiles

BlockLists = tuple[Tensor, ...]
_KEPT_BYTES = 1 << 25


def block_lists(tiles: Tiles) -> BlockLists:
    """Counts and indices of the partial and the full tiles, for the key tiles of queries and the other way round.

    Eight int32 tensors in the order of BlockMask's arguments; small ones are kept with the tiles for the next call.
    """
    if tiles.lists:
        return tuple(tiles.lists)
    # What is kept serves training as well, so it must not be made of inference tensors.
    with torch.inference_mode(False):
        partial, full = tiles.partial, tiles.full
        if tiles.head_rows:
            partial, full = partial.take_heads(tiles.head_rows), full.take_heads(tiles.head_rows)
        made = [
            *index_pair(partial, full, tiles.device),
            *index_pair(partial.transposed(tiles.device), full.transposed(tiles.device), tiles.device),
        ]
    if sum(tensor.nbytes for tensor in made) <= _KEPT_BYTES:
        tiles.lists.extend(made)
    return tuple(made)


def make_block_mask(tiles: Tiles, mask_mod: Callable[..., Tensor]) -> BlockMask:
    """torch's BlockMask with the PARTIAL tiles in its lists and the FULL ones in its full lists."""
    sizes = tiles.sizes
    return _torch.block_mask(block_lists(tiles), tiles.block, mask_mod, sizes.q_len, sizes.kv_len)
