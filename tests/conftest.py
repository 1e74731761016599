"""Fixtures of all tests, and the hypothesis profile: reproducible, without a deadline on shared machines."""

from __future__ import annotations

import os
from typing import Any

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile(
    "flexsparse", deadline=None, derandomize=True, max_examples=60, report_multiple_bugs=False
)
hypothesis.settings.load_profile("flexsparse")
# The tests work on small tensors, for which a second thread costs more than it gives.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test draws the same numbers, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """``torch.empty`` and ``empty_like`` give NaN (or the largest integer), so a value that nobody wrote shows.

    In Triton's interpreter, kernels are watched as well: none may read or write beside the tensors that it was given.
    """

    def poison(function: Any) -> Any:
        def filled(*args: Any, **kwargs: Any) -> torch.Tensor:
            made: torch.Tensor = function(*args, **kwargs)
            if made.dtype is torch.bool:
                return made.fill_(True)
            return made.fill_(float("nan") if made.is_floating_point() else torch.iinfo(made.dtype).max)

        return filled

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))
    if os.environ.get("TRITON_INTERPRET") == "1":
        from tests.memory_bounds import check_accesses

        check_accesses(monkeypatch)
