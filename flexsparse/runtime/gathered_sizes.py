"""Tile sizes, warps and stages of the kernels that gather: what was fastest on an H200, and what fits elsewhere."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from flexsparse.errors import BackendError
from flexsparse.runtime.inputs import Shapes
from flexsparse.settings import CHUNK

# What a kernel takes beside its tiles, bytes.
_SLACK = 4096
# The shared memory of a block where the driver does not say: that of consumer GPUs.
_LEAST_SHARED = 101_376


@dataclass(frozen=True)
class Sizes:
    """``queries`` of a step where gradients of keys are summed (CHUNK elsewhere), ``keys`` of a tile.

    ``registers`` a thread at most, 0 for as many as the compiler wants.
    """

    queries: int
    keys: int
    warps: int
    stages: int
    registers: int = 0


# From the fastest on; the first that fits is taken. With few registers three blocks share a multiprocessor rather than
# two, which pays for rows of up to 128 features.
_FEW_REGISTERS, _FEW_FEATURES = 168, 128
_TRIED = {
    "forward": (
        *(Sizes(CHUNK, 32, 4, 2, _FEW_REGISTERS), Sizes(CHUNK, 64, 4, 2), Sizes(CHUNK, 64, 4, 1)),
        *(Sizes(CHUNK, 32, 4, 1), Sizes(CHUNK, 16, 4, 1)),
    ),
    "query": (Sizes(CHUNK, 32, 4, 2), Sizes(CHUNK, 32, 4, 1), Sizes(CHUNK, 16, 4, 1)),
    "key": (Sizes(32, 64, 4, 2), Sizes(32, 64, 4, 1), Sizes(32, 32, 4, 1), Sizes(16, 16, 4, 1)),
    "slot": (Sizes(32, 64, 4, 1), Sizes(32, 32, 4, 1), Sizes(16, 16, 4, 1)),
}
# Products of float32 are not those of tensor cores: smaller tiles compile in seconds rather than in half a minute.
_TRIED_WIDE = {
    **dict.fromkeys(("forward", "query"), (Sizes(CHUNK, 32, 8, 1), Sizes(CHUNK, 16, 8, 1))),
    **dict.fromkeys(("key", "slot"), (Sizes(32, 32, 8, 1), Sizes(16, 16, 8, 1))),
}


def padded(size: int) -> int:
    """The power of two, at least 16, in which a row of features is held."""
    return max(16, 1 << (size - 1).bit_length())


def sizes_of(kernel: str, shapes: Shapes, limit: int | None = None) -> Sizes:
    """The sizes for "forward", "query", "key" or "slot". Raises BackendError where nothing fits the GPU.

    ``limit`` is the shared memory of a block in bytes; None for that of the device.
    """
    limit = _shared_memory(shapes.device) if limit is None else limit
    tried = (_TRIED_WIDE if shapes.dtype is torch.float32 else _TRIED)[kernel]
    if max(shapes.head_dim, shapes.value_dim) > _FEW_FEATURES:
        tried = tuple(sizes for sizes in tried if not sizes.registers)
    found = next((sizes for sizes in tried if shared_bytes(kernel, sizes, shapes) <= limit), None)
    if found is None:
        raise BackendError(
            "backend='gather'",
            got=f"head_dim {shapes.head_dim} and value_dim {shapes.value_dim} in {shapes.dtype}",
            expected=f"tiles that fit {limit} bytes of shared memory",
            mend="Use backend='flex' or a smaller head_dim.",
        )
    return found


KERNELS = ("forward", "query", "key", "slot")
_ROWS = ("forward", "query")


def shared_bytes(kernel: str, sizes: Sizes, shapes: Shapes) -> int:
    """The shared memory of a kernel in bytes: rows that stay, rows that come in ``stages`` buffers, a turned tile."""
    widest = max(padded(shapes.head_dim), padded(shapes.value_dim))
    features = padded(shapes.head_dim) + padded(shapes.value_dim)
    if kernel in _ROWS:
        stays = CHUNK * (padded(shapes.head_dim) if kernel == "forward" else features)
        comes, turned = sizes.keys * features, 0
    else:
        stays, comes, turned = sizes.keys * features, sizes.queries * features, sizes.keys * widest
    return (stays + sizes.stages * comes + turned) * shapes.dtype.itemsize + _SLACK


@functools.lru_cache
def _shared_memory(device: torch.device) -> int:
    # A plan may be made where there is no such device.
    if device.type != "cuda" or not torch.cuda.is_available():
        return _LEAST_SHARED
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", _LEAST_SHARED)
