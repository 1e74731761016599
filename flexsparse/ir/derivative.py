"""Derivatives of real expressions, for kernels that compute their own backward pass."""

from __future__ import annotations

import math

from flexsparse.ir.nodes import Apply, Constant, Kind, Node, walk
from flexsparse.ir.simplify import simplify

_ZERO, _ONE = Constant(0.0), Constant(1.0)


def derivative(node: Node, by: Node) -> Node:
    """d node / d by, ``by`` being a leaf such as the running score or a gate; simplified.

    Conditions, integers and ``floor`` do not move. Where two branches of ``minimum``, ``maximum`` or ``abs`` meet, the
    derivative is that of one of them (0 for ``abs``).
    """
    return simplify(_derivative(node, by))


def _derivative(node: Node, by: Node) -> Node:
    if node == by:
        return _ONE
    if node.kind is not Kind.REAL or not isinstance(node, Apply) or all(n != by for n in walk(node)):
        return _ZERO
    args = node.args
    inner = tuple(_derivative(arg, by) for arg in args)
    match node.op:
        case "add" | "sub":
            return Apply(node.op, inner)
        case "neg":
            return Apply("neg", inner)
        case "mul":
            return _add(_mul(inner[0], args[1]), _mul(args[0], inner[1]))
        case "div":
            return _sub(_div(inner[0], args[1]), _div(_mul(node, inner[1]), args[1]))
        case "where":
            return Apply("where", (args[0], inner[1], inner[2]))
        case "minimum" | "maximum":
            return Apply("where", (Apply("lt" if node.op == "minimum" else "gt", args), *inner))
    return _mul(inner[0], _outer(node))


def _outer(node: Apply) -> Node:
    """The derivative of a function of one argument, by that argument."""
    (x,) = node.args
    match node.op:
        case "exp":
            return node
        case "exp2":
            return _mul(Constant(math.log(2)), node)
        case "log":
            return _div(_ONE, x)
        case "log2":
            return _div(Constant(1 / math.log(2)), x)
        case "sqrt":
            return _div(Constant(0.5), node)
        case "tanh":
            return _sub(_ONE, _mul(node, node))
        case "sigmoid":
            return _mul(node, _sub(_ONE, node))
        case "cos":
            # -sin(x) = cos(x + pi / 2)
            return Apply("cos", (_add(x, Constant(math.pi / 2)),))
        case "abs":
            sign = Apply("where", (Apply("lt", (x, _ZERO)), Constant(-1.0), _ZERO))
            return Apply("where", (Apply("gt", (x, _ZERO)), _ONE, sign))
    raise AssertionError(f"no derivative of {node.op}")


def _add(a: Node, b: Node) -> Node:
    return a if b == _ZERO else b if a == _ZERO else Apply("add", (a, b))


def _sub(a: Node, b: Node) -> Node:
    return a if b == _ZERO else Apply("sub", (a, b))


def _mul(a: Node, b: Node) -> Node:
    if _ZERO in (a, b):
        return _ZERO
    return a if b == _ONE else b if a == _ONE else Apply("mul", (a, b))


def _div(a: Node, b: Node) -> Node:
    return _ZERO if a == _ZERO else Apply("div", (a, b))
