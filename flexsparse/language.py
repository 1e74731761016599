"""The language: index symbols, masks, scores, selections and the algebra that composes them.

Expressions are immutable and hashable, print as they would be typed, pickle, and need no torch.

>>> from flexsparse.language import kv, q, topk
>>> (kv <= q) & ((q - kv < 512) | topk(512, after=512, gate="kv"))
(kv <= q) & ((q - kv < 512) | topk(512, after=512, gate='kv'))

On index expressions ``== != < <= > >=`` build masks. On patterns ``==`` is structural.
"""

from __future__ import annotations

import keyword
import re
from collections.abc import Sequence
from typing import Any, NoReturn, overload

from flexsparse.catalogue import above, at_least, pattern
from flexsparse.errors import ExpressionError, PatternArgumentError
from flexsparse.expression import (
    Expression,
    Index,
    Mask,
    Pattern,
    Score,
    Selection,
    Value,
    lift,
    plain,
    value_of,
    wrap,
)
from flexsparse.ir.nodes import (
    BLOCK_SCORES,
    GATES,
    SYMBOLS,
    TRUE,
    Apply,
    BlockTopK,
    Kind,
    Load,
    Node,
    PerHead,
    Scalar,
    SelectionNode,
    Symbol,
    TensorSpec,
)
from flexsparse.ir.scalars import is_of_scalars

__all__ = [
    "Captured",
    "Expression",
    "Index",
    "Mask",
    "Pattern",
    "Score",
    "Selection",
    "Value",
    "above",
    "at_least",
    "b",
    "block_topk",
    "captured",
    "cos",
    "everything",
    "exp",
    "exp2",
    "floor",
    "h",
    "heads",
    "kv",
    "kv_len",
    "log",
    "log2",
    "maximum",
    "minimum",
    "pattern",
    "per_head",
    "q",
    "q_len",
    "scalar",
    "score",
    "sigmoid",
    "sqrt",
    "tanh",
    "topk",
    "truncdiv",
    "truncmod",
    "where",
]


b, h, q, kv = (Index(Symbol(name)) for name in ("b", "h", "q", "kv"))
q_len, kv_len, heads = (Index(Symbol(name)) for name in ("q_len", "kv_len", "heads"))
score = Score(Symbol("score"))
everything = Mask(TRUE)


class Captured:
    """A tensor given by keyword at the call; index it with one expression a dimension to use it."""

    __slots__ = ("spec",)
    spec: TensorSpec

    def __init__(self, spec: TensorSpec) -> None:
        object.__setattr__(self, "spec", spec)

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"captured tensors are immutable; cannot set {name!r}")

    def __getitem__(self, index: object) -> Any:
        given = index if isinstance(index, tuple) else (index,)
        spec = self.spec
        if len(given) != len(spec.dims):
            raise ExpressionError(
                f"{spec.name}[...]",
                got=f"{len(given)} indices",
                expected=f"{len(spec.dims)}, one for each of dims={spec.dims}",
                mend=f"Write {spec.name}[{', '.join(d if d in ('b', 'h') else 'kv' for d in spec.dims)}].",
            )
        nodes = tuple(lift(i, f"index {n} of {spec.name}", Kind.INT) for n, i in enumerate(given))
        return wrap(Load(spec, nodes))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Captured) and self.spec == other.spec

    def __hash__(self) -> int:
        return hash(self.spec)

    def __reduce__(self) -> tuple[Any, ...]:
        return (Captured, (self.spec,))

    def __repr__(self) -> str:
        extra = ", learnable=True" if self.spec.learnable else f", dtype={self.spec.kind.value!r}"
        return f"captured({self.spec.name!r}, dims={self.spec.dims!r}{extra})"


_DERIVED = re.compile(
    r"(birth|death|group|from|until|u|tau|least|table|m|c|selected)_\d+(_fixed)?|chosen_(mean|bounds)_\d+_\d+"
)
# Symbols, arguments of the call, and what generated functions call their own.
RESERVED = {
    *SYMBOLS,
    *("query", "key", "value", "scale", "return_lse", "q_offset", "validate", "self"),
    *("torch", "math", "build", "mask_mod", "score_mod", "kept_score_mod", "lost_score_mod", "value_gate"),
    *("gate_total", "gate", "least", "lost", "some", "x", "sink_logit", "like", "row", "row_group", "key_of_row"),
    "argument",
}
# Names that generated text calls where it computes a number of others.
_CALLED = ("min", "max", "abs", "int", "float")
_KINDS = {"int": Kind.INT, "real": Kind.REAL, "float": Kind.REAL, "bool": Kind.BOOL}


def _is_free(name: str) -> bool:
    """Whether a tensor may have the name: an identifier that means nothing else, here or in generated code."""
    free = name.isidentifier() and not keyword.iskeyword(name)
    return free and name not in RESERVED and not _DERIVED.fullmatch(name)


def captured(
    name: str,
    dims: Sequence[str],
    *,
    dtype: str | None = None,
    learnable: bool = False,
    encoding: str = "values",
) -> Captured:
    """Declare a tensor that is given at the call by keyword ``name``.

    ``dims`` names each dimension: "b" batch (size 1 or B; may be left out of the tensor), "h" query heads,
    "s" key length, "q" query length; other names are free sizes that must agree within one call.
    ``dtype`` is "int" (default), "float" or "bool"; ``learnable=True`` implies "float" and gives gradients.
    ``encoding="boundaries"`` declares cumulative sequence lengths ``[0, ..., S]`` (dims must be ("s",)),
    which read as one segment id for each position; ``encoding="parents"`` declares the parents of a tree's tokens [S],
    which read as where a depth-first walk enters (side 0) and leaves (side 1) each (dims must be ("side", "s")).
    Raises PatternArgumentError for a name that is no identifier or that means something else already.
    """
    if not isinstance(name, str) or not _is_free(name):
        raise PatternArgumentError(
            "captured(name)",
            got=repr(name),
            expected="an identifier that is not a symbol or an argument of the call",
            mend="Choose another name, such as 'doc'.",
        )
    dims = (dims,) if isinstance(dims, str) else tuple(dims)
    if not dims or not all(isinstance(d, str) and d for d in dims):
        raise PatternArgumentError(
            f"captured({name!r}, dims)", got=repr(dims), expected='names of dimensions, such as ("b", "s")'
        )
    dtype = dtype or ("float" if learnable else "int")
    if dtype not in _KINDS or (learnable and _KINDS[dtype] is not Kind.REAL):
        raise PatternArgumentError(
            f"captured({name!r}, dtype)",
            got=repr(dtype) + (" with learnable=True" if learnable else ""),
            expected="'int', 'float' or 'bool'; only 'float' can be learnable",
        )
    wanted = {"values": dims, "boundaries": ("s",), "parents": ("side", "s")}.get(encoding)
    if wanted != dims or (encoding != "values" and dtype != "int"):
        raise PatternArgumentError(
            f"captured({name!r}, encoding)",
            got=f"{encoding!r} with dims={dims} and dtype={dtype!r}",
            expected="'values', or 'int' with 'boundaries', dims=('s',), or 'parents', dims=('side', 's')",
        )
    return Captured(TensorSpec(name, dims, _KINDS[dtype], learnable, encoding))


@overload
def scalar(name: str, default: int) -> Index: ...
@overload
def scalar(name: str, default: float) -> Score: ...
def scalar(name: str, default: int | float) -> Value:
    """A number that a call may give by keyword ``name``; ``default`` where it gives none.

    It stands wherever a number of its kind may: an integer default makes an index, as in ``q - kv < scalar("window",
    512)`` or ``sparsek(512, after=scalar("window", 512))``, a real one a score, as in ``softcap(scalar("cap", 30.0))``.
    Another number builds no kernel: tiles are classified and backends chosen for the number of the call, and functions
    and kernels take it as an argument. It is a Python number and receives no gradient; ``captured`` declares tensors.
    Raises PatternArgumentError for a name as ``captured`` does, and for a default that is no number or NaN.
    """
    if not isinstance(name, str) or not _is_free(name) or name in _CALLED:
        raise PatternArgumentError(
            "scalar(name)",
            got=repr(name),
            expected="an identifier that is not a symbol or an argument of the call",
            mend="Choose another name, such as 'window'.",
        )
    if isinstance(default, bool) or not isinstance(default, int | float) or default != default:
        raise PatternArgumentError(f"scalar({name!r}, default)", got=repr(default), expected="an integer or a float")
    return value_of(Scalar(name, Kind.INT if isinstance(default, int) else Kind.REAL, default))


def _function(op: str, *args: object, kind: Kind = Kind.REAL) -> Value:
    return value_of(Apply(op, tuple(lift(a, f"argument of {op}", kind) for a in args)))


def where(condition: Pattern | bool, this: object, other: object) -> Value:
    """``this`` where the plain mask holds, else ``other``; numbers or numeric expressions."""
    mask = plain("where", condition).node
    branches = tuple(lift(x, "branch of where", Kind.REAL) for x in (this, other))
    return value_of(Apply("where", (mask, *branches)))


def minimum(left: object, right: object) -> Value:
    """The smaller of two numbers."""
    return _function("minimum", left, right)


def maximum(left: object, right: object) -> Value:
    """The larger of two numbers."""
    return _function("maximum", left, right)


def exp(x: object) -> Value:
    """e to the power x."""
    return _function("exp", x)


def exp2(x: object) -> Value:
    """2 to the power x."""
    return _function("exp2", x)


def log(x: object) -> Value:
    """The natural logarithm."""
    return _function("log", x)


def log2(x: object) -> Value:
    """The logarithm to base 2."""
    return _function("log2", x)


def sqrt(x: object) -> Value:
    """The square root."""
    return _function("sqrt", x)


def tanh(x: object) -> Value:
    """The hyperbolic tangent."""
    return _function("tanh", x)


def cos(x: object) -> Value:
    """The cosine of an angle in radians."""
    return _function("cos", x)


def sigmoid(x: object) -> Value:
    """1 / (1 + exp(-x))."""
    return _function("sigmoid", x)


def floor(x: object) -> Value:
    """The largest integer at most x, as an index expression."""
    return _function("floor", x)


def truncdiv(left: object, right: object) -> Value:
    """Integer division that rounds toward zero, as in C; ``//`` rounds down."""
    return _function("truncdiv", left, right, kind=Kind.INT)


def truncmod(left: object, right: object) -> Value:
    """The remainder of ``truncdiv``, with the sign of the dividend; ``%`` has the sign of the divisor."""
    return _function("truncmod", left, right, kind=Kind.INT)


@overload
def per_head(entries: Sequence[Pattern]) -> Pattern: ...
@overload
def per_head(entries: Sequence[int | float | Value]) -> Value: ...
def per_head(entries: Sequence[Any]) -> Expression:
    """A different number, expression or pattern for each query head.

    The number of entries must divide the number of query heads; contiguous groups share an entry: head h
    takes entry ``h * len(entries) // heads``. As many entries as KV heads gives one for each GQA group.
    """
    given = list(entries) if isinstance(entries, Sequence) else []
    if not given:
        raise PatternArgumentError(
            "per_head(entries)", got=repr(entries), expected="a list of patterns, or of numbers, one for each head"
        )
    kind = Kind.BOOL if isinstance(given[0], Pattern | bool) else Kind.REAL
    return wrap(PerHead(tuple(lift(e, f"per_head entry {n}", kind) for n, e in enumerate(given))))


def topk(
    k: int | Value,
    *,
    after: int | Value = 0,
    scores: str = "scores",
    segments: str | None = None,
    gate: str = "none",
) -> Selection:
    """The k keys with the largest scores among each query's candidates (on ties the earlier key).

    Candidates of query q are the keys ``kv <= q - after``, of the query's own segment if ``segments``
    names a tensor of non-decreasing ids ([S] or [B, S]). ``scores`` names a tensor [B, 1, S],
    [B, H_kv, S] or [B, H_q, S]. ``gate`` says how the soft gate m = clip(score - tau, 0, 1) acts:
    on K and V ("kv"), on one of them ("k", "v"), as log m on the score ("logit"), or not at all ("none", which gives
    the scores no gradient). The straight-through gates select hard, with gates of 1, and give the scores the gradient
    that "kv" would have at gates of 1: of m itself ("ste"), of the score as it is ("ste_identity": every selected key
    learns, tau does not), or of sigmoid(score - tau) ("ste_sigmoid": none is ever cut off). "capped_softmax" puts
    the gate min(1, exp(score - tau)) on K and V, with its own tau, at which these sum to k over the candidates.
    Under every gate the keys are the hard top-k by query-independent scores, so eviction is final.
    Source: Lou, Jia, Zheng, Tu, arXiv 2406.16747; ``after``, ``segments`` and the gates beside "kv" are ours.
    ``k`` and ``after`` may be numbers that each call gives: ``scalar``, or integers computed of such.
    Raises PatternArgumentError for k < 1, after < 0 or an unknown gate.
    """
    counts = (_count("k", k, 1), _count("after", after, 0))
    if gate not in GATES:
        raise PatternArgumentError("topk(gate)", got=repr(gate), expected=f"one of {', '.join(map(repr, GATES))}")
    for name, tensor in (("scores", scores), ("segments", segments)):
        if tensor is not None and (not isinstance(tensor, str) or not _is_free(tensor)):
            raise PatternArgumentError(
                f"topk({name})", got=repr(tensor), expected="the keyword under which the tensor is given at the call"
            )
    return Selection(SelectionNode(*counts, scores, segments, gate))


def _count(name: str, number: int | Value, least: int) -> int | Node:
    """An argument of ``topk`` as its node has it."""
    if isinstance(number, Index) and is_of_scalars(number.node):
        return number.node
    if isinstance(number, bool) or not isinstance(number, int) or number < least:
        raise PatternArgumentError(f"topk({name})", got=repr(number), expected=f"an integer of at least {least}")
    return number


def block_topk(k: int, *, block: int, score: str = "mean") -> Mask:
    """The keys up to the query in its own block of ``block`` keys, and the k past blocks that score highest for it.

    The blocks are chosen at each call, for every query and query head, from query and key; ties go to the earlier
    block. ``score`` ranks past blocks by the product of the query with the mean of the block's keys ("mean"), or by the
    largest product that the elementwise minimum and maximum of its keys allow ("bounds"); both are taken before
    ``scale`` and before score expressions. A plain mask: ``~``, ``&`` and ``|`` apply, and no gradient flows
    through the choice. As it depends on the query, it never carries an eviction certificate.
    Raises PatternArgumentError for k < 1, block < 1 or an unknown score.
    """
    for name, number in (("k", k), ("block", block)):
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise PatternArgumentError(f"block_topk({name})", got=repr(number), expected="an integer of at least 1")
    if score not in BLOCK_SCORES:
        known = ", ".join(map(repr, BLOCK_SCORES))
        raise PatternArgumentError("block_topk(score)", got=repr(score), expected=f"one of {known}")
    return Mask(BlockTopK(k, block, score))
