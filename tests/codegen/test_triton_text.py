"""Expressions as Triton text."""

from __future__ import annotations

from typing import Any

import pytest

import flexsparse as fs
from flexsparse.codegen.triton_text import TritonText
from flexsparse.language import kv, q, where


@pytest.mark.parametrize(
    ("mask", "text"),
    [
        ((q - kv) % 4 == 0, "floormod(q - kv, 4) == 0"),
        ((q < 3) | (kv == q) & (q - (kv - 1) > 2), "(q < 3) | (kv == q) & (q - (kv - 1) > 2)"),
        (~(q < kv), "~(q < kv)"),
        (where(q < kv, 1, q * 2 - kv) == 3, "tl.where(q < kv, 1, q * 2 - kv) == 3"),
    ],
)
def test_parentheses_stand_where_precedence_wants_them(mask: Any, text: str) -> None:
    assert TritonText().emit(mask.node) == text


def test_deep_expressions_take_time_in_proportion() -> None:
    """A chain of 100 operands would take 2^100 steps if each level rendered its operands twice."""
    mask: Any = q == kv
    for distance in range(1, 100):
        mask = mask | (q - kv == distance)
    assert TritonText().emit(mask.node).count("|") == 99


def test_a_long_mask_beside_a_selection_is_printed() -> None:
    text = fs.compile("logsparse() | sparsek(9, after=4)").code("kernels")
    assert text.count("def ") > 6
