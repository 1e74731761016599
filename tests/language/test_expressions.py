"""Expressions as objects: immutable, hashable, equal by structure, printed as typed, pickled."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest

import flexsparse as fs
from flexsparse import language as fl
from flexsparse.ir.nodes import TensorSpec
from flexsparse.language import Index, Mask, Pattern, Score, Selection, b, captured, h, kv, per_head, q, score, topk
from flexsparse.patterns import catalogue

P: Any = catalogue()
doc = captured("doc", dims=("b", "s"))
bias = captured("bias", dims=("h",), learnable=True)

PRINTED: list[tuple[Any, str]] = [
    (kv <= q, "kv <= q"),
    ((kv <= q) & (q - kv < 8), "(kv <= q) & (q - kv < 8)"),
    ((kv < 1) | (kv < 2) | (kv < 3), "(kv < 1) | (kv < 2) | (kv < 3)"),
    ((kv < 1) | ((kv < 2) | (kv < 3)), "(kv < 1) | ((kv < 2) | (kv < 3))"),
    ((kv < 1) & (kv < 2) | (kv < 3), "((kv < 1) & (kv < 2)) | (kv < 3)"),
    (~(kv < 1), "~(kv < 1)"),
    ((kv < 1) ^ (q < 1), "(kv < 1) ^ (q < 1)"),
    (q - (kv - 1) == 0, "q - (kv - 1) == 0"),
    (q - kv - 1 != 0, "q - kv - 1 != 0"),
    ((q + kv) * 2 >= h, "(q + kv) * 2 >= h"),
    (-q > -3, "-q > -3"),
    (-(q + 1), "-(q + 1)"),
    (q // 4 % 3, "q // 4 % 3"),
    (q // (kv % 3), "q // (kv % 3)"),
    (abs(q - kv), "abs(q - kv)"),
    (q / 2 + 0.5, "q / 2 + 0.5"),
    (1 - q, "1 - q"),
    (2 * q, "2 * q"),
    (7 // (q + 1), "7 // (q + 1)"),
    (7 % (q + 1), "7 % (q + 1)"),
    (1 / (q + 1), "1 / (q + 1)"),
    (fl.where(kv < q, 1, 0), "where(kv < q, 1, 0)"),
    (fl.minimum(q, 3), "minimum(q, 3)"),
    (fl.maximum(0.5, q), "maximum(0.5, q)"),
    (fl.truncdiv(q - kv, 4), "truncdiv(q - kv, 4)"),
    (fl.truncmod(q - kv, 4), "truncmod(q - kv, 4)"),
    (fl.exp(q), "exp(q)"),
    (fl.floor(fl.log2(fl.heads)), "floor(log2(heads))"),
    (
        fl.exp2(q) + fl.log(q) + fl.sqrt(q) + fl.tanh(q) + fl.sigmoid(q),
        "exp2(q) + log(q) + sqrt(q) + tanh(q) + sigmoid(q)",
    ),
    (doc[b, q] == doc[b, kv], "doc[b, q] == doc[b, kv]"),
    (per_head([1, 2]) < q, "per_head([1, 2]) < q"),
    (per_head([P["causal"](), kv < 3]), "per_head([causal(), kv < 3])"),
    (topk(8), "topk(8)"),
    (
        topk(8, after=2, scores="u", segments="doc", gate="kv"),
        "topk(8, after=2, scores='u', segments='doc', gate='kv')",
    ),
    (P["causal"]() & topk(4), "causal() & topk(4)"),
    (P["causal"]() + bias[h], "causal() + bias[h]"),
    (P["causal"]() + (bias[h] + 1), "causal() + (bias[h] + 1)"),
    (P["causal"]() - bias[h], "causal() + -bias[h]"),
    ((kv <= q) + 2.5, "(kv <= q) + 2.5"),
    (P["causal"]().score(score * 2), "causal().score(score * 2)"),
    ((kv <= q).score(0), "(kv <= q).score(0)"),
    (P["causal"]() | (P["sinks"](4) + bias[h]), "causal() | (sinks(4) + bias[h])"),
    ((P["causal"]() | P["sinks"](4)) + bias[h], "(causal() | sinks(4)) + bias[h]"),
    (P["sliding_window"](per_head([8, 16])), "sliding_window(per_head([8, 16]))"),
    (fl.everything, "True"),
    (q < float("inf"), "q < inf"),
    (q > -float("inf"), "q > -inf"),
    (q < 1e-30, "q < 1e-30"),
]


@pytest.mark.parametrize(("expression", "text"), PRINTED, ids=[t for _, t in PRINTED])
def test_prints_as_typed_and_reads_back(expression: Any, text: str) -> None:
    assert str(expression) == text
    read = fs.parse(text, captured={"doc": doc, "bias": bias})
    assert read.node == expression.node
    assert type(read) is type(expression)


@pytest.mark.parametrize(("expression", "text"), PRINTED, ids=[t for _, t in PRINTED])
def test_pickles_and_copies_to_an_equal_expression(expression: Any, text: str) -> None:
    for other in (pickle.loads(pickle.dumps(expression)), copy.deepcopy(expression)):
        assert other.node == expression.node
        assert type(other) is type(expression)
        assert hash(other) == hash(expression)


def test_captured_tensors_pickle_print_and_compare() -> None:
    assert pickle.loads(pickle.dumps(doc)) == doc
    assert hash(pickle.loads(pickle.dumps(bias))) == hash(bias)
    assert repr(doc) == "captured('doc', dims=('b', 's'), dtype='int')"
    assert repr(bias) == "captured('bias', dims=('h',), learnable=True)"
    assert doc != bias
    assert doc != captured("doc", dims=("s",))
    assert doc.spec == TensorSpec("doc", ("b", "s"))


def test_expressions_are_immutable() -> None:
    with pytest.raises(AttributeError, match="expressions are immutable; cannot set 'node'"):
        q.node = kv.node  # type: ignore[misc]
    with pytest.raises(AttributeError, match="expressions are immutable; cannot set 'label'"):
        (kv <= q).label = "mine"
    with pytest.raises(AttributeError, match="captured tensors are immutable; cannot set 'spec'"):
        doc.spec = bias.spec


def test_patterns_are_equal_by_structure() -> None:
    assert P["causal"]() == P["causal"]()
    assert hash(P["causal"]()) == hash(P["causal"]())
    assert P["sinks"](4) != P["sinks"](5)
    assert P["causal"]() != (kv <= q), "a name is part of the structure"
    assert ((kv <= q) & (q < 3)) != ((q < 3) & (kv <= q))
    assert P["causal"]() != "causal()"
    assert {topk(4): 1}[topk(4)] == 1
    assert (q < 1) != (q < 1.0), "an integer and a real constant differ"
    assert (doc[b, q] == 1) != (captured("doc", dims=("b", "q"))[b, q] == 1)


def test_comparing_numbers_builds_masks() -> None:
    for mask in (q == kv, q != kv, q < kv, q <= kv, q > kv, q >= kv, q == 3, 3 < q):  # noqa: SIM300
        assert type(mask) is Mask
    assert str(3 < q) == "q > 3"  # noqa: SIM300


CLASSES: list[tuple[Any, type]] = [
    (q + 1, Index),
    (q + 1.0, Score),
    (q / 2, Score),
    (q // 2, Index),
    (fl.floor(q / 2), Index),
    (fl.where(kv < q, 1, 2), Index),
    (fl.where(kv < q, 1, 2.0), Score),
    (fl.exp(q), Score),
    (score, Score),
    (bias[h], Score),
    (doc[b, q], Index),
    (captured("keep", dims=("b", "s"), dtype="bool")[b, kv], Mask),
    (per_head([1, 2]), Index),
    (per_head([1, 2.0]), Score),
    (per_head([kv < 1, kv < 2]), Mask),
    (per_head([topk(1), topk(2)]), Pattern),
    (topk(1), Selection),
    (topk(1) & (kv < q), Pattern),
    ((kv < q) + 1, Pattern),
    (P["sparsek"](3), Pattern),
    (P["causal"](), Mask),
    (P["alibi"](), Score),
]


@pytest.mark.parametrize(("expression", "cls"), CLASSES, ids=[str(e) for e, _ in CLASSES])
def test_class_follows_the_kind(expression: Any, cls: type) -> None:
    assert isinstance(expression, cls)
    if cls is Pattern:
        assert not isinstance(expression, Mask)


def test_numbers_on_the_left() -> None:
    assert str(True & (kv < q)) == "True & (kv < q)"
    assert str(False | (kv < q)) == "False | (kv < q)"
    assert str(True ^ (kv < q)) == "True ^ (kv < q)"
    assert str(1 + P["causal"]()) == "causal() + 1"
    assert str(bias[h] + P["causal"]()) == "causal() + bias[h]"


def test_bare_addition_binds_tighter_than_the_pattern_operators() -> None:
    written = P["causal"]() | P["sinks"](4) + bias[h]
    assert str(written) == "causal() | (sinks(4) + bias[h])"
    assert written == P["causal"]() | (P["sinks"](4) + bias[h])
    assert written != (P["causal"]() | P["sinks"](4)) + bias[h]
    assert fs.parse("causal | sinks(4) + bias[h]", captured={"bias": bias}) == written
