"""Tile sizes, warps and stages of the kernels that gather: what `flexsparse tune` found, or was fastest on an H200.

Of the latter the first that fits a GPU's shared memory is taken. Nothing is measured at a call.
"""

from __future__ import annotations

import functools

import torch

from flexsparse.errors import BackendError
from flexsparse.runtime.inputs import Shapes
from flexsparse.runtime.tuned import KERNELS, ROWS, Sizes, padded, place_of, tuned_sizes
from flexsparse.settings import CHUNK

__all__ = [
    "FEW_FEATURES",
    "FOUR_BLOCKS",
    "KERNELS",
    "THREE_BLOCKS",
    "Sizes",
    "fitting",
    "padded",
    "programs_at_once",
    "shared_bytes",
    "sizes_of",
]

# What a kernel takes beside its tiles, bytes: to change layouts, as much as was seen with triton 3.3 to 3.9.
_SLACK = 10_240
# The shared memory of a block where the driver does not say: that of consumer GPUs.
_LEAST_SHARED = 101_376


# From the fastest on; the first that fits is taken. Registers a thread with which so many blocks of four warps share a
# multiprocessor; it pays for rows of up to 128 features.
FOUR_BLOCKS, THREE_BLOCKS, FEW_FEATURES = 128, 168, 128
_TRIED = {
    "forward": (
        *(Sizes(CHUNK, 32, 4, 3, THREE_BLOCKS), Sizes(CHUNK, 32, 4, 2, FOUR_BLOCKS), Sizes(CHUNK, 64, 4, 2)),
        *(Sizes(CHUNK, 64, 4, 1), Sizes(CHUNK, 32, 4, 1), Sizes(CHUNK, 16, 4, 1)),
    ),
    "query": (
        *(Sizes(CHUNK, 32, 4, 2, THREE_BLOCKS), Sizes(CHUNK, 32, 4, 2)),
        *(Sizes(CHUNK, 32, 4, 1), Sizes(CHUNK, 16, 4, 1)),
    ),
    "key": (
        *(Sizes(32, 64, 4, 3), Sizes(32, 64, 4, 2)),
        *(Sizes(32, 64, 4, 1), Sizes(32, 32, 4, 1), Sizes(16, 16, 4, 1)),
    ),
    "slot": (Sizes(64, 32, 4, 2), Sizes(32, 32, 4, 2), Sizes(32, 32, 4, 1), Sizes(16, 16, 4, 1)),
}
# Products of float32 are not those of tensor cores: smaller tiles compile in seconds rather than in half a minute.
_TRIED_WIDE = {
    **dict.fromkeys(("forward", "query"), (Sizes(CHUNK, 32, 8, 1), Sizes(CHUNK, 16, 8, 1))),
    **dict.fromkeys(("key", "slot"), (Sizes(32, 32, 8, 1), Sizes(16, 16, 8, 1))),
}


def sizes_of(kernel: str, shapes: Shapes, limit: int | None = None) -> Sizes:
    """The sizes for "forward", "query", "key" or "slot". Raises BackendError where nothing fits the GPU.

    ``limit`` is the shared memory of a block in bytes; None for that of the device.
    """
    tuned = tuned_sizes(place_of(shapes.device, shapes.dtype, shapes.head_dim, shapes.value_dim)).get(kernel)
    limit = _shared_memory(shapes.device) if limit is None else limit
    return _fastest(kernel, shapes, limit, tuned)


@functools.lru_cache(maxsize=1024)
def _fastest(kernel: str, shapes: Shapes, limit: int, tuned: Sizes | None) -> Sizes:
    tried = _TRIED_WIDE[kernel] if shapes.dtype is torch.float32 else (*_special(kernel, shapes), *_TRIED[kernel])
    if max(shapes.head_dim, shapes.value_dim) > FEW_FEATURES:
        tried = tuple(sizes for sizes in tried if not sizes.registers)
    # A third stage that costs a block its place is not worth it.
    tried = tuple(s for s in tried if s.stages < 3 or 2 * shared_bytes(kernel, s, shapes) <= limit)
    found = fitting(kernel, tried if tuned is None else (tuned, *tried), shapes, limit)
    if not found:
        raise BackendError(
            "backend='gather'",
            got=f"head_dim {shapes.head_dim} and value_dim {shapes.value_dim} in {shapes.dtype}",
            expected=f"tiles that fit {limit} bytes of shared memory",
            mend="Use backend='flex' or a smaller head_dim.",
        )
    return found[0]


def _special(kernel: str, shapes: Shapes) -> tuple[Sizes, ...]:
    """What is faster for narrow rows."""
    narrow = {
        "forward": Sizes(CHUNK, 64, 4, 2, FOUR_BLOCKS),
        "query": Sizes(CHUNK, 32, 4, 2, FOUR_BLOCKS),
        "key": Sizes(64, 64, 4, 2),
    }
    return (narrow[kernel],) if kernel in narrow and max(shapes.head_dim, shapes.value_dim) <= 64 else ()


def fitting(kernel: str, tried: tuple[Sizes, ...], shapes: Shapes, limit: int | None = None) -> list[Sizes]:
    """Those sizes whose tiles fit ``limit`` bytes of shared memory; None for what the device has."""
    limit = _shared_memory(shapes.device) if limit is None else limit
    return [sizes for sizes in tried if shared_bytes(kernel, sizes, shapes) <= limit]


def shared_bytes(kernel: str, sizes: Sizes, shapes: Shapes) -> int:
    """The shared memory of a kernel in bytes: rows that stay, rows that come in ``stages`` buffers, a turned tile."""
    widest = max(padded(shapes.head_dim), padded(shapes.value_dim))
    features = padded(shapes.head_dim) + padded(shapes.value_dim)
    if kernel in ROWS:
        stays = CHUNK * (padded(shapes.head_dim) if kernel == "forward" else features)
        comes, turned = sizes.keys * features, 0
    else:
        stays, comes, turned = sizes.keys * features, sizes.queries * features, sizes.keys * max(widest, sizes.queries)
    return (stays + sizes.stages * comes + turned) * shapes.dtype.itemsize + _SLACK


@functools.lru_cache
def programs_at_once(device: torch.device) -> int:
    """About as many programs as ``device`` runs beside each other."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return 4
    return 3 * torch.cuda.get_device_properties(device).multi_processor_count


@functools.lru_cache
def _shared_memory(device: torch.device) -> int:
    # A plan may be made where there is no such device.
    if device.type != "cuda" or not torch.cuda.is_available():
        return _LEAST_SHARED
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", _LEAST_SHARED)
