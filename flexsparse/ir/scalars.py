"""Numbers that a call gives: which a pattern has, whether a value fits, and a pattern or program with them filled in.

A pattern is compiled without the values of its scalars, so that its functions and kernels serve every value. Whatever
is analysed is analysed at the values of the call: a program with constants in place of its scalars.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from flexsparse.errors import CapturedError, PatternArgumentError
from flexsparse.ir.nodes import (
    Constant,
    Kind,
    Load,
    Named,
    Node,
    Scalar,
    SelectionNode,
    rebuild,
    replaced,
    walk,
)
from flexsparse.ir.program import Numbers, Program
from flexsparse.ir.simplify import simplify

_WANTED = {Kind.INT: "an integer", Kind.REAL: "a number"}


def scalars_of(node: Node) -> dict[str, Scalar]:
    """The scalars of a pattern by name, in alphabetical order.

    Raises CapturedError where one name has two declarations, or is that of a tensor as well.
    """
    found: dict[str, Scalar] = {}
    tensors: set[str | None] = set()
    for part in walk(node):
        if isinstance(part, Load):
            tensors.add(part.tensor.name)
        elif isinstance(part, SelectionNode):
            tensors |= {part.scores, part.segments}
        elif isinstance(part, Scalar) and found.setdefault(part.name, part) != part:
            other = found[part.name]
            raise CapturedError(
                f"scalar {part.name!r}",
                got=f"two declarations, with the defaults {other.default!r} and {part.default!r}",
                expected="one declaration for each name",
                mend="Give one of them another name, or both the same default.",
            )
    for name in sorted(found):
        if name in tensors:
            raise CapturedError(
                f"scalar {name!r}",
                got="a name that is also a tensor of the call",
                expected="a name of its own",
                mend="Give the scalar or the tensor another name.",
            )
    return dict(sorted(found.items()))


def is_of_scalars(node: Node) -> bool:
    """Whether the expression has scalars, and nothing beside them but constants."""
    leaves = [n for n in walk(node) if not n.children]
    return any(isinstance(n, Scalar) for n in leaves) and all(isinstance(n, Scalar | Constant) for n in leaves)


def number_of(scalar: Scalar, value: object) -> int | float:
    """The value as an int or a float. Raises PatternArgumentError for one that does not fit."""
    wanted = numbers.Integral if scalar.of is Kind.INT else numbers.Real
    if isinstance(value, bool) or not isinstance(value, wanted):
        mend = ""
        if hasattr(value, "item"):
            mend = f"Pass {scalar.name}={scalar.name}.item(), which waits for a GPU; a learned number is captured(...)."
        elif isinstance(value, float):
            mend = f"Round it, or declare scalar({scalar.name!r}, ...) with a real default such as 1.0."
        raise PatternArgumentError(
            scalar.name,
            got=type(value).__name__ if hasattr(value, "item") else f"{value!r}, {type(value).__name__}",
            expected=f"{_WANTED[scalar.of]}, as its default is",
            mend=mend,
        )
    number: Any = int(value) if scalar.of is Kind.INT else float(value)  # type: ignore[call-overload]
    # As torch.compile can trace it.
    if number != number:
        raise PatternArgumentError(scalar.name, got="NaN", expected="a number")
    return number


def numbers_at(scalars: Mapping[str, Scalar], given: Mapping[str, object]) -> Numbers:
    """The number of every scalar, by name in order: what was given, else its default."""
    values = {name: scalar.default for name, scalar in scalars.items()}
    values |= {name: number_of(scalars[name], value) for name, value in given.items()}
    return tuple([(name, value) for name, value in values.items() if value is not None])


def without_defaults(node: Node) -> Node:
    """The pattern as it is compiled: its scalars have names alone."""
    return mapped(node, lambda scalar: replace(scalar, default=None))


def with_defaults(node: Node, given: Numbers) -> Node:
    """The pattern whose scalars have these defaults."""
    values = dict(given)
    return mapped(node, lambda scalar: replace(scalar, default=values[scalar.name]))


def mapped(node: Node, leaf: Callable[[Scalar], Node]) -> Node:
    """The pattern with every scalar exchanged, those among the arguments of a name too."""
    if isinstance(node, Scalar):
        return leaf(node)
    node = rebuild(node, tuple(mapped(child, leaf) for child in node.children))
    if not isinstance(node, Named):
        return node
    return replace(node, arguments=tuple((name, mapped_argument(value, leaf)) for name, value in node.arguments))


def mapped_argument(value: object, leaf: Callable[[Scalar], Node]) -> object:
    if isinstance(value, tuple):
        return tuple(mapped_argument(v, leaf) for v in value)
    return mapped(value, leaf) if isinstance(value, Node) else value


def plain(value: object) -> Any:
    """An argument as it is written: a Python number in place of a constant."""
    if isinstance(value, tuple):
        return tuple(plain(v) for v in value)
    value = simplify(value) if isinstance(value, Node) else value
    return value.value if isinstance(value, Constant) else value


def at(program: Program, given: Numbers) -> Program:
    """The program with constants in place of its scalars; what was printed of it stays as it is."""
    if not program.scalars:
        return program
    known: dict[Node, Node] = {s: Constant(value) for s in program.scalars for n, value in given if n == s.name}

    def count(number: Any) -> Any:
        return plain(replaced(number, known)) if isinstance(number, Node) else number

    expressions: dict[str, Any] = {name: simplify(replaced(e, known)) for name, e in program.expressions.items()}
    selections = tuple(replace(s, k=count(s.k), after=count(s.after)) for s in program.selections)
    return replace(program, **expressions, selections=selections, symbolic=program, numbers=given)
