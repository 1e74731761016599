"""Hypothesis strategies for expressions: index arithmetic, masks, selections, scores and ``per_head``."""

from __future__ import annotations

import operator
from typing import Any

from hypothesis import strategies as st

from flexsparse import language as fl
from flexsparse.language import b, captured, h, kv, per_head, q, topk
from flexsparse.patterns import catalogue

P: Any = catalogue()
DOC: Any = captured("doc", dims=("b", "s"))
KEEP: Any = captured("keep", dims=("b", "s"), dtype="bool")
SLOPE: Any = captured("slope", dims=("h",), learnable=True)
CAPTURED = {"doc": DOC, "keep": KEEP, "slope": SLOPE}

SMALL = st.integers(-6, 6)
NONZERO = st.sampled_from([-7, -3, -2, 2, 3, 5])
COMPARE = st.sampled_from([operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge])
ARITHMETIC = st.sampled_from([operator.add, operator.sub, operator.mul])
DIVIDE = st.sampled_from([operator.floordiv, operator.mod, fl.truncdiv, fl.truncmod])
LIMIT = st.sampled_from([fl.minimum, fl.maximum])
COMBINE = st.sampled_from([operator.and_, operator.or_])


def _or_constant(numbers: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return numbers | SMALL


def _larger_index(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(
        st.builds(lambda f, x, y: f(x, y), ARITHMETIC, inner, _or_constant(inner)),
        st.builds(lambda f, x, y: f(y, x), ARITHMETIC, inner, SMALL),
        st.builds(lambda f, x, y: f(x, y), DIVIDE, inner, NONZERO),
        st.builds(lambda f, x, y: f(x, y), LIMIT, inner, _or_constant(inner)),
        st.builds(operator.neg, inner),
        st.builds(abs, inner),
        st.builds(lambda c, x, y, z: fl.where(x < c, y, z), SMALL, inner, inner, _or_constant(inner)),
        st.builds(lambda x, y: per_head([x, y]), inner, _or_constant(inner)),
    )


INDEX_LEAVES = st.sampled_from([q, kv, q - kv, q, kv, q - kv, b, h, fl.kv_len, fl.q_len, fl.heads])
INDICES = st.recursive(INDEX_LEAVES, _larger_index, max_leaves=4)
SIZES = st.recursive(st.sampled_from([fl.kv_len, fl.q_len, fl.heads]), _larger_index, max_leaves=5)
LOADS = st.sampled_from([DOC[b, kv] - DOC[b, q], DOC[b, kv], DOC[b, q]])
NUMBERS = INDICES | LOADS


def _larger_mask(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    combine = st.sampled_from([operator.and_, operator.or_, operator.xor])
    return st.one_of(
        st.builds(lambda f, x, y: f(x, y), combine, inner, inner),
        st.builds(operator.invert, inner),
        st.builds(lambda x, y: per_head([x, y]), inner, inner),
    )


COMPARISONS = st.builds(lambda f, x, y: f(x, y), COMPARE, NUMBERS, _or_constant(NUMBERS))
REAL_COMPARISONS = st.builds(
    lambda f, g, x, n, y: f(g((x + n) / 4), y),
    COMPARE,
    st.sampled_from([fl.exp, fl.tanh, fl.floor, fl.sqrt, fl.log]),
    st.sampled_from([q - kv, kv - q, abs(q - kv), q % 5 - kv % 3, DOC[b, kv] - DOC[b, q]]),
    SMALL,
    SMALL,
)
NAMED_MASKS = st.sampled_from([P["causal"](), P["sliding_window"](5), P["sinks"](2), P["document"](), P["full"]()])
MASKS = st.recursive(COMPARISONS | NAMED_MASKS | st.just(KEEP[b, kv]) | REAL_COMPARISONS, _larger_mask, max_leaves=4)

GATE = st.sampled_from(["kv", "k", "v", "logit", "none", "ste", "ste_identity", "ste_sigmoid"])
SELECTIONS = st.builds(
    lambda k, after, gate, name: topk(k, after=after, gate=gate, scores=name),
    st.integers(1, 9),
    st.integers(0, 4),
    GATE,
    st.sampled_from(["scores", "u"]),
)
ADDED = st.one_of(
    st.sampled_from([P["alibi"](), SLOPE[h], SLOPE[h] * abs(q - kv), fl.tanh(q / 3) - 1]),
    st.floats(-4, 4, allow_subnormal=False),
    INDICES,
)
RUNNING = st.sampled_from(
    [P["softcap"](20.0), fl.score * 2, fl.maximum(fl.score, -1.5), fl.score + fl.tanh(fl.score), -fl.score + SLOPE[h]]
)


def _larger_pattern(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(
        st.builds(lambda f, x, y: f(x, y), COMBINE, inner, inner),
        st.builds(operator.add, inner, ADDED),
        st.builds(operator.sub, inner, ADDED),
        st.builds(lambda x, s: x.score(s), inner, RUNNING),
        st.builds(lambda x, y: per_head([x, y]), inner, inner),
    )


SINKS = st.sampled_from([SLOPE[h], 0.0, -2, fl.where(q < 3, 0.5, -1.5), per_head([1.0, -0.25]), fl.tanh(q / 3) - h])
# A pattern has one sink: it is given to the whole.
WITHOUT_SINK = st.recursive(MASKS | SELECTIONS, _larger_pattern, max_leaves=5)
PATTERNS = WITHOUT_SINK | st.builds(lambda p, s: p.sink(s), WITHOUT_SINK, SINKS)
