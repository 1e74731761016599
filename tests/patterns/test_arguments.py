"""What each pattern refuses, and the words in which it does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from flexsparse import patterns
from flexsparse.errors import PatternArgumentError
from flexsparse.patterns import catalogue

P: Any = patterns

REFUSED: list[tuple[Callable[[], object], str]] = [
    (lambda: P.sliding_window(0), "sliding_window(window): got 0, expected an integer of at least 1."),
    (lambda: P.sliding_window(window=-3), "sliding_window(window): got -3, expected an integer of at least 1."),
    (
        lambda: P.sliding_window("8"),
        "sliding_window(window): got '8', str, expected int or Value. "
        "The pattern takes sliding_window(window, causal=True).",
    ),
    (
        lambda: P.sliding_window(True),
        "sliding_window(window): got True, bool, expected int or Value. "
        "The pattern takes sliding_window(window, causal=True).",
    ),
    (lambda: P.sinks(0), "sinks(count): got 0, expected an integer of at least 1."),
    (lambda: P.global_tokens(0), "global_tokens(count): got 0, expected an integer of at least 1."),
    (lambda: P.prefix_lm(-1), "prefix_lm(prefix): got -1, expected an integer of at least 0."),
    (lambda: P.dilated_window(0, 2), "dilated_window(window): got 0, expected an integer of at least 1."),
    (lambda: P.dilated_window(2, 0), "dilated_window(dilation): got 0, expected an integer of at least 1."),
    (lambda: P.softcap(0.0), "softcap(cap): got 0.0, expected a number above 0."),
    (lambda: P.softcap(-1), "softcap(cap): got -1, expected a number above 0."),
    (lambda: P.softcap(float("nan")), "softcap(cap): got nan, expected a number above 0."),
    (lambda: P.relative_bias(0), "relative_bias(span): got 0, expected an integer of at least 1."),
    (lambda: P.sparsek(0), "sparsek(k): got 0, expected an integer of at least 1."),
    (lambda: P.sparsek(4, after=-1), "sparsek(after): got -1, expected an integer of at least 0."),
    (
        lambda: P.sparsek(4, gate="soft"),
        "sparsek(gate): got 'soft', expected one of 'kv', 'k', 'v', 'logit', 'none', 'ste', "
        "'ste_identity', 'ste_sigmoid', 'capped_softmax'.",
    ),
    (
        lambda: P.sparsek(4, scores="query"),
        "sparsek(scores): got 'query', expected the keyword under which the tensor is given at the call.",
    ),
    (lambda: P.sparsek_window(4, 0), "sparsek_window(window): got 0, expected an integer of at least 1."),
    (lambda: P.sparsek_window(0, 4), "sparsek_window(k): got 0, expected an integer of at least 1."),
]


@pytest.mark.parametrize(("call", "message"), REFUSED, ids=[m.split(",")[0] for _, m in REFUSED])
def test_argument_is_refused_in_words(call: Callable[[], object], message: str) -> None:
    with pytest.raises(PatternArgumentError) as caught:
        call()
    assert str(caught.value) == message


def test_unknown_argument_names_what_the_pattern_takes() -> None:
    with pytest.raises(PatternArgumentError) as caught:
        P.sliding_window(windw=3)
    assert caught.value.expected == "sliding_window(window, causal=True)"
    assert caught.value.mend == "Did you mean 'window'?"


def test_missing_argument_names_what_the_pattern_takes() -> None:
    with pytest.raises(PatternArgumentError) as caught:
        P.dilated_window(3)
    assert caught.value.argument == "dilated_window"
    assert caught.value.expected == "dilated_window(window, dilation)"
    assert "dilated_window(3): missing a required argument: 'dilation'" in caught.value.got


@pytest.mark.parametrize("name", sorted(catalogue()))
def test_every_example_prints_as_the_call_that_made_it(name: str) -> None:
    for arguments in catalogue()[name].examples:
        pattern = catalogue()[name](**arguments)
        assert str(pattern).startswith(f"{name}(")
        for value in arguments.values():
            assert repr(value) in str(pattern)


def test_defaults_are_not_printed_and_required_arguments_go_by_position() -> None:
    assert str(P.sparsek(k=8, after=0, gate="kv")) == "sparsek(8)"
    assert str(P.sparsek(8, gate="v", after=3)) == "sparsek(8, after=3, gate='v')"
    assert str(P.sliding_window(8, causal=False)) == "sliding_window(8, causal=False)"
