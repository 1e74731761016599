"""The keys in slots with what a gather wants to know of each, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from flexsparse.codegen.kernels import slot_records as kernels
from flexsparse.codegen.kernels.record_layout import KEY_BITS


def slot_records(table: Tensor, death: Tensor, u: Tensor | None, chunk: int) -> Tensor:
    """As ``codegen.kernels.slot_records``, which a GPU has; PyTorch operations elsewhere."""
    if table.is_cuda:
        return kernels.slot_records(table, death, u, chunk)
    times, found = death.shape[-1], table >= 0
    key = table.clamp(min=0)
    place = key.flatten(-2).long().flatten(0, -2)
    start = chunk * torch.arange(table.shape[-2], dtype=torch.int32, device=table.device)
    until = death.reshape(-1, times).gather(1, place).view(table.shape)
    stays = torch.where(found, (until - start[:, None]).clamp(max=chunk), 0)
    bits = torch.zeros_like(table)
    if u is not None:
        score = u.reshape(-1, times).gather(1, place).view(table.shape)
        bits = torch.where(found & ~torch.isnan(score), score, 0.0).view(torch.int32)
    return torch.stack((key | (stays << KEY_BITS), bits), -1)
