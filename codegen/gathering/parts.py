"""A program in parts that have no pair in common, each with what it knows of its pairs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from flexsparse.ir.nodes import FALSE, TRUE, Apply, Constant, Node, Symbol, replaced, walk
from flexsparse.ir.program import Gate, Program, Selected
from flexsparse.ir.simplify import simplify

ONE = Constant(1.0)


def near_mask(program: Program) -> Node:
    """What the pattern allows whatever is selected; masks never fall as selections grow."""
    return simplify(replaced(program.mask, {n: FALSE for n in walk(program.mask) if isinstance(n, Selected)}))


def _operands(op: str, node: Node) -> list[Node]:
    if isinstance(node, Apply) and node.op == op:
        return [x for arg in node.args for x in _operands(op, arg)]
    return [node]


@dataclass(frozen=True)
class Part:
    """One part: its mask (TRUE where every key of it is seen), and the expressions under what it knows."""

    mask: Node
    score: Node
    gate_k: Node
    gate_v: Node
    gate_logit: Node

    @property
    def expressions(self) -> tuple[Node, ...]:
        return (self.mask, self.score, self.gate_k, self.gate_v, self.gate_logit)

    @property
    def gates(self) -> list[Gate]:
        found = {n for e in self.expressions for n in walk(e) if isinstance(n, Gate)}
        return sorted(found, key=lambda gate: gate.number)

    def forward(self) -> Part:
        """Straight-through gates are 1; only their derivatives know better."""
        ones: dict[Node, Node] = {gate: ONE for gate in self.gates if gate.through}
        return Part(*(simplify(replaced(e, ones)) for e in self.expressions))


def _part(program: Program, mask: Node, known: Mapping[Node, Node]) -> Part:
    rest = (program.score, program.gate_k, program.gate_v, program.gate_logit)
    return Part(simplify(mask), *(simplify(replaced(e, known)) for e in rest))


def parts_of(program: Program) -> dict[str, Part]:
    """Every part by name: "full" and "near" where the pattern allows keys by itself, then "selected 0" and so on.

    "joined" is near or enters selection 0, where that is the only one.
    """
    near = near_mask(program)
    parts = {}
    if near != FALSE:
        known: dict[Node, Node] = {near: TRUE, **dict.fromkeys(_operands("and", near), TRUE)}
        parts["full"] = _part(program, TRUE, known)
        parts["near"] = _part(program, near, known)
    for n in range(len(program.selections)):
        parts[f"selected {n}"] = _part(program, selected_mask(program, near, n), _held(near, n))
    if near != FALSE and len(program.selections) == 1:
        enters = Apply("and", (Selected(0), parts["selected 0"].mask))
        joined = _part(program, Apply("or", (near, enters)), {})
        # In the loop over it, a key is selected if it enters inside the chunk, which no score may take for more.
        if not any(isinstance(n, Selected) for e in joined.expressions[1:] for n in walk(e)):
            parts["joined"] = joined
    return parts


def selected_mask(program: Program, near: Node, n: int) -> Node:
    """What else must hold for a pair in selection ``n`` to be seen and to belong to no part before it."""
    mask = replaced(program.mask, _held(near, n))
    after = program.selections[n].after
    after = after if isinstance(after, Node) else Constant(after)
    for other in (*(Selected(m) for m in range(n)), *_possible(near, after)):
        mask = Apply("and", (mask, Apply("not", (other,))))
    return simplify(mask)


def _held(near: Node, n: int) -> dict[Node, Node]:
    """What is known of a pair in selection ``n`` that is not near."""
    known: dict[Node, Node] = {Selected(n): TRUE, near: FALSE, **dict.fromkeys(_operands("or", near), FALSE)}
    return {node: value for node, value in known.items() if not isinstance(node, Constant)}


def _possible(near: Node, after: Node) -> list[Node]:
    """The operands of a near mask that can hold for a key which is ``after`` queries old or older."""
    # It brings sympy, for which a block mask need not wait.
    from flexsparse.ir.canonical import canonical

    old = Apply("le", (Apply("add", (Symbol("kv"), after)), Symbol("q")))
    return [part for part in _operands("or", near) if canonical(Apply("and", (part, old))) != FALSE]
