"""A pattern with another k is the pattern that is written with it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import flexsparse as fs
from flexsparse.errors import ExpressionError, PatternArgumentError
from flexsparse.expression import pattern_of
from flexsparse.ir.nodes import Named
from flexsparse.patterns import causal as _causal
from flexsparse.patterns import sinks as _sinks
from flexsparse.patterns import sliding_window as _sliding_window
from flexsparse.patterns import sparsek as _sparsek
from flexsparse.patterns import sparsek_window as _sparsek_window

# For type checkers these are modules of the catalogue.
causal: Any = _causal
sinks: Any = _sinks
sliding_window: Any = _sliding_window
sparsek: Any = _sparsek
named_window: Any = _sparsek_window


def two(first: int, second: int) -> Any:
    other = sparsek(second, scores="others")
    return (causal() & (sliding_window(8) | sinks(2) | sparsek(first, after=8))) | other


def test_every_selection_takes_it() -> None:
    assert two(4, 7).with_k(5) == two(5, 5)
    assert two(4, 7).with_k(4, "scores") == two(4, 7)


def test_one_selection_takes_it() -> None:
    assert two(4, 7).with_k(5, "others") == two(4, 5)
    assert two(4, 7).with_k(5, "scores") == two(5, 7)


def test_a_name_says_the_new_number_or_nothing() -> None:
    assert str(named_window(4, 8).with_k(6)) == str(named_window(6, 8))
    assert named_window(4, 8).with_k(6) == named_window(6, 8)
    # This name says the budget of one of its two selections.
    node = Named("both", (("", 4),), two(4, 7).node)
    changed = pattern_of(node).with_k(6)
    assert changed == two(6, 6)
    assert fs.parse(str(changed)) == changed


def test_attention_is_that_of_the_pattern_written_so() -> None:
    query, key, value = torch.randn(3, 1, 2, 40, 8, generator=torch.Generator().manual_seed(0))
    scores = torch.randn(1, 2, 40, generator=torch.Generator().manual_seed(1))
    changed: Any = fs.compile(named_window(4, 8).with_k(6), backend="chunked")
    written: Any = fs.compile(named_window(6, 8), backend="chunked")
    assert torch.equal(changed(query, key, value, scores=scores), written(query, key, value, scores=scores))


@pytest.mark.parametrize("k", [0, -1, True, 2.0])
def test_a_wrong_budget_is_refused(k: Any) -> None:
    with pytest.raises(PatternArgumentError, match=r"with_k\(k\): got .*, expected an integer of at least 1"):
        sparsek(4).with_k(k)


def test_nothing_to_change_is_refused() -> None:
    with pytest.raises(ExpressionError, match=r"with_k: got sparsek\(4\), expected .* by 'other'"):
        sparsek(4).with_k(5, "other")
    with pytest.raises(ExpressionError, match="a pattern with a selection, such as"):
        causal().with_k(5)
