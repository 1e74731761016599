"""Simplification: local rules, one a line, applied bottom-up until nothing changes.

A rule takes the arguments of one operation and returns a smaller node, or None where it does not apply.
Rules may not change a value, a gradient or a kind.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable

from flexsparse.ir.nodes import FALSE, TRUE, Apply, Constant, Kind, Node, rebuild

Args = tuple[Node, ...]
Rule = tuple[str, Callable[[Args], Node | None]]


def _is(node: Node, value: float | bool) -> bool:
    """A constant of this value; booleans and numbers do not mix."""
    return (
        isinstance(node, Constant) and node.value == value and isinstance(node.value, bool) == isinstance(value, bool)
    )


def _not(node: Node) -> Node:
    return Apply("not", (node,))


def _same_kind(kept: Node, args: Args) -> Node | None:
    """``kept``, unless dropping the other operand would turn a real into an integer."""
    return kept if kept.kind is Kind.REAL or all(a.kind is Kind.INT for a in args) else None


def _operands(op: str, node: Node) -> list[Node]:
    """The operands of a chain of one associative operation."""
    if isinstance(node, Apply) and node.op == op:
        return [x for arg in node.args for x in _operands(op, arg)]
    return [node]


def _repeated(op: str) -> Callable[[Args], Node | None]:
    def rule(args: Args) -> Node | None:
        kept = _operands(op, args[0])
        new = [x for x in _operands(op, args[1]) if x not in kept]
        if len(new) == len(_operands(op, args[1])):
            return None
        result = args[0]
        for operand in new:
            result = Apply(op, (result, operand))
        return result

    return rule


def _absorbed(inner: str) -> Callable[[Args], Node | None]:
    def rule(args: Args) -> Node | None:
        for this, other in (args, args[::-1]):
            if isinstance(other, Apply) and other.op == inner and this in _operands(inner, other):
                return this
        return None

    return rule


RULES: dict[str, tuple[Rule, ...]] = {
    "and": (
        ("True & x -> x", lambda a: a[1] if _is(a[0], True) else None),
        ("x & True -> x", lambda a: a[0] if _is(a[1], True) else None),
        ("False & x -> False", lambda a: FALSE if _is(a[0], False) or _is(a[1], False) else None),
        ("x & y & x -> x & y", _repeated("and")),
        ("x & (x | y) -> x", _absorbed("or")),
        ("x & ~x -> False", lambda a: FALSE if a[0] == _not(a[1]) or a[1] == _not(a[0]) else None),
    ),
    "or": (
        ("False | x -> x", lambda a: a[1] if _is(a[0], False) else None),
        ("x | False -> x", lambda a: a[0] if _is(a[1], False) else None),
        ("True | x -> True", lambda a: TRUE if _is(a[0], True) or _is(a[1], True) else None),
        ("x | y | x -> x | y", _repeated("or")),
        ("x | (x & y) -> x", _absorbed("and")),
        ("x | ~x -> True", lambda a: TRUE if a[0] == _not(a[1]) or a[1] == _not(a[0]) else None),
    ),
    "xor": (
        ("x ^ x -> False", lambda a: FALSE if a[0] == a[1] else None),
        ("x ^ False -> x", lambda a: a[0] if _is(a[1], False) else None),
        ("False ^ x -> x", lambda a: a[1] if _is(a[0], False) else None),
        ("x ^ True -> ~x", lambda a: _not(a[0]) if _is(a[1], True) else None),
        ("True ^ x -> ~x", lambda a: _not(a[1]) if _is(a[0], True) else None),
    ),
    "not": (("~~x -> x", lambda a: a[0].args[0] if isinstance(a[0], Apply) and a[0].op == "not" else None),),
    "add": (
        ("x + 0 -> x", lambda a: _same_kind(a[0], a) if _is(a[1], 0) else None),
        ("0 + x -> x", lambda a: _same_kind(a[1], a) if _is(a[0], 0) else None),
    ),
    "sub": (("x - 0 -> x", lambda a: _same_kind(a[0], a) if _is(a[1], 0) else None),),
    "mul": (
        ("x * 1 -> x", lambda a: _same_kind(a[0], a) if _is(a[1], 1) else None),
        ("1 * x -> x", lambda a: _same_kind(a[1], a) if _is(a[0], 1) else None),
    ),
    "neg": (("--x -> x", lambda a: a[0].args[0] if isinstance(a[0], Apply) and a[0].op == "neg" else None),),
    "where": (
        ("where(True, x, y) -> x", lambda a: _same_kind(a[1], a[1:]) if _is(a[0], True) else None),
        ("where(False, x, y) -> y", lambda a: _same_kind(a[2], a[1:]) if _is(a[0], False) else None),
        ("where(m, x, x) -> x", lambda a: a[1] if a[1] == a[2] else None),
    ),
    "minimum": (("minimum(x, x) -> x", lambda a: a[0] if a[0] == a[1] else None),),
    "maximum": (("maximum(x, x) -> x", lambda a: a[0] if a[0] == a[1] else None),),
}


def _truncdiv(x: int, y: int) -> int:
    return abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1)


# Python's meaning of every operation, for constants.
FOLD: dict[str, Callable[..., int | float | bool]] = {
    **{op: getattr(operator, op) for op in ("eq", "ne", "lt", "le", "gt", "ge", "add", "sub", "mul", "xor")},
    **{"and": operator.and_, "or": operator.or_, "not": operator.not_, "neg": operator.neg, "abs": abs},
    **{"div": operator.truediv, "floordiv": operator.floordiv, "mod": operator.mod, "truncdiv": _truncdiv},
    "truncmod": lambda x, y: x - y * _truncdiv(x, y),
    **{"minimum": min, "maximum": max, "floor": math.floor, "where": lambda c, x, y: x if c else y},
    **{"exp": math.exp, "exp2": lambda x: 2.0**x, "log": math.log, "log2": math.log2, "sqrt": math.sqrt},
    **{"tanh": math.tanh, "cos": math.cos, "sigmoid": lambda x: 1 / (1 + math.exp(-x))},
}


def simplify(node: Node) -> Node:
    """The node after every rule that applies; idempotent."""
    node = rebuild(node, tuple(simplify(child) for child in node.children))
    if not isinstance(node, Apply):
        return node
    if all(isinstance(arg, Constant) for arg in node.args):
        return _folded(node)
    for _, rule in RULES.get(node.op, ()):
        smaller = rule(node.args)
        if smaller is not None:
            return simplify(smaller)
    return node


def _folded(node: Apply) -> Node:
    """The constant, or the node itself where Python refuses (1 // 0, log(0)); it then fails where it is used."""
    try:
        value = FOLD[node.op](*(arg.value for arg in node.args if isinstance(arg, Constant)))
    except (ArithmeticError, ValueError):
        return node
    return Constant(float(value)) if node.kind is Kind.REAL else Constant(value)
