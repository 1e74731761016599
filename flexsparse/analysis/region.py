"""What an analysis ranges over: intervals of the indices, the sizes, and the tensors that a mask reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Bounds:
    """For a number, its interval; for a mask, ``low`` is "holds everywhere" and ``high`` "may hold somewhere"."""

    low: Tensor
    high: Tensor


@dataclass(frozen=True)
class Region:
    """Ranges of the indices, as tensors that broadcast together; ``sizes`` are q_len, kv_len and heads.

    Results live on ``device``. The tensors may live on another one: an analysis of few numbers runs on the host,
    and an accelerator does only the look-ups.
    """

    ranges: Mapping[str, Bounds]
    sizes: Mapping[str, int]
    tensors: Mapping[str, Tensor]
    device: torch.device
    # What was found out about tensors; shared by every region over the same ones.
    _rises: dict[str, bool] = field(default_factory=dict, compare=False, repr=False)

    def rises(self, name: str) -> bool:
        """Whether no entry of a tensor is below the one before it along the last dimension, as packed documents' ids.

        Reads the whole tensor, once.
        """
        if name not in self._rises:
            tensor = self.tensors[name]
            row = tensor[:1] if tensor.dim() == 2 and tensor.stride(0) == 0 else tensor
            self._rises[name] = bool((row[..., 1:] >= row[..., :-1]).all())
        return self._rises[name]

    def over(self, ranges: Mapping[str, Bounds]) -> Region:
        """The same tensors and sizes over other ranges."""
        return replace(self, ranges=ranges)
