"""What the language refuses: the class of the error and its whole text."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest

import flexsparse as fs
from flexsparse import errors
from flexsparse import language as fl
from flexsparse.language import b, captured, everything, h, kv, per_head, q, score, topk
from flexsparse.patterns import catalogue

P: Any = catalogue()
doc: Any = captured("doc", dims=("b", "s"))
# Without its types, for calls that a type checker would refuse before Python runs them.
untyped: Any = fl
untyped_compile: Any = fs.compile

TRUTH = (
    "got Python's `and`, `or`, `not`, `if`, or a chained comparison such as 0 <= q - kv < w, "
    "expected an expression that is evaluated later, element by element. Use & | ~ between masks, "
    "where(mask, a, b) to choose, and write a chain as (q >= kv) & (q - kv < w)."
)
PLAIN = (
    "got a pattern with a selection or a score of its own, expected a plain mask. "
    "A selection carries gates and gradients, which {0} would lose; apply {0} to masks, "
    "and combine selections with & and |."
)
RUNNING = (
    "got a comparison of the running score, expected a mask in b, h, q, kv, sizes and captured tensors. "
    "Masks are decided before scores are computed; use minimum or maximum inside pattern.score(...)."
)
SINK_EXPECTED = (
    "expected a number for each (b, h, q), below infinity: a sink has no key. "
    "Use a number, or a tensor indexed by b, h or q, such as sink_logits[h]."
)
SINK_ONCE = "expected one sink, as a softmax has one denominator. Give the sink once, to the whole: (a | b).sink(...)."
NAME = "expected an identifier that is not a symbol or an argument of the call. Choose another name, such as 'doc'."
COMPARE_IT = "Compare it to get a mask, or add it to a pattern: pattern + score."
CAPTURE_IT = "Captured tensors are declared with captured(name, dims=...) and indexed, as in doc[b, kv]."

TRUTHS: list[tuple[Callable[[], object], str]] = [
    (lambda: bool(kv <= q), "kv <= q"),
    (lambda: 0 <= q - kv < 3, "q - kv >= 0"),
    (lambda: (kv <= q) and (q < 3), "kv <= q"),
    (lambda: not topk(3), "topk(3)"),
    (lambda: 1 if q else 2, "q"),
]


@pytest.mark.parametrize(("call", "shown"), TRUTHS, ids=[s for _, s in TRUTHS])
def test_truth_value(call: Callable[[], object], shown: str) -> None:
    with pytest.raises(errors.TruthValueError) as caught:
        call()
    assert str(caught.value) == f"truth value of {shown}: {TRUTH}"


EXPRESSION: list[tuple[Callable[[], object], str]] = [
    (lambda: ~topk(3), f"~ of topk(3): {PLAIN.format('~')}"),
    (lambda: ~P["sparsek"](3), f"~ of sparsek(3): {PLAIN.format('~')}"),
    (lambda: ~((kv < q) + 1), f"~ of (kv < q) + 1: {PLAIN.format('~')}"),
    (lambda: topk(3) ^ (kv < q), f"^ of topk(3): {PLAIN.format('^')}"),
    (lambda: (kv < q) ^ topk(3), f"^ of topk(3): {PLAIN.format('^')}"),
    (lambda: fl.where(topk(3), 1, 0), f"where of topk(3): {PLAIN.format('where')}"),
    (
        lambda: P["causal"]() + score * 2,
        "causal() + score * 2: got a term that contains `score`, expected a term that is added to the score. "
        "Replace the score instead: pattern.score(score * 2).",
    ),
    (
        lambda: P["causal"]() + P["softcap"](30),
        "causal() + softcap(30): got a term that contains `score`, expected a term that is added to the score. "
        "Replace the score instead: pattern.score(softcap(30)).",
    ),
    (
        lambda: ~P["causal"]().sink(1),
        "~ of causal().sink(1): got a pattern with a sink, expected a plain mask. A sink belongs to the whole softmax: "
        "apply ~ to the mask, and .sink(...) to the result.",
    ),
    (
        lambda: P["causal"]() ^ P["learned_sinks"](),
        "^ of learned_sinks(): got a pattern with a sink, expected a plain mask. A sink belongs to the whole softmax: "
        "apply ^ to the mask, and .sink(...) to the result.",
    ),
    (
        lambda: P["causal"]().sink(kv / 2),
        f"sink(kv / 2): got a logit that depends on kv, {SINK_EXPECTED}",
    ),
    (lambda: P["causal"]().sink(score * 2), f"sink(score * 2): got a logit that depends on score, {SINK_EXPECTED}"),
    (lambda: P["causal"]().sink(float("inf")), f"sink(inf): got +inf, {SINK_EXPECTED}"),
    (lambda: P["causal"]().sink(float("nan")), "the logit of a sink: got NaN, expected a score."),
    (
        lambda: P["causal"]().sink(kv < q),
        "the logit of a sink: got kv < q, a mask or pattern, expected a score. "
        "Use where(mask, 1, 0) to turn a mask into numbers.",
    ),
    (
        lambda: P["causal"]().sink(1.0) & P["sinks"](2).sink(2.0),
        f"causal().sink(1.0) & sinks(2).sink(2.0): got two sinks, 1.0 and 2.0, {SINK_ONCE}",
    ),
    (
        lambda: (P["causal"]().sink(1.0) + 1) | P["learned_sinks"](),
        f"(causal().sink(1.0) + 1) | learned_sinks(): got two sinks, 1.0 and sink_logits[h], {SINK_ONCE}",
    ),
    (
        lambda: P["learned_sinks"]().sink(0),
        f"learned_sinks().sink(0): got two sinks, sink_logits[h] and 0, {SINK_ONCE}",
    ),
    (
        lambda: P["causal"]().sink(fl.where(P["moba"](4, 1), 1, 0)),
        f"sink(where(moba(4, 1), 1, 0)): got a logit that depends on kv, {SINK_EXPECTED}",
    ),
    (lambda: score < 3, f"comparison with score: {RUNNING}"),
    (lambda: 3 * score + 1 >= q, f"comparison with 3 * score + 1: {RUNNING}"),
    (lambda: q == score, f"comparison with score: {RUNNING}"),
    (
        lambda: doc[q],
        "doc[...]: got 1 indices, expected 2, one for each of dims=('b', 's'). Write doc[b, kv].",
    ),
    (
        lambda: doc[b, q, kv],
        "doc[...]: got 3 indices, expected 2, one for each of dims=('b', 's'). Write doc[b, kv].",
    ),
    (lambda: doc[b, q / 2], "index 1 of doc: got q / 2, a score, expected an index expression."),
    (
        lambda: doc[b, "q"],
        f"index 1 of doc: got 'q', expected an index expression. {CAPTURE_IT}",
    ),
    (lambda: (kv < q) & q, f"operand of &: got q, an index expression, expected a mask or pattern. {COMPARE_IT}"),
    (lambda: (kv < q) | 1, f"operand of |: got 1, an index expression, expected a mask or pattern. {COMPARE_IT}"),
    (lambda: (kv < q) & "causal", f"operand of &: got 'causal', expected a mask or pattern. {CAPTURE_IT}"),
    (lambda: (kv < q) & None, f"operand of &: got None, expected a mask or pattern. {CAPTURE_IT}"),
    (
        lambda: P["causal"]() + P["sinks"](4),
        "the score added to a pattern: got sinks(4), a mask or pattern, expected a score. "
        "Join patterns with & or |; where(mask, 1, 0) turns a mask into numbers.",
    ),
    (
        lambda: q + True,
        "operand of add: got True, a mask or pattern, expected a score. "
        "Use where(mask, 1, 0) to turn a mask into numbers.",
    ),
    (
        lambda: q * (kv < q),
        "operand of mul: got kv < q, a mask or pattern, expected a score. "
        "Use where(mask, 1, 0) to turn a mask into numbers.",
    ),
    (
        lambda: fl.exp(kv < q),
        "argument of exp: got kv < q, a mask or pattern, expected a score. "
        "Use where(mask, 1, 0) to turn a mask into numbers.",
    ),
    (lambda: fl.truncdiv(q, 0.5), "argument of truncdiv: got 0.5, a score, expected an index expression."),
    (lambda: q // 0.5, "operand of floordiv: got 0.5, a score, expected an index expression."),
    (lambda: q + float("nan"), "operand of add: got NaN, expected a score."),
    (
        lambda: fs.compile(P["alibi"]()),
        "pattern alibi(): got a score on its own, expected a pattern. Add it to the keys it scores: full() + alibi(), "
        "or full().score(...) if it contains `score`.",
    ),
    (lambda: untyped_compile(3), "pattern: got int, expected a pattern or its text."),
]


@pytest.mark.parametrize(
    ("call", "message"), EXPRESSION, ids=[m.split(":")[0] + f"-{n}" for n, (_, m) in enumerate(EXPRESSION)]
)
def test_wrong_operand(call: Callable[[], object], message: str) -> None:
    with pytest.raises(errors.ExpressionError) as caught:
        call()
    # Where the expected kind leaves more than one way out, the mend may go on; what is listed here must be said.
    assert str(caught.value).startswith(message)


ARGUMENTS: list[tuple[Callable[[], object], str]] = [
    *(
        (lambda name=name: captured(name, dims=("s",)), f"captured(name): got {name!r}, {NAME}")
        for name in (
            "q",
            "kv",
            "b",
            "h",
            "heads",
            "score",
            "query",
            "key",
            "value",
            "scale",
            "q_offset",
            "return_lse",
            "validate",
            "self",
            "torch",
            "math",
            "not a name",
            "",
            3,
        )
    ),
    (
        lambda: captured("doc", dims=()),
        'captured(\'doc\', dims): got (), expected names of dimensions, such as ("b", "s").',
    ),
    (
        lambda: untyped.captured("doc", dims=(1,)),
        'captured(\'doc\', dims): got (1,), expected names of dimensions, such as ("b", "s").',
    ),
    (
        lambda: captured("doc", dims=("s",), dtype="long"),
        "captured('doc', dtype): got 'long', expected 'int', 'float' or 'bool'; only 'float' can be learnable.",
    ),
    (
        lambda: captured("doc", dims=("s",), dtype="int", learnable=True),
        "captured('doc', dtype): got 'int' with learnable=True, expected 'int', 'float' or 'bool'; "
        "only 'float' can be learnable.",
    ),
    (
        lambda: captured("doc", dims=("b", "s"), encoding="boundaries"),
        "captured('doc', encoding): got 'boundaries' with dims=('b', 's') and dtype='int', "
        "expected 'values', or 'int' with 'boundaries', dims=('s',), or 'parents', dims=('side', 's').",
    ),
    (
        lambda: captured("doc", dims=("s",), encoding="ranges"),
        "captured('doc', encoding): got 'ranges' with dims=('s',) and dtype='int', "
        "expected 'values', or 'int' with 'boundaries', dims=('s',), or 'parents', dims=('side', 's').",
    ),
    (lambda: per_head([]), "per_head(entries): got [], expected a list of patterns, or of numbers, one for each head."),
    (
        lambda: untyped.per_head(3),
        "per_head(entries): got 3, expected a list of patterns, or of numbers, one for each head.",
    ),
    (lambda: topk(0), "topk(k): got 0, expected an integer of at least 1."),
    (lambda: topk(True), "topk(k): got True, expected an integer of at least 1."),
    (lambda: untyped.topk(2.0), "topk(k): got 2.0, expected an integer of at least 1."),
    (lambda: fl.block_topk(0, block=4), "block_topk(k): got 0, expected an integer of at least 1."),
    (lambda: fl.block_topk(1, block=True), "block_topk(block): got True, expected an integer of at least 1."),
    (
        lambda: fl.block_topk(1, block=4, score="max"),
        "block_topk(score): got 'max', expected one of 'mean', 'bounds'.",
    ),
    (lambda: P["moba"](block=4, k=0), "moba(k): got 0, expected an integer of at least 1."),
    (lambda: topk(2, after=-1), "topk(after): got -1, expected an integer of at least 0."),
    (
        lambda: topk(2, gate="hard"),
        "topk(gate): got 'hard', expected one of 'kv', 'k', 'v', 'logit', 'none', 'ste', "
        "'ste_identity', 'ste_sigmoid', 'capped_softmax'.",
    ),
    (
        lambda: topk(2, scores="key"),
        "topk(scores): got 'key', expected the keyword under which the tensor is given at the call.",
    ),
    (
        lambda: topk(2, segments="a b"),
        "topk(segments): got 'a b', expected the keyword under which the tensor is given at the call.",
    ),
]


@pytest.mark.parametrize(("call", "message"), ARGUMENTS, ids=[m.split(", expected")[0] for _, m in ARGUMENTS])
def test_wrong_argument(call: Callable[[], object], message: str) -> None:
    with pytest.raises(errors.PatternArgumentError) as caught:
        call()
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "name", ["lambda", "None", "gate", "x", "least", "m_0", "table_0", "birth_0", "tau_12", "c_0", "mask_mod"]
)
def test_names_that_generated_code_uses_are_refused(name: str) -> None:
    with pytest.raises(errors.PatternArgumentError) as caught:
        captured(name, dims=("s",))
    assert str(caught.value) == f"captured(name): got {name!r}, {NAME}"


def test_entries_of_per_head_are_of_one_kind() -> None:
    with pytest.raises(errors.ExpressionError) as caught:
        untyped.per_head([kv < q, 3])
    assert str(caught.value).startswith("per_head entry 1: got 3, an index expression, expected a mask or pattern.")


def test_one_declaration_for_each_captured_name() -> None:
    other: Any = captured("doc", dims=("b", "q"))
    with pytest.raises(errors.CapturedError) as caught:
        fs.compile((doc[b, kv] == 1) & (other[b, q] == 1))
    assert str(caught.value) == (
        "captured tensor 'doc': got two declarations, dims=('b', 's') and dims=('b', 'q'), or other options, "
        "expected one declaration for each name. Give one of them another name."
    )


def test_scores_have_a_name_of_their_own() -> None:
    with pytest.raises(errors.CapturedError) as caught:
        fs.compile((doc[b, kv] == 1) & topk(3, scores="doc"))
    assert str(caught.value) == (
        "scores='doc': got a name that is also a captured tensor, expected a tensor of its own for the scores of a "
        "selection. Give the captured tensor or the scores another name."
    )


def test_segments_are_integers_along_the_sequence() -> None:
    weight: Any = captured("weight", dims=("h",), learnable=True)
    with pytest.raises(errors.CapturedError) as caught:
        fs.compile(topk(3, segments="weight") + weight[h])
    assert str(caught.value) == (
        "segments='weight': got a captured tensor with dims=('h',), real, "
        'expected integers with dims ("b", "s") or ("s",).'
    )


def test_every_error_keeps_its_parts_and_pickles() -> None:
    with pytest.raises(errors.PatternArgumentError) as caught:
        P["sliding_window"](0)
    error = pickle.loads(pickle.dumps(caught.value))
    assert type(error) is errors.PatternArgumentError
    assert (error.argument, error.got, error.expected) == (
        "sliding_window(window)",
        "0",
        "an integer of at least 1",
    )
    assert isinstance(error, ValueError)
    assert isinstance(error, fs.FlexsparseError)
    assert str(error) == str(caught.value)


def test_everything_is_the_neutral_element_of_and() -> None:
    assert str(fs.compile(everything & (kv <= q)).ir.mask) == str(fs.compile(kv <= q).ir.mask)
