"""Every declared example of every pattern runs as attention, with gradients, and gives what the oracle gives."""

from __future__ import annotations

from typing import Any

import pytest

import flexsparse as fs
from flexsparse.ir.nodes import mentions
from flexsparse.language import Pattern
from flexsparse.patterns import catalogue
from tests.helpers import assert_same_result, make_inputs, oracle, run, tensors_of

EXAMPLES = [(name, dict(e)) for name, p in catalogue().items() for e in p.examples]


def whole(expression: Any) -> Any:
    """The expression as a pattern: a score goes onto causal attention, added or in place of the score."""
    if isinstance(expression, Pattern):
        return expression
    causal: Any = catalogue()["causal"]()
    return causal.score(expression) if mentions(expression.node, "score") else causal + expression


@pytest.mark.parametrize("size", [1, 40])
@pytest.mark.parametrize(("name", "arguments"), EXAMPLES, ids=[f"{n}-{a}" for n, a in EXAMPLES])
def test_example_runs_and_is_the_oracle(name: str, arguments: dict[str, Any], size: int) -> None:
    pattern = whole(catalogue()[name](**arguments))
    inputs = make_inputs(tensors_of(pattern), size=size)
    got = run(fs.compile(pattern, backend="chunked", block_size=16), inputs)
    assert_same_result(got, run(oracle(pattern), inputs))


@pytest.mark.parametrize(("name", "arguments"), EXAMPLES, ids=[f"{n}-{a}" for n, a in EXAMPLES])
def test_example_reads_back_from_its_text(name: str, arguments: dict[str, Any]) -> None:
    expression = catalogue()[name](**arguments)
    assert fs.parse(str(expression)).node == expression.node
