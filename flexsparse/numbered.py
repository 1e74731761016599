"""A pattern with numbers in place of its scalars, as it would be written: the language checks it as it checks that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flexsparse.expression import pattern_of, value_of, wrap
from flexsparse.ir.nodes import Constant, Named, Node, Scalar, SelectionNode, Sunk, rebuild, walk
from flexsparse.ir.program import Numbers
from flexsparse.ir.scalars import mapped, mapped_argument, numbers_at, plain, scalars_of
from flexsparse.ir.simplify import simplify
from flexsparse.language import topk
from flexsparse.patterns import catalogue


def at_numbers(node: Node, given: Numbers) -> Node:
    """The pattern with constants in place of its scalars, as it would have been written.

    Raises what the pattern raises when it is written so: PatternArgumentError or ExpressionError.
    """
    values = dict(given)
    return _written(node, lambda scalar: Constant(values[scalar.name]))


def at_defaults(node: Node) -> Node:
    """The pattern with the defaults of its scalars in their place."""
    scalars = scalars_of(node)
    return at_numbers(node, numbers_at(scalars, {})) if scalars else node


def _written(node: Node, leaf: Callable[[Scalar], Node]) -> Node:
    if not any(isinstance(n, Scalar) for n in walk(node)):
        return node
    if isinstance(node, Scalar):
        return leaf(node)
    if isinstance(node, SelectionNode):
        k, after = (plain(simplify(mapped(c, leaf)) if isinstance(c, Node) else c) for c in (node.k, node.after))
        return topk(k, after=after, scores=node.scores, segments=node.segments, gate=node.gate).node
    if isinstance(node, Named):
        arguments = tuple((name, plain(mapped_argument(value, leaf))) for name, value in node.arguments)
        _check_arguments(node, arguments)
        return Named(node.name, arguments, _written(node.body, leaf))
    children = tuple(_written(child, leaf) for child in node.children)
    if isinstance(node, Sunk):
        return pattern_of(children[0]).sink(value_of(simplify(children[1]))).node
    return rebuild(node, children)


def _check_arguments(node: Named, arguments: tuple[tuple[str, object], ...]) -> None:
    """Call a pattern of the catalogue with the arguments that it now has, for its own checks of them."""
    function = catalogue().get(node.name)
    if function is None:
        return

    def call(written: tuple[tuple[str, object], ...]) -> Node:
        lifted = [(name, _lifted(value)) for name, value in written]
        made: Any = function(*(v for n, v in lifted if not n), **{n: v for n, v in lifted if n})
        return made.node

    # Another pattern may have taken the name of one of the catalogue.
    if call(node.arguments) == node:
        call(arguments)


def _lifted(value: object) -> object:
    """An argument as it was given, which a name has as a node."""
    if isinstance(value, tuple):
        return [_lifted(v) for v in value]
    return wrap(value) if isinstance(value, Node) else value
