"""What a pattern takes by name."""

from __future__ import annotations

from flexsparse.ir.nodes import Load, Node, Scalar, SelectionNode, walk


def names_of(pattern: Node) -> set[str]:
    """The names of the tensors and of the numbers that a pattern reads."""
    found: set[str] = set()
    for node in walk(pattern):
        match node:
            case Load():
                found.add(node.tensor.name)
            case SelectionNode():
                found |= {node.scores} if node.segments is None else {node.scores, node.segments}
            case Scalar():
                found.add(node.name)
    return found
