"""Which part of a user's pattern an operation of its program came from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from flexsparse.ir.lower import flattened
from flexsparse.ir.nodes import Apply, Constant, Kind, Named, Node, Scalar, Scored, SelectionNode, Symbol, walk
from flexsparse.ir.program import Chosen, Gate, Held, Program, Selected
from flexsparse.ir.simplify import simplify
from flexsparse.ir.text import text


@dataclass(frozen=True)
class _Place:
    """A part of the pattern with a name of its own: what its masks and its scores are made of, and the names inside."""

    text: str
    masks: frozenset[Node]
    scores: frozenset[Node] = frozenset()
    inside: frozenset[str] = frozenset()

    def holds(self, node: Node, section: str) -> bool:
        # A score may ask which keys a mask allows; other operations alike in both are not of one origin.
        asked = section == "mask" or node.kind is Kind.BOOL
        return (asked and node in self.masks) or (section == "score" and node in self.scores)


class Origins:
    """Finds the innermost named parts of a pattern, such as ``sliding_window(512)``, that an operation is of."""

    def __init__(self, pattern: Node, program: Program) -> None:
        self._selections = program.selections
        named = {text(n): n for n in walk(pattern) if isinstance(n, Named)}
        self._places = [_place(name, node) for name, node in named.items()]
        own = {n for n in walk(pattern) if isinstance(n, SelectionNode)}
        own = own.difference(*(place.masks for place in self._places))
        self._places += [_Place(text(n), frozenset({n})) for n in own]

    def of(self, node: Node, section: str) -> tuple[str, ...]:
        """The texts of those parts, in the order of the pattern; empty where it is the user's own operation.

        ``section`` is "mask", or "score" for scores and gates. An operation that the compiler put together from
        several has the parts of its operands.
        """
        held = set(self._holding(node, section))
        return tuple(p.text for p in self._places if p.text in held and not p.inside & held)

    def _holding(self, node: Node, section: str) -> Iterator[str]:
        if isinstance(node, Constant | Symbol | Scalar):
            return
        if isinstance(node, Selected | Gate | Held):
            node, section = self._selections[node.number], "mask"
        if isinstance(node, Chosen):
            node = node.topk
        found = [place.text for place in self._places if place.holds(node, section)]
        yield from found
        # Both sides of & can have a comparison, and one of them all of it.
        if not found or (isinstance(node, Apply) and node.op in ("and", "or")):
            for child in node.children:
                # Index arithmetic such as q - kv is everybody's.
                if child.kind is not Kind.INT:
                    yield from self._holding(child, section)


def _place(name: str, node: Named) -> _Place:
    inside = frozenset(text(n) for n in walk(node) if isinstance(n, Named) and n is not node)
    scores: list[Node] = [node]
    masks: list[Node] = []
    if node.kind is Kind.BOOL:
        scores = [n.expression for n in walk(node) if isinstance(n, Scored)]
        masks = [_unscored(node)]
    return _Place(name, _operations(masks), _operations(scores), inside)


def _unscored(node: Node) -> Node:
    """A pattern without its names, down to where a score is given to it."""
    while isinstance(node, Named | Scored):
        node = node.body if isinstance(node, Named) else node.pattern
    return node


def _operations(nodes: list[Node]) -> frozenset[Node]:
    forms = [form for node in nodes for form in (flattened(node), simplify(flattened(node)))]
    return frozenset(n for form in forms for n in walk(form) if not isinstance(n, Constant | Symbol | Scalar))
