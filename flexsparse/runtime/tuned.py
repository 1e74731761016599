"""Sizes that ``flexsparse tune`` found on this GPU: one small file a GPU, dtype and head_dim, read once a process."""

from __future__ import annotations

import functools
import json
import pathlib
import re
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch

from flexsparse.errors import BackendNotice
from flexsparse.files import cache_home, write_whole
from flexsparse.settings import CHUNK

KERNELS = ("forward", "query", "key", "slot")
# Kernels whose tiles are a whole chunk of queries; the others sum gradients of keys.
ROWS = ("forward", "query")


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


@dataclass(frozen=True)
class Place:
    """What sizes are found for: a GPU, the versions that compile for it, and the shape of a row of features.

    ``bits`` of a number, and ``head_dim`` and ``value_dim`` in the powers of two in which they are held.
    """

    gpu: str
    capability: str
    triton: str
    bits: int
    head_dim: int
    value_dim: int

    @property
    def path(self) -> pathlib.Path:
        """The file of this place in the cache."""
        gpu = re.sub(r"[^a-z0-9]+", "_", self.gpu.lower())
        name = f"{gpu}-sm{self.capability}-triton{self.triton}-{self.bits}bit-{self.head_dim}x{self.value_dim}.json"
        return cache_home() / "tuned" / name


def padded(size: int) -> int:
    """The power of two, at least 16, in which a row of features is held."""
    return max(16, 1 << (size - 1).bit_length())


@functools.lru_cache
def place_of(device: torch.device, dtype: torch.dtype, head_dim: int, value_dim: int) -> Place | None:
    """The place of a call; None where no GPU runs it."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    import triton

    major, minor = torch.cuda.get_device_capability(device)
    gpu = torch.cuda.get_device_name(device)
    return Place(gpu, f"{major}{minor}", triton.__version__, 8 * dtype.itemsize, padded(head_dim), padded(value_dim))


@functools.lru_cache
def tuned_sizes(place: Place | None) -> Mapping[str, Sizes]:
    """What was found for a place, by kernel; nothing where nothing was, or where the cache cannot be read.

    A file that is damaged or made for another place counts as none, with a notice.
    """
    if place is None:
        return {}
    try:
        data = json.loads(place.path.read_text())
        if data["place"] != asdict(place):
            raise ValueError("it was made for another place")
        return {kernel: _checked(kernel, Sizes(**data["kernels"][kernel])) for kernel in KERNELS}
    except OSError:
        return {}
    except (ValueError, TypeError, KeyError) as error:
        message = f"{place.path} is not what `flexsparse tune` writes ({error}); the sizes that come along are used."
        warnings.warn(message, BackendNotice, stacklevel=2)
        return {}


def tuned_text(place: Place, found: Mapping[str, Sizes]) -> str:
    """What a file says."""
    kernels = {kernel: asdict(sizes) for kernel, sizes in found.items()}
    return json.dumps({"place": asdict(place), "kernels": kernels}, indent=1) + "\n"


def keep_tuned(place: Place, found: Mapping[str, Sizes]) -> pathlib.Path:
    """Write what was found for a place, whole or not at all. Raises OSError where the cache cannot be written."""
    place.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_whole(place.path, tuned_text(place, found))
    tuned_sizes.cache_clear()
    return place.path


def steps_and_keys(kernel: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ``queries`` and ``keys`` that a kernel can have: parts of a chunk, though of slots as many as it likes."""
    queries = (CHUNK,) if kernel in ROWS else (16, 32, CHUNK)
    return queries, (16, 32, CHUNK) if kernel != "slot" else (16, 32, 64, 128)


def is_sound(kernel: str, sizes: Sizes) -> bool:
    """Whether a kernel with these sizes can be trusted.

    That of slots with 64 queries a step, not read ahead, faults on an H200: as triton 3.6 compiles it, it wants more
    registers than there are, and one of its products of matrices then reads outside of shared memory.
    """
    return kernel != "slot" or sizes.queries < CHUNK or sizes.stages > 1


def _checked(kernel: str, sizes: Sizes) -> Sizes:
    """The sizes, if a kernel can have them."""
    queries, keys = steps_and_keys(kernel)
    whole = all(type(n) is int for n in (sizes.queries, sizes.keys, sizes.stages))
    possible = sizes.warps in (1, 2, 4, 8, 16) and sizes.registers in (0, *range(32, 256, 8))
    if (
        not whole
        or not possible
        or sizes.queries not in queries
        or sizes.keys not in keys
        or not 1 <= sizes.stages <= 8
        or not is_sound(kernel, sizes)
    ):
        raise ValueError(f"{kernel}: {sizes}")
    return sizes
