"""The one importer of torch names that are private or differ between versions (2.5 to 2.14)."""

from __future__ import annotations

import contextlib
import unittest.mock
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch._dynamo
from torch import Tensor
from torch._dynamo.backends.registry import lookup_backend
from torch.nn.attention import flex_attention as _module
from torch.nn.attention.flex_attention import BlockMask, flex_attention

VERSION = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])

# return_aux replaced return_lse in 2.9; both give the natural logarithm.
_HAS_AUX = VERSION >= (2, 9)
# Gradients of captured tensors came in 2.6; head_dim had to be a power of two until 2.7.
HAS_CAPTURED_GRADIENTS = VERSION >= (2, 6)
ANY_HEAD_DIM = VERSION >= (2, 8)


def attend(
    operands: tuple[Tensor, Tensor, Tensor],
    lists: tuple[Tensor, ...],
    mask_mod: Callable[..., Tensor],
    score_mod: Callable[..., Tensor] | None,
    block: int,
    scale: float,
    enable_gqa: bool,
    with_lse: bool,
    kernel_options: dict[str, Any] | None,
) -> tuple[Tensor, Tensor | None]:
    """flex_attention with its keywords as this torch names them; the frame that is compiled.

    The block mask is put together inside, so that its lengths are the operands' and not constants of the graph.
    """
    query, key, value = operands
    mask = block_mask(lists, block, mask_mod, query.shape[2], key.shape[2])
    options: dict[str, Any] = {"scale": scale, "enable_gqa": enable_gqa, "kernel_options": kernel_options}
    if not with_lse:
        return flex_attention(query, key, value, score_mod, mask, **options), None
    if _HAS_AUX:
        wanted = _module.AuxRequest(lse=True)
        out, aux = flex_attention(query, key, value, score_mod, mask, return_aux=wanted, **options)
        return out, aux.lse
    out, lse = flex_attention(query, key, value, score_mod, mask, return_lse=True, **options)
    return out, lse


def block_mask(
    lists: tuple[Tensor, ...], block: int, mask_mod: Callable[..., Tensor], q_len: int, kv_len: int
) -> BlockMask:
    """A BlockMask from its lists in both directions; ``seq_lengths`` came in 2.6.

    BlockMask.from_kv_blocks would transpose the lists through a dense grid.
    """
    partial_num, partial, full_num, full, partial_q_num, partial_q, full_q_num, full_q = lists
    lengths: dict[str, Any] = {"seq_lengths": (q_len, kv_len)} if VERSION >= (2, 6) else {}
    return BlockMask(
        kv_num_blocks=partial_num,
        kv_indices=partial,
        full_kv_num_blocks=full_num,
        full_kv_indices=full,
        q_num_blocks=partial_q_num,
        q_indices=partial_q,
        full_q_num_blocks=full_q_num,
        full_q_indices=full_q,
        BLOCK_SIZE=(block, block),
        mask_mod=mask_mod,
        **lengths,
    )


def version_of(tensor: Tensor) -> int:
    """A number that grows with every change in place of the tensor or of what it views."""
    return tensor._version


def inductor(graph: Any, inputs: Any) -> Any:
    """torch.compile's default backend, to be wrapped by one that counts."""
    return lookup_backend("inductor")(graph, inputs)


# The limit was called cache_size_limit until 2.6; past it, fullgraph raises one of these.
_LIMIT = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"
RECOMPILE_LIMIT_HIT: tuple[type[BaseException], ...] = tuple(
    getattr(torch._dynamo.exc, name)
    for name in ("FailOnRecompileLimitHit", "RecompileLimitExceeded", "FailOnCacheLimitHit")
    if hasattr(torch._dynamo.exc, name)
)


def recompile_limit(limit: int) -> contextlib.AbstractContextManager[Any]:
    """How often one frame may be compiled, for as long as the context lasts."""
    # A Python number that a function closes over must stay one: flex_attention takes no symbolic floats.
    wanted = {_LIMIT: limit, "specialize_float": True}
    if all(getattr(torch._dynamo.config, name) == value for name, value in wanted.items()):
        return contextlib.nullcontext()
    return torch._dynamo.config.patch(wanted)


@contextlib.contextmanager
def eager() -> Iterator[None]:
    """For flex_attention that is not compiled on purpose: no warning about it, and gradients on CPU.

    From 2.11 on a device check refuses gradients on CPU that work underneath.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        if hasattr(_module, "_validate_device"):
            stack.enter_context(unittest.mock.patch.object(_module, "_validate_device", return_value=None))
        # A Python number that a function closes over must stay one: flex_attention takes no symbolic floats.
        stack.enter_context(torch._dynamo.config.patch(specialize_float=True))
        yield
