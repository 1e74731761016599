"""Sets of intervals against Python's sets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexsparse.analysis.intervals import Intervals, normal, union, where

SIZE = 12
ROWS = st.lists(
    st.lists(st.tuples(st.integers(-3, 14), st.integers(-3, 14)), min_size=3, max_size=3), min_size=4, max_size=4
)


def made(rows: list[list[tuple[int, int]]]) -> tuple[Intervals, list[set[int]]]:
    """Intervals with one slot, or as many as needed, and the sets that they are."""
    ends = torch.tensor(rows)
    wanted = [{x for low, high in row for x in range(max(low, 0), min(high, SIZE - 1) + 1)} for row in rows]
    return normal(ends[..., 0], ends[..., 1], SIZE), wanted


def sets(x: Intervals, rows: int) -> list[set[int]]:
    low, high = x.low.expand(rows, -1).tolist(), x.high.expand(rows, -1).tolist()
    found = []
    for lows, highs in zip(low, high, strict=True):
        members = [m for a, b in zip(lows, highs, strict=True) for m in range(a, b + 1)]
        assert len(members) == len(set(members)), "intervals of a row overlap"
        assert all(0 <= m < SIZE for m in members)
        found.append(set(members))
    return found


@pytest.mark.parametrize("pairs", [0, 64], ids=["by complements", "pair by pair"])
@given(one=ROWS, other=ROWS, single=st.booleans())
def test_operations_are_those_of_sets(one: list[Any], other: list[Any], single: bool, pairs: int) -> None:
    (a, in_a), (b, in_b) = (made([row[:1] for row in x] if single else x) for x in (one, other))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flexsparse.analysis.intervals._PAIRS", pairs)
        assert sets(a, 4) == in_a
        assert sets(a & b, 4) == [x & y for x, y in zip(in_a, in_b, strict=True)]
        assert sets(union([a, b]), 4) == [x | y for x, y in zip(in_a, in_b, strict=True)]
        assert sets(~a, 4) == [set(range(SIZE)) - x for x in in_a]
        chosen = torch.tensor([True, False, True, False])
        assert sets(where(chosen, a), 4) == [x if n % 2 == 0 else set() for n, x in enumerate(in_a)]
