"""Rows of scores on which selection operators go wrong: ties, kinks, infinities, spreads from 0 to 1e30."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Row = Callable[[int, torch.Generator], Tensor]


def _normal(n: int, g: torch.Generator) -> Tensor:
    return torch.randn(n, generator=g, dtype=torch.float64)


def _with(value: float, share: float) -> Row:
    def row(n: int, g: torch.Generator) -> Tensor:
        chosen = torch.rand(n, generator=g) < share
        return torch.where(chosen, value, _normal(n, g))

    return row


REGIMES: dict[str, Row] = {
    "normal": _normal,
    "integers": lambda n, g: torch.randint(-3, 4, (n,), generator=g).double(),
    "half integers": lambda n, g: torch.randint(-4, 5, (n,), generator=g).double() / 2,
    "constant": lambda n, g: torch.full((n,), 0.7, dtype=torch.float64),
    "nearly equal": lambda n, g: 1 + 1e-9 * _normal(n, g),
    "widely spread": lambda n, g: 1e4 * _normal(n, g),
    "huge": lambda n, g: 1e30 * _normal(n, g),
    "falling": lambda n, g: _normal(n, g).sort(descending=True).values,
    "rising": lambda n, g: _normal(n, g).sort().values,
    "rising steps": lambda n, g: torch.arange(n, dtype=torch.float64),
    "falling steps": lambda n, g: -torch.arange(n, dtype=torch.float64),
    "position slope": lambda n, g: _normal(n, g) + 0.01 * torch.arange(n),
    "heavy ties": lambda n, g: torch.randint(0, 2, (n,), generator=g).double() * 1.5,
    "gap wider than one": lambda n, g: torch.randint(0, 2, (n,), generator=g).double() * 5 + 0.25,
    "some -inf": _with(-math.inf, 0.3),
    "some +inf": _with(math.inf, 0.1),
    "many +inf": _with(math.inf, 0.8),
    "all -inf": lambda n, g: torch.full((n,), -math.inf, dtype=torch.float64),
    "all +inf": lambda n, g: torch.full((n,), math.inf, dtype=torch.float64),
    "both infinities": lambda n, g: torch.where(
        torch.rand(n, generator=g) < 0.2,
        math.inf,
        torch.where(torch.rand(n, generator=g) < 0.3, -math.inf, _normal(n, g)),
    ),
}
FINITE = [
    name for name in REGIMES if "inf" not in name
]  # fmt: skip


def draw(regime: str, n: int, seed: int = 0) -> Tensor:
    """One row [n] float64."""
    return REGIMES[regime](n, torch.Generator().manual_seed(seed))


def grid_step(z: Tensor) -> float:
    """The rounding that is documented: range * size * 2^-61, and the spacing of float64 at the largest score."""
    finite = z[torch.isfinite(z)]
    if not finite.numel():
        return 0.0
    largest = float(finite.abs().max())
    # The grid is a power of two below the bound on the range, so twice the bound is safe.
    return max((2 * largest + 1) * z.numel() * 2.0**-59, 4 * math.ulp(largest), 2.0**-52)


def in_forms(
    cases: Sequence[Any], ones: Sequence[Any], others: Sequence[Any], whole: Callable[[Any], bool]
) -> list[tuple[Any, ...]]:
    """Cases in their forms, one of two ``ones`` and of two ``others``: in all where ``whole(case)``, else in two, which
    have each of the four once.
    """
    return [
        (*case, *form)
        for number, case in enumerate(cases)
        for place, form in enumerate(itertools.product(ones, others))
        if whole(case) or place in (number % 2, 3 - number % 2)
    ]
