"""Text to expression: what reads, what is refused, and where the error points."""

from __future__ import annotations

from typing import Any

import pytest

import flexsparse as fs
from flexsparse.errors import ExpressionError, ParseError, PatternArgumentError
from flexsparse.language import b, captured, kv, q, where
from flexsparse.patterns import catalogue

P: Any = catalogue()


@pytest.mark.parametrize(
    ("source", "expression"),
    [
        ("causal", P["causal"]()),
        ("  causal()  ", P["causal"]()),
        ("causal & sliding_window(512)", P["causal"]() & P["sliding_window"](512)),
        (
            "causal & (sliding_window(8) | sinks(4) | sparsek(8, after=8))",
            P["causal"]() & (P["sliding_window"](8) | P["sinks"](4) | P["sparsek"](8, after=8)),
        ),
        ("sliding_window(window=8, causal=False)", P["sliding_window"](8, causal=False)),
        ("causal + alibi", P["causal"]() + P["alibi"]()),
        ("causal.score(softcap(30.0))", P["causal"]().score(P["softcap"](30.0))),
        ("causal().score(softcap(30))", P["causal"]().score(P["softcap"](30))),
        ("(kv <= q) & ~(kv < 3)", (kv <= q) & ~(kv < 3)),
        ("abs(q - kv) < 4", abs(q - kv) < 4),
        ("where(kv < q, 1, 2.5)", where(kv < q, 1, 2.5)),
        ("q < inf", q < float("inf")),
        ('captured("doc", dims=("b", "s"))[b, q] == 1', captured("doc", dims=("b", "s"))[b, q] == 1),
        ('captured("doc", dims=["b", "s"])[b, q] == 1', captured("doc", dims=("b", "s"))[b, q] == 1),
        ("document(cu_seqlens='ends')", P["document"](cu_seqlens="ends")),
        ("(causal\n & sinks(4))", P["causal"]() & P["sinks"](4)),
        ("q - -3 < kv", q - -3 < kv),
        ("True & causal", True & P["causal"]()),
    ],
)
def test_reads_what_python_would_build(source: str, expression: Any) -> None:
    assert fs.parse(source).node == expression.node


def test_tensors_declared_elsewhere_are_read_by_name() -> None:
    doc: Any = captured("doc", dims=("b", "s"))
    assert fs.parse("doc[b, q] == doc[b, kv]", captured={"doc": doc}) == (doc[b, q] == doc[b, kv])


UNSAFE = [
    "__import__('os').system('true')",
    "causal.__class__",
    "causal().__class__",
    "causal.function",
    "causal.examples",
    "(lambda: 1)()",
    "lambda q: q",
    "[q for q in (1, 2)]",
    "{q: kv}",
    "f'{q}'",
    "q if kv else h",
    "(y := q)",
    "exec('1')",
    "eval('q')",
    "open('file')",
    "getattr(q, 'node')",
    "print(1)",
    "causal.score",
    "causal.score.__self__",
    "q.node",
    "sinks(*[4])",
    "sinks(**{'count': 4})",
    "per_head([1, 2]).node",
    "q ** kv",
    "q @ kv",
    "q << 2",
    "q is kv",
    "q in kv",
    "b'bytes' == q",
    "1j + q",
    "... == q",
]


@pytest.mark.parametrize("source", UNSAFE)
def test_nothing_but_the_language_is_executed(source: str) -> None:
    with pytest.raises(ParseError):
        fs.parse(source)


@pytest.mark.parametrize(
    ("source", "column", "got", "expected", "mend"),
    [
        (
            "causal & sliding_windw(8)",
            10,
            "the name 'sliding_windw'",
            "a pattern or function of the language",
            "Did you mean 'sliding_window'?",
        ),
        ("causl", 1, "the name 'causl'", "a pattern, a symbol or a function of the language", "Did you mean 'causal'?"),
        (
            "causal & xyzzy",
            10,
            "the name 'xyzzy'",
            "a pattern, a symbol or a function of the language",
            'Patterns are listed by `flexsparse list`; a tensor is written captured("name", dims=("b", "s")).',
        ),
        (
            "0 <= q - kv < 8",
            1,
            "the chained comparison 0 <= q - kv < 8",
            "one comparison at a time",
            "Write (q >= kv) & (q - kv < w) for 0 <= q - kv < w.",
        ),
        ("causal and sinks(4)", 1, "causal and sinks(4)", "& | ~ between masks", "Replace and, or, not by & | ~."),
        ("causal & (not sinks(4))", 11, "not sinks(4)", "& | ~ between masks", "Replace and, or, not by & | ~."),
        ("q[0] < 3", 1, "q[0]", "a captured tensor before [...]", ""),
        ("causal.nodes()", 1, "causal.nodes", "the name of a pattern or function, pattern.score or pattern.sink", ""),
        ("sinks(*[4])", 1, "sinks(*[4])", "arguments without * and **", ""),
        ("q // 0 < kv and q", 1, "q // 0 < kv and q", "& | ~ between masks", "Replace and, or, not by & | ~."),
        ("causal & q ** 2", 10, "q ** 2", "patterns, symbols, numbers, operators and calls", ""),
        (
            "exp(q, kv) < 1",
            1,
            "exp() takes 1 positional argument but 2 were given",
            "operands that the operator takes",
            "",
        ),
    ],
)
def test_error_points_and_mends(source: str, column: int, got: str, expected: str, mend: str) -> None:
    with pytest.raises(ParseError) as caught:
        fs.parse(source)
    error = caught.value
    assert (error.column, error.got, error.expected, error.mend) == (column, got, expected, mend)
    assert str(error).startswith(f"expression {source!r}, column {column}: got {got}, expected {expected}.")


def test_broken_syntax_names_the_column() -> None:
    with pytest.raises(ParseError) as caught:
        fs.parse("causal & (sinks(4)")
    assert caught.value.column == 10
    assert str(caught.value) == (
        "expression 'causal & (sinks(4)': got '(' was never closed at column 10, "
        "expected an expression such as causal & sliding_window(512)."
    )


@pytest.mark.parametrize("source", ["", "   ", "causal;", "causal &", "a = causal"])
def test_text_that_is_no_expression(source: str) -> None:
    with pytest.raises(ParseError, match="expected an expression such as causal & sliding_window"):
        fs.parse(source)


def test_only_text_is_parsed() -> None:
    with pytest.raises(ParseError) as caught:
        fs.parse(3)  # type: ignore[arg-type]
    assert str(caught.value) == "parse(source): got int, expected text."


@pytest.mark.parametrize("source", ["3", "'causal'", "None", "(causal, causal)", "[causal]"])
def test_a_value_that_is_no_expression(source: str) -> None:
    with pytest.raises(ParseError, match="expected a pattern, a mask or a score"):
        fs.parse(source)


def test_depth_is_bounded_and_reported() -> None:
    with pytest.raises(ParseError):
        fs.parse("~" * 100_000 + "causal")


def test_wrong_arguments_are_the_patterns_own_error() -> None:
    with pytest.raises(PatternArgumentError) as caught:
        fs.parse("causal & sliding_window(0)")
    assert str(caught.value) == "sliding_window(window): got 0, expected an integer of at least 1."
    with pytest.raises(PatternArgumentError) as caught:
        fs.parse("sliding_window")
    assert caught.value.expected == "sliding_window(window, causal=True)"
    with pytest.raises(PatternArgumentError) as caught:
        fs.parse("sliding_window(8, windw=3)")
    assert caught.value.mend == "Did you mean 'window'?"


def test_wrong_operands_are_the_languages_own_error() -> None:
    with pytest.raises(ExpressionError, match=r"~ of sparsek\(8\): got a pattern with a selection"):
        fs.parse("~sparsek(8)")
