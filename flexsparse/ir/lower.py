"""Expression to program: the algebra of whole patterns, spelled out on masks, scores and gates."""

from __future__ import annotations

from dataclasses import dataclass, field

from flexsparse.errors import CapturedError, ExpressionError
from flexsparse.ir.nodes import (
    Apply,
    BlockTopK,
    Constant,
    Kind,
    Load,
    Named,
    Node,
    PerHead,
    Scored,
    SelectionNode,
    Sunk,
    Symbol,
    TensorSpec,
    is_plain,
    rebuild,
    walk,
)
from flexsparse.ir.program import Chosen, Gate, Program, Selected, table_name
from flexsparse.ir.simplify import simplify
from flexsparse.ir.sinks import NO_SINK, sink_of
from flexsparse.ir.text import text

ONE = Constant(1.0)
SCORE = Symbol("score")


@dataclass(frozen=True)
class _Parts:
    """A pattern taken apart; ``score`` is an expression in the running score."""

    mask: Node
    score: Node = SCORE
    gate_k: Node = ONE
    gate_v: Node = ONE
    gate_logit: Node = ONE

    @property
    def gates(self) -> tuple[Node, Node, Node]:
        return (self.gate_k, self.gate_v, self.gate_logit)


@dataclass
class _Lowering:
    selections: list[SelectionNode] = field(default_factory=list)
    tables: list[tuple[int | float, ...]] = field(default_factory=list)
    head_groups: set[int] = field(default_factory=set)

    def parts(self, node: Node) -> _Parts:
        """The mask, score and gates of a pattern."""
        if isinstance(node, Named):
            return self.parts(node.body)
        if is_plain(node):
            return _Parts(self.flat(node))
        match node:
            case SelectionNode():
                return self.selection(node)
            case Scored(pattern, expression):
                inner = self.parts(pattern)
                return _Parts(inner.mask, substitute(self.flat(expression), inner.score), *inner.gates)
            case Sunk(pattern, _):
                # The sink belongs to the whole softmax and is lowered beside the parts.
                return self.parts(pattern)
            case Apply("and", (left, right)):
                return _both(self.parts(left), self.parts(right))
            case Apply("or", (left, right)):
                return _either(self.parts(left), self.parts(right))
            case PerHead(entries):
                return self.per_head([self.parts(e) for e in entries])
        raise ExpressionError(text(node), got="a selection or score inside a mask", expected="& and | only")

    def selection(self, node: SelectionNode) -> _Parts:
        if node not in self.selections:
            self.selections.append(node)
        number = self.selections.index(node)
        capped = node.gate == "capped_softmax"
        gate = Gate(number, node.gate if node.gate.startswith("ste") else "", capped)
        on_k, on_v = (node.gate in ("kv", side) or bool(gate.through) or capped for side in ("k", "v"))
        return _Parts(
            Selected(number),
            gate_k=gate if on_k else ONE,
            gate_v=gate if on_v else ONE,
            gate_logit=gate if node.gate == "logit" else ONE,
        )

    def per_head(self, entries: list[_Parts]) -> _Parts:
        result = entries[-1]
        for position in reversed(range(len(entries) - 1)):
            here = Apply("eq", (self.entry_of_head(len(entries)), Constant(position)))
            chosen = [
                Apply("where", (here, mine, rest))
                for mine, rest in zip(
                    (entries[position].score, *entries[position].gates), (result.score, *result.gates), strict=True
                )
            ]
            result = _Parts(_mask_where(here, entries[position].mask, result.mask), *chosen)
        return result

    def flat(self, node: Node) -> Node:
        """A plain mask or a number without names, and with ``per_head`` as table look-ups or choices."""
        if isinstance(node, Named):
            return self.flat(node.body)
        if isinstance(node, PerHead):
            return self.choice([self.flat(entry) for entry in node.entries], node.kind)
        if isinstance(node, BlockTopK):
            # A future block is never chosen; the own block is seen up to the query.
            return Apply("and", (Chosen(node), Apply("le", (Symbol("kv"), Symbol("q")))))
        return rebuild(node, tuple(self.flat(child) for child in node.children))

    def choice(self, entries: list[Node], kind: Kind) -> Node:
        numbers = [simplify(entry) for entry in entries]
        if kind is not Kind.BOOL and all(isinstance(n, Constant) for n in numbers):
            values = tuple(n.value for n in numbers if isinstance(n, Constant))
            # 1 == 1.0 in Python, but a table of integers is not one of reals.
            known = [(tuple(map(type, table)), table) for table in self.tables]
            if (tuple(map(type, values)), values) not in known:
                self.tables.append(values)
                known.append((tuple(map(type, values)), values))
            spec = TensorSpec(table_name(known.index((tuple(map(type, values)), values))), ("entry",), kind)
            return Load(spec, (self.entry_of_head(len(values)),))
        result = entries[-1]
        for position in reversed(range(len(entries) - 1)):
            here = Apply("eq", (self.entry_of_head(len(entries)), Constant(position)))
            if kind is Kind.BOOL:
                result = _mask_where(here, entries[position], result)
            else:
                result = Apply("where", (here, entries[position], result))
        return result

    def entry_of_head(self, entries: int) -> Node:
        """``h * entries // heads``: the entry of a ``per_head`` list that head h takes."""
        self.head_groups.add(entries)
        return Apply("floordiv", (Apply("mul", (Symbol("h"), Constant(entries))), Symbol("heads")))


def substitute(expression: Node, running: Node) -> Node:
    """The expression with ``running`` in place of the running score."""
    if expression == SCORE:
        return running
    return rebuild(expression, tuple(substitute(child, running) for child in expression.children))


def flattened(node: Node) -> Node:
    """The node without names, its ``per_head`` lists as look-ups and choices, in the terms of the program's nodes."""
    return _Lowering().flat(node)


def _mask_where(condition: Node, this: Node, other: Node) -> Node:
    yes = Apply("and", (condition, this))
    no = Apply("and", (Apply("not", (condition,)), other))
    return Apply("or", (yes, no))


def _both(left: _Parts, right: _Parts) -> _Parts:
    gates = [Apply("mul", pair) for pair in zip(left.gates, right.gates, strict=True)]
    return _Parts(Apply("and", (left.mask, right.mask)), substitute(right.score, left.score), *gates)


def _either(left: _Parts, right: _Parts) -> _Parts:
    score = Apply("where", (left.mask, left.score, right.score))
    gates = [_larger(left, right, *pair) for pair in zip(left.gates, right.gates, strict=True)]
    return _Parts(Apply("or", (left.mask, right.mask)), score, *gates)


def _larger(left: _Parts, right: _Parts, mine: Node, other: Node) -> Node:
    """The larger gate of a key of both branches, the branch's own elsewhere; a tie goes to the left.

    No gate exceeds 1, so a branch without a gate wins wherever it allows the key. A straight-through gate
    is 1 and still has a gradient, so on its left the tie must be decided by the comparison.
    """
    if mine == other:
        return mine
    if mine == ONE:
        return Apply("where", (left.mask, ONE, other))
    if other == ONE and not any(isinstance(n, Gate) and n.through for n in walk(mine)):
        return Apply("where", (right.mask, ONE, mine))
    wins = Apply("or", (Apply("not", (right.mask,)), Apply("ge", (mine, other))))
    return Apply("where", (Apply("and", (left.mask, wins)), mine, other))


def lower(node: Node) -> Program:
    """The simplified program of a pattern.

    Raises ExpressionError for a score on its own, and CapturedError where one name is declared in two ways.
    """
    if node.kind is not Kind.BOOL:
        raise ExpressionError(
            f"pattern {text(node)}",
            got="a score on its own",
            expected="a pattern",
            mend=f"Add it to the keys it scores: full() + {text(node)}, or full().score(...) if it contains `score`.",
        )
    lowering = _Lowering()
    parts = lowering.parts(node)
    sink = lowering.flat(sink_of(node) or NO_SINK)
    expressions = [simplify(x) for x in (parts.mask, parts.score, *parts.gates, sink)]
    used = {n.number for e in expressions for n in walk(e) if isinstance(n, Selected | Gate)}
    if used != set(range(len(lowering.selections))):
        expressions, kept = _renumbered(expressions, lowering.selections, used)
    else:
        kept = lowering.selections
    mask, score, gate_k, gate_v, gate_logit, sink = expressions
    tensors = _tensors(expressions, kept)
    needed = {spec.name for spec in tensors} | {selection.scores for selection in kept}
    return Program(
        *(mask, score, gate_k, gate_v, gate_logit),
        selections=tuple(kept),
        tensors=tensors,
        tables=tuple(lowering.tables),
        head_groups=tuple(sorted(lowering.head_groups)),
        idle=tuple(sorted(_mentioned(node) - needed)),
        sink=sink,
    )


def _mentioned(node: Node) -> set[str]:
    """The names under which the pattern asks for tensors."""
    names = {n.tensor.name for n in walk(node) if isinstance(n, Load)}
    for selection in (n for n in walk(node) if isinstance(n, SelectionNode)):
        names |= {name for name in (selection.scores, selection.segments) if name is not None}
    return names


def _renumbered(
    expressions: list[Node], selections: list[SelectionNode], used: set[int]
) -> tuple[list[Node], list[SelectionNode]]:
    """Drop selections that simplification removed, so that nothing is computed for them."""
    order = sorted(used)

    def renumber(node: Node) -> Node:
        if isinstance(node, Selected):
            return Selected(order.index(node.number))
        if isinstance(node, Gate):
            return Gate(order.index(node.number), node.through, node.capped)
        return rebuild(node, tuple(renumber(child) for child in node.children))

    return [renumber(e) for e in expressions], [selections[n] for n in order]


def _tensors(expressions: list[Node], selections: list[SelectionNode]) -> tuple[TensorSpec, ...]:
    """The captured tensors in order of first use, each declared in one way only."""
    specs: dict[str, TensorSpec] = {}
    for node in (n for e in expressions for n in walk(e)):
        if isinstance(node, Load) and not node.tensor.name.startswith("table_"):
            spec = specs.setdefault(node.tensor.name, node.tensor)
            if spec != node.tensor:
                raise CapturedError(
                    f"captured tensor {spec.name!r}",
                    got=f"two declarations, dims={spec.dims} and dims={node.tensor.dims}, or other options",
                    expected="one declaration for each name",
                    mend="Give one of them another name.",
                )
    for selection in selections:
        if selection.scores in specs:
            raise CapturedError(
                f"scores={selection.scores!r}",
                got="a name that is also a captured tensor",
                expected="a tensor of its own for the scores of a selection",
                mend="Give the captured tensor or the scores another name.",
            )
        name = selection.segments
        if name is not None:
            spec = specs.setdefault(name, TensorSpec(name, ("b", "s")))
            if spec.kind is not Kind.INT or spec.dims not in (("b", "s"), ("s",)):
                raise CapturedError(
                    f"segments={name!r}",
                    got=f"a captured tensor with dims={spec.dims}, {spec.kind.value}",
                    expected='integers with dims ("b", "s") or ("s",)',
                )
    return tuple(specs.values())
