"""The same pattern with other budgets: how many keys its selections choose."""

from __future__ import annotations

from dataclasses import replace

from flexsparse.ir.nodes import Named, Node, SelectionNode, rebuild, walk


def with_budget(node: Node, k: int, scores: str | None) -> Node:
    """``node`` with k keys for each selection by ``scores``, or for each of all.

    A name whose argument k says how many all its selections choose says the new number; any other name under which
    a selection was changed is dropped, as it no longer says what is inside.
    """
    if isinstance(node, SelectionNode):
        return replace(node, k=k) if scores in (None, node.scores) else node
    children = tuple(with_budget(child, k, scores) for child in node.children)
    if not isinstance(node, Named) or children == node.children:
        return rebuild(node, children)
    # Patterns with a selection take k first, and so it is written, by its place or by its name.
    place = next((i for i, (name, _) in enumerate(node.arguments) if name == "k" or (i == 0 and not name)), None)
    inside = [n for n in walk(node.body) if isinstance(n, SelectionNode)]
    if place is None or any(n.k != node.arguments[place][1] or scores not in (None, n.scores) for n in inside):
        return children[0]
    arguments = tuple((name, k if i == place else x) for i, (name, x) in enumerate(node.arguments))
    return Named(node.name, arguments, children[0])
