"""Expressions: immutable wrappers that give nodes their operators, and the checks that operands fit."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NoReturn, overload

from flexsparse.errors import ExpressionError, PatternArgumentError, TruthValueError, did_you_mean
from flexsparse.ir.budgets import with_budget
from flexsparse.ir.nodes import (
    Apply,
    Constant,
    Kind,
    Node,
    Scored,
    SelectionNode,
    Sunk,
    Symbol,
    depends_on,
    is_plain,
    mentions,
    walk,
)
from flexsparse.ir.scalars import numbers_at, scalars_of, with_defaults
from flexsparse.ir.sinks import sink_of
from flexsparse.ir.text import kind_text, text


class Expression:
    """An immutable wrapper that gives a node its operators. ``node`` is the expression itself."""

    __slots__ = ("_node",)
    _node: Node

    def __init__(self, node: Node) -> None:
        object.__setattr__(self, "_node", node)

    @property
    def node(self) -> Node:
        return self._node

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"expressions are immutable; cannot set {name!r}")

    def __hash__(self) -> int:
        return hash(self._node)

    def __repr__(self) -> str:
        return text(self._node)

    def __reduce__(self) -> tuple[Any, ...]:
        return (wrap, (self._node,))

    def __bool__(self) -> NoReturn:
        raise TruthValueError(
            f"truth value of {self!r}",
            got="Python's `and`, `or`, `not`, `if`, or a chained comparison such as 0 <= q - kv < w",
            expected="an expression that is evaluated later, element by element",
            mend="Use & | ~ between masks, where(mask, a, b) to choose, and write a chain as (q >= kv) & (q - kv < w).",
        )


class Value(Expression):
    """A number for each (b, h, q, kv): an Index if integral, a Score if real."""

    __slots__ = ()
    __hash__ = Expression.__hash__

    def __add__(self, other: object) -> Value:
        return NotImplemented if isinstance(other, Pattern) else _binary("add", self, other)

    def __radd__(self, other: object) -> Value:
        return _binary("add", other, self)

    def __sub__(self, other: object) -> Value:
        return _binary("sub", self, other)

    def __rsub__(self, other: object) -> Value:
        return _binary("sub", other, self)

    def __mul__(self, other: object) -> Value:
        return _binary("mul", self, other)

    def __rmul__(self, other: object) -> Value:
        return _binary("mul", other, self)

    def __truediv__(self, other: object) -> Value:
        return _binary("div", self, other)

    def __rtruediv__(self, other: object) -> Value:
        return _binary("div", other, self)

    def __floordiv__(self, other: object) -> Value:
        return _binary("floordiv", self, other)

    def __rfloordiv__(self, other: object) -> Value:
        return _binary("floordiv", other, self)

    def __mod__(self, other: object) -> Value:
        return _binary("mod", self, other)

    def __rmod__(self, other: object) -> Value:
        return _binary("mod", other, self)

    def __neg__(self) -> Value:
        return value_of(Apply("neg", (self._node,)))

    def __abs__(self) -> Value:
        return value_of(Apply("abs", (self._node,)))

    def __eq__(self, other: object) -> Mask:  # type: ignore[override]
        return _compare("eq", self, other)

    def __ne__(self, other: object) -> Mask:  # type: ignore[override]
        return _compare("ne", self, other)

    def __lt__(self, other: object) -> Mask:
        return _compare("lt", self, other)

    def __le__(self, other: object) -> Mask:
        return _compare("le", self, other)

    def __gt__(self, other: object) -> Mask:
        return _compare("gt", self, other)

    def __ge__(self, other: object) -> Mask:
        return _compare("ge", self, other)


class Index(Value):
    """An integer expression in b, h, q, kv, sizes and captured integers. ``//`` and ``%`` floor, as in Python."""

    __slots__ = ()


class Score(Value):
    """A real expression in the same, and in the running ``score``."""

    __slots__ = ()


class Pattern(Expression):
    """Which keys each query sees, with what score, under which gates.

    ``a & b`` allows what both allow, applies both score expressions (left, then right) and multiplies
    the gates. ``a | b`` allows what either allows, each key once: a key of both takes the left branch's
    score and the larger gate. ``p + e`` adds e to the scores of p; ``p.score(expr)`` replaces them by an
    expression in ``score``; ``p.sink(expr)`` adds a term to the softmax's denominator. ``~`` and ``^`` are for
    plain masks.
    """

    __slots__ = ()
    __hash__ = Expression.__hash__

    def __and__(self, other: object) -> Pattern:
        return _combine("and", self, other)

    def __rand__(self, other: object) -> Pattern:
        return _combine("and", other, self)

    def __or__(self, other: object) -> Pattern:
        return _combine("or", self, other)

    def __ror__(self, other: object) -> Pattern:
        return _combine("or", other, self)

    def __xor__(self, other: object) -> Pattern:
        return _combine("xor", plain("^", self), plain("^", other))

    def __rxor__(self, other: object) -> Pattern:
        return _combine("xor", plain("^", other), plain("^", self))

    def __invert__(self) -> Pattern:
        return pattern_of(Apply("not", (plain("~", self)._node,)))

    def __add__(self, other: object) -> Pattern:
        if isinstance(other, Pattern):
            raise ExpressionError(
                "the score added to a pattern",
                got=f"{other!r}, a mask or pattern",
                expected="a score",
                mend="Join patterns with & or |; where(mask, 1, 0) turns a mask into numbers.",
            )
        term = lift(other, "the score added to a pattern", Kind.REAL)
        if mentions(term, "score"):
            raise ExpressionError(
                f"{self!r} + {text(term)}",
                got="a term that contains `score`",
                expected="a term that is added to the score",
                mend=f"Replace the score instead: pattern.score({text(term)}).",
            )
        return self.score(value_of(Apply("add", (Symbol("score"), term))))

    __radd__ = __add__

    def __sub__(self, other: object) -> Pattern:
        term = lift(other, "the score subtracted from a pattern", Kind.REAL)
        # A number is negated here: the node neg(5) would print as -5 and read back as a constant.
        return self + (-term.value if isinstance(term, Constant) else -value_of(term))

    def score(self, expression: Value | int | float) -> Pattern:
        """The pattern with its running score replaced by ``expression``, in which it appears as ``score``."""
        return pattern_of(Scored(self._node, lift(expression, "the score expression", Kind.REAL)))

    def sink(self, logit: Value | int | float) -> Pattern:
        """The pattern with a sink: exp(logit) joins the softmax's denominator, without a key and without a value.

        ``logit`` is a number or an expression in b, h, q, sizes and captured tensors, such as
        ``captured("sink_logits", dims=("h",), learnable=True)[h]``; 0 gives exp(s) / (1 + sum of exp(s)). lse
        includes it, score expressions do not act on it, and a row that sees no key gives out 0 and lse ``logit``.
        ``a & b`` and ``a | b`` have the sink of the one that has it.
        Raises ExpressionError for a logit that depends on kv or ``score``, for +inf, and for a second, different sink.
        """
        node = lift(logit, "the logit of a sink", Kind.REAL)
        wrong = next((name for name in ("kv", "score") if depends_on(node, name)), None)
        if wrong is not None or node == Constant(float("inf")):
            raise ExpressionError(
                f"sink({text(node)})",
                got="+inf" if wrong is None else f"a logit that depends on {wrong}",
                expected="a number for each (b, h, q), below infinity: a sink has no key",
                mend="Use a number, or a tensor indexed by b, h or q, such as sink_logits[h].",
            )
        sunk = Sunk(self._node, node)
        sink_of(sunk)
        return pattern_of(sunk)

    def with_k(self, k: int, scores: str | None = None) -> Pattern:
        """The same pattern whose selections choose ``k`` keys each; with ``scores``, those by that tensor alone.

        For a budget that changes while training: on a GPU the kernels that gather take k as a number, so nothing is
        compiled again. Raises PatternArgumentError for k < 1, and ExpressionError where nothing is selected so.
        """
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise PatternArgumentError("with_k(k)", got=repr(k), expected="an integer of at least 1")
        if not any(isinstance(n, SelectionNode) and scores in (None, n.scores) for n in walk(self._node)):
            by = "" if scores is None else f" by {scores!r}"
            expected = f"a pattern with a selection{by}, such as sparsek({k})"
            raise ExpressionError("with_k", got=text(self._node), expected=expected)
        return pattern_of(with_budget(self._node, k, scores))

    def with_values(self, **numbers: int | float) -> Pattern:
        """The same pattern whose scalars have these defaults: ``pattern.with_values(window=256)``.

        What is compiled of it is what was compiled of this one. Raises PatternArgumentError for a name that is no
        scalar's, a value of another kind, and one that the pattern does not take.
        """
        from flexsparse.numbered import at_numbers

        scalars = scalars_of(self._node)
        for name in numbers:
            if name not in scalars:
                raise PatternArgumentError(
                    f"with_values({name})",
                    got=repr(numbers[name]),
                    expected=f"a scalar of {self!r}",
                    mend=did_you_mean(name, scalars) or f"Declare one: scalar({name!r}, {numbers[name]!r}).",
                )
        given = numbers_at(scalars, numbers)
        at_numbers(self._node, given)
        return pattern_of(with_defaults(self._node, given))

    def to_flex(self, **options: Any) -> tuple[Any, Any]:
        """(mask_mod, score_mod) for plain flex_attention; options as in ``flexsparse.trace.to_flex``."""
        from flexsparse.trace import to_flex

        return to_flex(self, **options)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Pattern) and self._node == other._node

    def __ne__(self, other: object) -> bool:
        return not self == other


class Mask(Pattern):
    """A plain mask: the score is left as it is and every gate is 1."""

    __slots__ = ()

    if TYPE_CHECKING:
        # Masks of masks are masks; the base class says the rest.
        @overload
        def __and__(self, other: Mask) -> Mask: ...
        @overload
        def __and__(self, other: object) -> Pattern: ...
        def __and__(self, other: object) -> Pattern: ...
        @overload
        def __or__(self, other: Mask) -> Mask: ...
        @overload
        def __or__(self, other: object) -> Pattern: ...
        def __or__(self, other: object) -> Pattern: ...
        @overload
        def __xor__(self, other: Mask) -> Mask: ...
        @overload
        def __xor__(self, other: object) -> Pattern: ...
        def __xor__(self, other: object) -> Pattern: ...
        def __invert__(self) -> Mask: ...


class Selection(Pattern):
    """Keys chosen by learned, query-independent scores."""

    __slots__ = ()


def wrap(node: Node) -> Expression:
    """The expression of the class that fits the node."""
    return pattern_of(node) if node.kind is Kind.BOOL else value_of(node)


def value_of(node: Node) -> Value:
    return Index(node) if node.kind is Kind.INT else Score(node)


def pattern_of(node: Node) -> Pattern:
    if isinstance(node, SelectionNode):
        return Selection(node)
    return Mask(node) if is_plain(node) else Pattern(node)


def lift(value: object, argument: str, kind: Kind) -> Node:
    """The node of an expression or a Python number; REAL accepts integers as well."""
    if isinstance(value, Expression):
        node = value.node
    elif isinstance(value, bool | int | float):
        if isinstance(value, float) and math.isnan(value):
            raise ExpressionError(argument, got="NaN", expected=kind_text(kind))
        node = Constant(value)
    else:
        node = None
    fits = node is not None and (node.kind is kind or (kind is Kind.REAL and node.kind is Kind.INT))
    if node is None or not fits:
        got = repr(value) if node is None else f"{text(node)}, {kind_text(node.kind)}"
        mend = "Captured tensors are declared with captured(name, dims=...) and indexed, as in doc[b, kv]."
        if node is not None and node.kind is Kind.BOOL:
            mend = "Use where(mask, 1, 0) to turn a mask into numbers."
        elif node is not None and kind is Kind.BOOL:
            mend = "Compare it to get a mask, or add it to a pattern: pattern + score."
        raise ExpressionError(argument, got=got, expected=kind_text(kind), mend=mend)
    return node


def _binary(op: str, left: object, right: object) -> Value:
    kind = Kind.INT if op in ("floordiv", "mod", "truncdiv", "truncmod") else Kind.REAL
    args = tuple(lift(x, f"operand of {op}", kind) for x in (left, right))
    return value_of(Apply(op, args))


def _compare(op: str, left: Value, right: object) -> Mask:
    for side in (left, right):
        if isinstance(side, Expression) and mentions(side.node, "score"):
            raise ExpressionError(
                f"comparison with {side!r}",
                got="a comparison of the running score",
                expected="a mask in b, h, q, kv, sizes and captured tensors",
                mend="Masks are decided before scores are computed; use minimum or maximum inside pattern.score(...).",
            )
    args = (left.node, lift(right, f"operand of {op}", Kind.REAL))
    return Mask(Apply(op, args))


def _combine(op: str, left: object, right: object) -> Pattern:
    args = tuple(lift(x, f"operand of {'&' if op == 'and' else '|'}", Kind.BOOL) for x in (left, right))
    joined = pattern_of(Apply(op, args))
    if not isinstance(joined, Mask):
        # Two sinks that differ are refused where they meet, not when the whole is compiled.
        sink_of(joined.node)
    return joined


def plain(operator: str, value: object) -> Pattern:
    node = lift(value, f"operand of {operator}", Kind.BOOL)
    if not is_plain(node):
        got = "a pattern with a selection or a score of its own"
        mend = (
            f"A selection carries gates and gradients, which {operator} would lose; apply {operator} to masks, "
            "and combine selections with & and |."
        )
        if sink_of(node) is not None:
            got = "a pattern with a sink"
            mend = f"A sink belongs to the whole softmax: apply {operator} to the mask, and .sink(...) to the result."
        raise ExpressionError(f"{operator} of {text(node)}", got=got, expected="a plain mask", mend=mend)
    return pattern_of(node)
