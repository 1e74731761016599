"""The scorer: one number for each token and KV head, on which the selection ranks keys."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

# A gate passes from 0 to 1 over a score difference of 1: at the start contents differ by a tenth of that.
INITIAL_SPREAD = 0.1


class Scorer(nn.Module):
    """Scores ``u[b, h, i] = x[b, i] . weight[h] + slope[h] * i``, at least float32, under autocast too.

    The scores do not depend on the query, so that a key that has been evicted never returns. ``i`` is the index in
    the row, whatever positions the rotary embedding is given. There is no bias: adding a number to all scores of a
    row changes no gate.

    The **slope** is there because thresholds never fall: without it, a key enters the selection only by outscoring
    all but k of the keys before it, and ``weight`` would have to predict ever larger scores. A key whose content is
    better by c outlives a competitor that comes up to ``c / slope`` positions later, so the slope sets the reach.
    It is fixed by default; a learnable one is kept as its logarithm, for each KV head, which keeps it positive and
    makes an optimizer's steps relative. In float32 a score at position i is exact to ``slope * i * 2^-24``.

    **Initialisation**: ``weight`` is normal with standard deviation ``0.1 / sqrt(embed_dim)``, so the contents of
    tokens of unit RMS differ by about a tenth of a gate. Scores are equal up to the slope: the newest candidates are
    selected first, and as eviction is final, no early accident of ``weight`` holds a slot.

    State: ``weight`` [kv_heads, embed_dim], and ``log_slope`` [kv_heads] where the slope is learnable.
    """

    def __init__(
        self,
        embed_dim: int,
        kv_heads: int,
        slope: float,
        *,
        learnable_slope: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.initial_slope = slope
        self.weight = nn.Parameter(torch.empty(kv_heads, embed_dim, device=device, dtype=dtype))
        logarithm = nn.Parameter(torch.empty(kv_heads, device=device, dtype=dtype)) if learnable_slope else None
        self.log_slope: nn.Parameter | None
        self.register_parameter("log_slope", logarithm)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw ``weight`` anew and return a learnable slope to where it started."""
        nn.init.normal_(self.weight, std=INITIAL_SPREAD / math.sqrt(self.weight.shape[1]))
        if self.log_slope is not None:
            nn.init.constant_(self.log_slope, math.log(self.initial_slope))

    @property
    def slope(self) -> Tensor:
        """The slope of each KV head, [kv_heads], at least float32."""
        exact = torch.promote_types(self.weight.dtype, torch.float32)
        if self.log_slope is not None:
            return self.log_slope.to(exact).exp()
        return torch.full(self.weight.shape[:1], self.initial_slope, device=self.weight.device, dtype=exact)

    def content(self, x: Tensor) -> Tensor:
        """What the scores owe to the tokens x [B, S, embed_dim] alone: [B, kv_heads, S]."""
        exact = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            return nn.functional.linear(x.to(exact), self.weight.to(exact)).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """The scores of tokens x [B, S, embed_dim]: [B, kv_heads, S] float32, float64 for float64."""
        content = self.content(x)
        index = torch.arange(x.shape[1], device=x.device, dtype=content.dtype)
        with torch.autocast(x.device.type, enabled=False):
            return content + self.slope.to(content.dtype).unsqueeze(-1) * index

    def extra_repr(self) -> str:
        kind = "learnable, from " if self.log_slope is not None else ""
        return f"{self.weight.shape[1]}, kv_heads={self.weight.shape[0]}, slope={kind}{self.initial_slope:.4g}"
