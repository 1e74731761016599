"""The sink of a pattern: which logit joins the softmax's denominator, found on the expression itself."""

from __future__ import annotations

from flexsparse.errors import ExpressionError
from flexsparse.ir.nodes import Apply, Constant, Named, Node, PerHead, Scored, Sunk, rebuild
from flexsparse.ir.simplify import simplify
from flexsparse.ir.text import text

# A logit that adds nothing to the denominator.
NO_SINK = Constant(float("-inf"))


def sink_of(node: Node) -> Node | None:
    """The logit of a pattern's sink, a number in b, h, q and sizes; None where it has none.

    ``a & b`` and ``a | b`` have the sink of the one that has it; each entry of ``per_head`` keeps its own.
    Raises ExpressionError where two patterns with different sinks are combined.
    """
    match node:
        case Named(_, _, body):
            return sink_of(body)
        case Scored(pattern, _):
            return sink_of(pattern)
        case Sunk(pattern, logit):
            return merged(sink_of(pattern), logit, node)
        case Apply("and" | "or", (left, right)):
            return merged(sink_of(left), sink_of(right), node)
        case PerHead(entries):
            found = [sink_of(entry) for entry in entries]
            if all(sink is None for sink in found):
                return None
            return PerHead(tuple(NO_SINK if sink is None else sink for sink in found))
    return None


def merged(one: Node | None, other: Node | None, where: Node) -> Node | None:
    """The sink of two parts of ``where``. Raises ExpressionError where both have one and they differ."""
    if one is None or other is None:
        return other if one is None else one
    if _bare(one) != _bare(other):
        raise ExpressionError(
            text(where),
            got=f"two sinks, {text(one)} and {text(other)}",
            expected="one sink, as a softmax has one denominator",
            mend="Give the sink once, to the whole: (a | b).sink(...).",
        )
    return one


def _bare(node: Node) -> Node:
    """Without names and simplified, so that equal sinks compare equal however they were written."""

    def strip(inner: Node) -> Node:
        if isinstance(inner, Named):
            return strip(inner.body)
        return rebuild(inner, tuple(strip(child) for child in inner.children))

    return simplify(strip(node))
