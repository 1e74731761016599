"""Nodes as text: what a user would type to get an equal expression, parentheses shown."""

from __future__ import annotations

from flexsparse.ir.nodes import (
    COMPARISONS,
    OPERATIONS,
    Apply,
    BlockTopK,
    Constant,
    Kind,
    Load,
    Named,
    Node,
    Opaque,
    PerHead,
    Scalar,
    Scored,
    SelectionNode,
    Sunk,
    Symbol,
    mentions,
)

_ATOM = 10
_PATTERN_LEVEL = ("and", "or", "xor")


def text(node: Node) -> str:
    """The expression as it would be typed in Python and as ``parse`` reads it."""
    return _render(node)[0]


def call_text(name: str, arguments: tuple[tuple[str, object], ...]) -> str:
    """``name(positional, keyword=value)``; an empty argument name means positional."""
    shown = [f"{key}={argument_text(value)}" if key else argument_text(value) for key, value in arguments]
    return f"{name}({', '.join(shown)})"


def argument_text(value: object) -> str:
    """A pattern's argument: a number or string as Python writes it, an expression as text."""
    if isinstance(value, Node):
        return text(value)
    if isinstance(value, tuple):
        return f"[{', '.join(argument_text(v) for v in value)}]"
    return repr(value)


def _render(node: Node) -> tuple[str, int]:
    """The text and the precedence of its outermost operator."""
    match node:
        case Constant(value):
            return repr(value), (_ATOM if isinstance(value, bool) or value >= 0 else 8)
        case Symbol(name):
            return name, _ATOM
        case Scalar(name, _, default):
            return (name if default is None else f"scalar({name!r}, {default!r})"), _ATOM
        case Load(tensor, ()):
            return tensor.name, _ATOM
        case Opaque(function, _, args):
            given = [*(text(a) for a in args), "b", "h", "q", "kv"]
            return f"{function_name(function)}({', '.join(given)})", _ATOM
        case Load(tensor, index):
            return f"{tensor.name}[{', '.join(text(i) for i in index)}]", _ATOM
        case PerHead(entries):
            return f"per_head([{', '.join(text(e) for e in entries)}])", _ATOM
        case Named(name, arguments, _):
            return call_text(name, arguments), _ATOM
        case SelectionNode():
            return call_text("topk", selection_arguments(node)), _ATOM
        case BlockTopK(k, block, score):
            shown = (("", k), ("block", block), *((("score", score),) if score != "mean" else ()))
            return call_text("block_topk", shown), _ATOM
        case Scored(pattern, Apply("add", (Symbol("score"), term))) if not mentions(term, "score"):
            return f"{_operand(pattern, 'add')} + {_wrap(term, 7)}", 6
        case Scored(pattern, expression):
            return f"{_wrap(pattern, _ATOM)}.score({text(expression)})", _ATOM
        case Sunk(pattern, logit):
            return f"{_wrap(pattern, _ATOM)}.sink({text(logit)})", _ATOM
        case Apply(op, args):
            return _render_apply(op, args)
    raise AssertionError(f"no text for {type(node).__name__}")


def _render_apply(op: str, args: tuple[Node, ...]) -> tuple[str, int]:
    operation = OPERATIONS[op]
    if not operation.symbol:
        return f"{op}({', '.join(text(a) for a in args)})", _ATOM
    level = operation.precedence
    if operation.arity == 1:
        return f"{operation.symbol}{_wrap(args[0], level)}", level
    if op in _PATTERN_LEVEL:
        left, right = _operand(args[0], op, left=True), _operand(args[1], op)
    else:
        # Arithmetic associates to the left; neither side of a comparison may be a comparison.
        left = _wrap(args[0], level + 1 if op in COMPARISONS else level)
        right = _wrap(args[1], level + 1)
    return f"{left} {operation.symbol} {right}", level


def _wrap(node: Node, at_least: int) -> str:
    rendered, level = _render(node)
    return rendered if level >= at_least else f"({rendered})"


def _operand(node: Node, op: str, left: bool = False) -> str:
    """An operand of a pattern operator: parenthesised unless atomic, negated, or the same operator on the left."""
    rendered, level = _render(node)
    same_chain = left and isinstance(node, Apply) and node.op == op
    return rendered if same_chain or level >= 8 else f"({rendered})"


def selection_arguments(node: SelectionNode) -> tuple[tuple[str, object], ...]:
    """The arguments of ``topk`` that differ from its defaults."""
    shown: list[tuple[str, object]] = [("", node.k)]
    defaults = SelectionNode(node.k)
    for name in ("after", "scores", "segments", "gate"):
        if getattr(node, name) != getattr(defaults, name):
            shown.append((name, getattr(node, name)))
    return tuple(shown)


def function_name(function: object) -> str:
    """A name for a user's function, as an identifier."""
    name = getattr(function, "__name__", type(function).__name__)
    return name if name.isidentifier() else "function"


def kind_text(kind: Kind) -> str:
    """How errors speak of a kind."""
    return {Kind.INT: "an index expression", Kind.REAL: "a score", Kind.BOOL: "a mask or pattern"}[kind]
