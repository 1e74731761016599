"""Properties of generated expressions: text reads back, pickles are equal, compiling does not depend on the form."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
from hypothesis import given, settings

import flexsparse as fs
from flexsparse.ir.lower import lower
from flexsparse.language import score, tanh
from flexsparse.patterns import catalogue
from tests.language.strategies import CAPTURED, INDICES, PATTERNS

P: Any = catalogue()


@settings(max_examples=400)
@given(PATTERNS)
def test_text_reads_back_as_the_same_pattern(pattern: Any) -> None:
    read = fs.parse(str(pattern), captured=CAPTURED)
    assert read == pattern
    assert str(read) == str(pattern)
    assert hash(read) == hash(pattern)


@pytest.mark.parametrize(
    "text",
    [
        "block_topk(2, block=16)",
        "block_topk(2, block=16, score='bounds')",
        "moba(64, 4) & document()",
        "~moba(8, 1) & causal()",
        "(quest(16, 2) + alibi()) | sparsek(4)",
        "causal() + where(moba(4, 1), 1, 0)",
    ],
)
def test_selections_of_blocks_read_back(text: str) -> None:
    read = fs.parse(text)
    assert str(read) == text
    assert pickle.loads(pickle.dumps(read)) == read


@given(INDICES)
def test_text_reads_back_as_the_same_number(number: Any) -> None:
    assert fs.parse(str(number), captured=CAPTURED).node == number.node


@given(PATTERNS)
def test_pickle_gives_an_equal_pattern(pattern: Any) -> None:
    assert pickle.loads(pickle.dumps(pattern)) == pattern


@given(PATTERNS)
def test_text_and_expression_lower_to_one_program(pattern: Any) -> None:
    assert str(lower(fs.parse(str(pattern), captured=CAPTURED).node)) == str(lower(pattern.node))


def test_a_score_that_adds_an_expression_in_score_prints_as_a_replacement() -> None:
    pattern = P["causal"]().score(score + tanh(score))
    assert str(pattern) == "causal().score(score + tanh(score))"
    assert fs.parse(str(pattern)) == pattern
