"""The one importer of torch names that are private or differ between versions (2.5 to 2.14)."""

from __future__ import annotations

import contextlib
import unittest.mock
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import flex_attention as _module
from torch.nn.attention.flex_attention import BlockMask, flex_attention

VERSION = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])

# return_aux replaced return_lse in 2.9; both give the natural logarithm.
_HAS_AUX = VERSION >= (2, 9)
# Gradients of captured tensors came in 2.6; head_dim had to be a power of two until 2.7.
HAS_CAPTURED_GRADIENTS = VERSION >= (2, 6)
ANY_HEAD_DIM = VERSION >= (2, 8)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Callable[..., Tensor] | None,
    block_mask: BlockMask | None,
    scale: float,
    enable_gqa: bool,
    with_lse: bool,
    kernel_options: dict[str, Any] | None,
) -> tuple[Tensor, Tensor | None]:
    """flex_attention with its keywords as this torch names them."""
    options: dict[str, Any] = {"scale": scale, "enable_gqa": enable_gqa, "kernel_options": kernel_options}
    if not with_lse:
        return flex_attention(query, key, value, score_mod, block_mask, **options), None
    if _HAS_AUX:
        wanted = _module.AuxRequest(lse=True)
        out, aux = flex_attention(query, key, value, score_mod, block_mask, return_aux=wanted, **options)
        return out, aux.lse
    out, lse = flex_attention(query, key, value, score_mod, block_mask, return_lse=True, **options)
    return out, lse


def block_mask_from_lists(
    kv_num: Tensor,
    kv_indices: Tensor,
    full_num: Tensor,
    full_indices: Tensor,
    block: int,
    mask_mod: Callable[..., Tensor],
    q_len: int,
    kv_len: int,
) -> BlockMask:
    """BlockMask.from_kv_blocks, whose ``seq_lengths`` came in 2.6."""
    lengths: dict[str, Any] = {"seq_lengths": (q_len, kv_len)} if VERSION >= (2, 6) else {}
    return BlockMask.from_kv_blocks(
        kv_num, kv_indices, full_num, full_indices, BLOCK_SIZE=block, mask_mod=mask_mod, **lengths
    )


@contextlib.contextmanager
def eager_gradients_on_cpu() -> Iterator[None]:
    """Lets eager flex_attention differentiate on CPU: from 2.11 on a device check refuses what works underneath."""
    if hasattr(_module, "_validate_device"):
        with unittest.mock.patch.object(_module, "_validate_device", return_value=None):
            yield
    else:
        yield
