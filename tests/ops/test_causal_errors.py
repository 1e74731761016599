"""What the causal operators refuse, and what NaN does when nobody checks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from flexsparse.errors import DtypeError, NonFiniteScoresError, PatternArgumentError, SegmentError, ShapeError
from flexsparse.ops import causal_sparsek, causal_topk

U = torch.zeros(2, 4)
SORTED = "expected non-decreasing ids along the sequence. Number the documents in the order in which they are packed."

REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"k": 0}, PatternArgumentError, "k: got 0, expected an integer of at least 1."),
    ({"k": 1.0}, PatternArgumentError, "k: got 1.0, expected an integer of at least 1."),
    ({"after": -1}, PatternArgumentError, "after: got -1, expected an integer of at least 0."),
    ({"after": True}, PatternArgumentError, "after: got True, expected an integer of at least 0."),
    ({"u": torch.zeros(2, 0)}, ShapeError, "u: got no positions, expected at least one score in the last dimension."),
    ({"u": torch.tensor(0.0)}, ShapeError, "u: got a scalar, expected at least one dimension."),
    (
        {"u": torch.zeros(4, dtype=torch.int32)},
        DtypeError,
        "u: got torch.int32, expected a tensor of float16, bfloat16, float32 or float64.",
    ),
    ({"segments": torch.zeros(4)}, DtypeError, "segments: got torch.float32, expected a tensor of integers."),
    ({"segments": [0, 0, 1, 1]}, DtypeError, "segments: got list, expected a tensor of integers."),
    (
        {"segments": torch.zeros(5, dtype=torch.long)},
        ShapeError,
        "segments: got (5,), expected [S] or a shape that broadcasts to (2, 4).",
    ),
    ({"segments": torch.tensor([0, 2, 1, 3])}, SegmentError, f"segments: got ids that fall at position 2, {SORTED}"),
    (
        {"segments": torch.tensor([[0, 0, 0, 0], [0, 1, 1, 0]])},
        SegmentError,
        f"segments: got ids that fall at position [1, 3], {SORTED}",
    ),
    (
        {"u": torch.tensor([0.0, math.nan])},
        NonFiniteScoresError,
        "u: got NaN at (1,) and 0 more, expected numbers; -inf excludes a key. "
        "Find where the scorer diverged, or mask padding with -inf.",
    ),
]


@pytest.mark.parametrize("operator", [causal_sparsek, causal_topk])
@pytest.mark.parametrize(("change", "error", "message"), REFUSED, ids=[m for _, _, m in REFUSED])
def test_bad_input_is_refused_in_words(
    operator: Callable[..., Any], change: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as caught:
        operator(**{"u": U, "k": 1, **change})
    assert str(caught.value) == message


def test_without_validation_tau_is_nan_from_the_position_on_in_that_row_alone() -> None:
    u = torch.randn(2, 8)
    u[1, 3] = math.nan
    tau = causal_sparsek(u, 2, validate=False).tau
    assert torch.equal(tau[0], causal_sparsek(u[0], 2).tau)
    assert torch.equal(tau[1, :3], causal_sparsek(u[1, :3], 2).tau)
    assert torch.isnan(tau[1, 3:]).all()


def test_without_validation_a_nan_is_never_selected() -> None:
    u = torch.tensor([1.0, math.nan, 0.0])
    birth, death, _ = causal_topk(u, 1, validate=False)
    assert death.tolist()[1] == birth.tolist()[1]


def test_negative_and_repeated_ids_are_fine_as_long_as_they_do_not_fall() -> None:
    ids = torch.tensor([-5, -5, 0, 7])
    assert torch.equal(causal_topk(U, 1, 0, ids).death, causal_topk(U, 1, 0, torch.tensor([0, 0, 1, 2])).death)
