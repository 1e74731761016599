"""Rotary position embedding (Su et al., arXiv 2104.09864) in the half-split convention of GPT-NeoX and Llama.

Component n of a head is paired with component n + D / 2, and the pair is turned by ``position * base^(-2n / D)``.
"""

from __future__ import annotations

import torch
from torch import Tensor


def turns(positions: Tensor, head_dim: int, base: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every angle in ``dtype``, from positions [S] or [B, S]: [S, D / 2] or [B, 1, S, D / 2].

    Angles are formed in float64: at position 1,000,000 a float32 angle is off by some 0.03 radians.
    """
    half = head_dim // 2
    step = torch.arange(half, device=positions.device, dtype=torch.float64)
    angle = positions.double().unsqueeze(-1) * base ** (-step / half)
    angle = angle.unsqueeze(1) if positions.dim() == 2 else angle
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, H, S, D] turned by ``turns``, in the dtype of the turns and rounded to x's once."""
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
