"""When slots get other keys, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from flexsparse.codegen.kernels import next_changes as kernels
from flexsparse.codegen.kernels.record_layout import LOOKED_AHEAD


def next_changes(table: Tensor, block: int) -> Tensor:
    """As ``codegen.kernels.next_changes``, which a GPU has; PyTorch operations elsewhere."""
    if table.is_cuda:
        return kernels.next_changes(table, block)
    chunks, k = table.shape[-2:]
    changed = torch.nn.functional.pad(table[..., 1:, :] != table[..., :-1, :], (0, -k % block))
    changed = changed.unflatten(-1, (-1, block)).any(-1).transpose(-1, -2)
    at = torch.arange(1, chunks, dtype=torch.int32, device=table.device)
    later = torch.where(changed, at, chunks).flip(-1).cummin(-1).values.flip(-1)
    later = torch.nn.functional.pad(later, (0, 1), value=chunks)
    number = torch.arange(chunks, dtype=torch.int32, device=table.device)
    return torch.minimum(later, (number // LOOKED_AHEAD + 1) * LOOKED_AHEAD).int().contiguous()
