"""Classified tiles kept from call to call: the layers of a model ask for the same mask again and again."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flexsparse._torch import version_of
from flexsparse.analysis.tiles import Tiles

# Sets of tiles that are kept, and with them the captured tensors that they were made from.
_KEPT = 32


@dataclass(frozen=True)
class _Entry:
    tensors: Mapping[str, Tensor]
    versions: Mapping[str, int]
    tiles: Tiles

    def still_holds(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether the tensors are the same memory, unchanged. The entry holds them, so memory cannot be reused."""
        return all(
            mine.data_ptr() == tensors[name].data_ptr()
            and mine.shape == tensors[name].shape
            and mine.stride() == tensors[name].stride()
            and mine.dtype == tensors[name].dtype
            and version_of(tensors[name]) == self.versions[name]
            for name, mine in self.tensors.items()
        )


class TileCache:
    """The most recent tiles by everything that they depend on; several threads may ask at once."""

    def __init__(self) -> None:
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, tensors: Mapping[str, Any], make: Callable[[], Tiles]) -> Tiles:
        """The tiles of ``key`` over these tensors, made where they are not at hand.

        A tensor that was changed in place counts as another. Tensors made under ``torch.inference_mode`` do not
        tell when they change, so tiles over them are made at each call.
        """
        if any(t.is_inference() for t in tensors.values()) or torch.compiler.is_compiling():
            return make()
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None and entry.still_holds(tensors):
                self._entries.move_to_end(key)
                return entry.tiles
        versions = {name: version_of(t) for name, t in tensors.items()}
        # What is kept serves training as well, so it must not be made of inference tensors.
        with torch.inference_mode(False):
            tiles = make()
        with self._lock:
            kept = {name: t.detach() for name, t in tensors.items()}
            self._entries[key] = _Entry(kept, versions, tiles)
            self._entries.move_to_end(key)
            while len(self._entries) > _KEPT:
                self._entries.popitem(last=False)
        return tiles

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._entries.clear()
