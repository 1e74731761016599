"""Heads whose masks are one function: a mask is analysed once for each of them that differs."""

from __future__ import annotations

import functools

from flexsparse.ir.nodes import FALSE, TRUE, Apply, Constant, Kind, Load, Node, Opaque, Symbol, mentions, rebuild, walk
from flexsparse.ir.program import Chosen, Selected, Tables, table_name
from flexsparse.ir.simplify import simplify

# The operand that decides an operation on its own; the other constant leaves it to the other operand.
_DECIDES = {"and": FALSE, "or": TRUE}


@functools.lru_cache(maxsize=1024)
def first_alike(mask: Node, tables: Tables, heads: int) -> tuple[int, ...]:
    """For each head the first head with the same mask: the mask of a head is compared after ``h`` became its number.

    Look-ups of captured tensors by ``h`` differ from head to head, as do selections and untraced functions.
    """
    if any(isinstance(n, Selected | Chosen | Opaque) for n in walk(mask)):
        return tuple(range(heads))
    if not mentions(mask, "h"):
        return (0,) * heads
    named = {table_name(number): values for number, values in enumerate(tables)}
    seen: dict[Node, int] = {}
    return tuple(seen.setdefault(simplify(_at_head(mask, head, heads, named)), head) for head in range(heads))


def _at_head(node: Node, head: int, heads: int, tables: dict[str, tuple[int | float, ...]]) -> Node:
    """The node for one head, tables of ``per_head`` numbers looked up."""
    if isinstance(node, Symbol):
        return Constant({"h": head, "heads": heads}[node.name]) if node.name in ("h", "heads") else node
    if isinstance(node, Apply) and node.op in _DECIDES:
        # A per_head of masks is a chain of choices: what a head does not choose is not even looked at.
        first = simplify(_at_head(node.args[0], head, heads, tables))
        if isinstance(first, Constant):
            return first if first == _DECIDES[node.op] else _at_head(node.args[1], head, heads, tables)
        return Apply(node.op, (first, _at_head(node.args[1], head, heads, tables)))
    node = rebuild(node, tuple(_at_head(child, head, heads, tables) for child in node.children))
    if not isinstance(node, Load) or node.tensor.name not in tables:
        return node
    values, place = tables[node.tensor.name], simplify(node.index[0])
    if not isinstance(place, Constant) or not 0 <= place.value < len(values):
        return node
    value = values[int(place.value)]
    # Reals stay look-ups, as Python would fold them in other precision than a call has; equal ones get one place.
    return Constant(value) if node.kind is Kind.INT else Load(node.tensor, (Constant(values.index(value)),))
