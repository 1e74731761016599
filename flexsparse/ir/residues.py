"""Patterns whose far keys are of the query's own residue class: apart, each class is a band of neighbours.

A mask with ``(q - kv) % d == 0`` in it scatters a query's keys over every tile. With positions reordered by class,
those of one class stand together, and the same pairs fill whole tiles. Pairs of two classes, if the mask has any, stay
where they are.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace

from flexsparse.ir.nodes import FALSE, TRUE, Apply, Constant, Node, Symbol, replaced, walk
from flexsparse.ir.program import Program
from flexsparse.ir.scalars import at
from flexsparse.ir.simplify import simplify
from flexsparse.ir.sinks import NO_SINK

_Q, _KV, _B, _ZERO = Symbol("q"), Symbol("kv"), Symbol("b"), Constant(0)


@dataclass(frozen=True)
class Residues:
    """A program in two parts that share no pair; neither has the sink.

    ``within``: pairs of one class modulo ``modulus``. Its q, kv and lengths count within a class, and its row b is
    class ``b % modulus`` of row ``b // modulus``. ``rest``: all other pairs, None where there are none.
    """

    modulus: int
    within: Program
    rest: Program | None


def split_residues(program: Program) -> Residues | None:
    """The parts by residue class, None where the mask has no such condition with a modulus that no call gives."""
    split = _split(program.printed)
    if split is None or program.symbolic is None:
        return split
    within, rest = (part if part is None else at(part, program.numbers) for part in (split.within, split.rest))
    assert within is not None
    return Residues(split.modulus, within, rest)


@functools.lru_cache(maxsize=256)
def _split(program: Program) -> Residues | None:
    found = dict(_conditions(program.mask))
    if not found:
        return None
    modulus = max(found.values())
    same: dict[Node, Node] = {node: TRUE for node, d in found.items() if modulus % d == 0}
    other: dict[Node, Node] = {node: FALSE for node, d in found.items() if d % modulus == 0}
    # It brings sympy, for which other patterns need not wait.
    from flexsparse.ir.canonical import canonical

    mask = canonical(_in_classes(simplify(replaced(program.mask, same)), modulus))
    rest = simplify(replaced(program.mask, other))
    apart = Apply("not", (next(node for node, d in found.items() if d == modulus),))
    # What is not in reach of a selection has no gates.
    score = simplify(_in_classes(program.score, modulus))
    return Residues(
        modulus,
        replace(program, mask=mask, score=score, sink=NO_SINK),
        None if rest == FALSE else replace(program, mask=simplify(Apply("and", (rest, apart))), sink=NO_SINK),
    )


def _conditions(mask: Node) -> Iterator[tuple[Node, int]]:
    """The conditions that query and key have the same residue, with the modulus."""
    for node in walk(mask):
        if isinstance(node, Apply) and node.op == "eq":
            for left, right in (node.args, node.args[::-1]):
                modulus = _modulus(left, right)
                if modulus is not None and modulus > 1:
                    yield node, modulus
                    break


def _modulus(left: Node, right: Node) -> int | None:
    """d of ``(q - kv) % d == 0`` and of ``q % d == kv % d``."""
    if not (isinstance(left, Apply) and left.op == "mod" and isinstance(left.args[1], Constant)):
        return None
    value = left.args[1].value
    if isinstance(value, bool) or not isinstance(value, int):
        return None
    distance = left.args[0] in (Apply("sub", (_Q, _KV)), Apply("sub", (_KV, _Q)))
    if distance and right == _ZERO:
        return value
    both = isinstance(right, Apply) and right.op == "mod" and right.args[1] == left.args[1]
    return value if both and {left.args[0], right.children[0]} == {_Q, _KV} else None


def _in_classes(node: Node, modulus: int) -> Node:
    """The expression of a pair of one class, with its positions within the class."""
    d = Constant(modulus)

    def position(of: Symbol) -> Node:
        return Apply("add", (Apply("mul", (of, d)), Apply("mod", (_B, d))))

    known: dict[Node, Node] = {_Q: position(_Q), _KV: position(_KV), _B: Apply("floordiv", (_B, d))}
    # Distances are those within the class, times the modulus.
    for pair in ((_Q, _KV), (_KV, _Q)):
        known[Apply("sub", pair)] = Apply("mul", (Apply("sub", pair), d))
    for length in ("q_len", "kv_len"):
        known[Symbol(length)] = Apply("mul", (Symbol(length), d))
    return replaced(node, known)
