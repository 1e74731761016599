"""Questions about patterns or their text, answered with a reason: equivalent, implies, is_causal, depends_on; simplify.

Canonical forms are compared first, then small sizes are searched for a counterexample, and then z3, where it is
installed, decides for every size. An answer that none of them gives is None.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from flexsparse.analysis.decide import Boxes, box_bounds
from flexsparse.analysis.solver import Encoder, UnsupportedError
from flexsparse.analysis.tiles import Sizes, region_of
from flexsparse.errors import ExpressionError, SettingError
from flexsparse.expression import Expression, Pattern, wrap
from flexsparse.ir import nodes
from flexsparse.ir.canonical import canonical
from flexsparse.ir.lower import lower
from flexsparse.ir.nodes import (
    FALSE,
    INDEX_SYMBOLS,
    SIZE_SYMBOLS,
    Apply,
    Constant,
    Load,
    Node,
    Opaque,
    Scalar,
    Symbol,
    walk,
)
from flexsparse.ir.program import Chosen, Program, Selected
from flexsparse.ir.scalars import without_defaults
from flexsparse.parser import parse
from flexsparse.verdict import Verdict

E = TypeVar("E", bound=Expression)

# z3 gives up after this many milliseconds.
_PATIENCE = 5000
_SMALL = (1, 2, 7, 40)
_ALTERNATIVES = 64


def simplify(pattern: E) -> E:
    """The canonical form: comparisons as sums against a constant, what is redundant removed.

    Selections, scores and sinks stay as they are; the masks inside them are simplified.
    """
    return wrap(canonical(pattern.node))  # type: ignore[return-value]


def implies(a: Pattern | str, b: Pattern | str) -> Verdict:
    """Whether every pair (q, kv) that ``a`` lets through, ``b`` lets through, at every size and for all tensors."""
    first, second = _program(a), _program(b)
    other = _shifted(second.mask, len(first.selections))
    # Each alternative alone is one that canonical forms tell more of.
    if all(canonical(_passed_by(part, other)) == FALSE for part in _alternatives(_widened(first))):
        return Verdict(True, "the canonical forms agree")
    return _answer(first, second, _passed_by, "the first lets {at} through and the second does not")


def _passed_by(first: Node, second: Node) -> Node:
    """What the first mask lets through and the second does not."""
    return Apply("and", (first, Apply("not", (second,))))


def equivalent(a: Pattern | str, b: Pattern | str) -> Verdict:
    """Whether the masks of ``a`` and ``b`` are equal at every size and for all tensors.

    Scores, gates and sinks are not compared; where the sinks differ, the reason says so.
    """
    first, second = _program(a), _program(b)
    verdict = _answer(first, second, lambda x, y: Apply("xor", (x, y)), "the two differ at {at}")
    if verdict.holds and canonical(first.sink) != canonical(second.sink):
        return Verdict(True, f"{verdict.reason}; this is of the masks, the sinks differ")
    return verdict


def is_causal(pattern: Pattern | str) -> Verdict:
    """Whether no query sees a later key."""
    after = Pattern(Apply("le", (Symbol("kv"), Symbol("q"))))
    verdict = implies(pattern, after)
    if verdict.holds is False:
        return Verdict(False, f"a query sees a later key: {verdict.reason}", verdict.counterexample)
    return Verdict(verdict.holds, verdict.reason if verdict.holds is None else "no query sees a later key")


def depends_on(pattern: Pattern | str, name: str) -> Verdict:
    """Whether the mask of ``pattern`` can change with "b", "h", "q", "kv", a size, a captured tensor or a scalar."""
    program = _program(pattern)
    tensors = {spec.name for spec in program.tensors}
    scores = {s.scores for s in program.selections}
    given = {*tensors, *scores, *(scalar.name for scalar in program.scalars)}
    if name not in (*INDEX_SYMBOLS, *SIZE_SYMBOLS, *given):
        known = ", ".join((*INDEX_SYMBOLS, *SIZE_SYMBOLS, *sorted(given)))
        raise SettingError("depends_on(name)", got=repr(name), expected=f"one of {known}")
    mask = canonical(program.mask)
    found = [n for n in walk(mask) if _touches(n, name, program)]
    if not found:
        return Verdict(False, f"{name} does not occur in {_shown(mask)}")
    return Verdict(True, f"{name} occurs in {_shown(mask)}")


def _touches(node: Node, name: str, program: Program) -> bool:
    match node:
        case Symbol(symbol):
            return symbol == name
        case Load(spec, _):
            return spec.name == name
        case Scalar(scalar):
            return scalar == name
        case Opaque():
            return name in INDEX_SYMBOLS
        case Selected(number):
            selection = program.selections[number]
            counts = {n.name for n in walk(selection) if isinstance(n, Scalar)}
            return name in (*INDEX_SYMBOLS, selection.scores, selection.segments, *counts)
    return False


def _shown(mask: Node) -> str:
    from flexsparse.ir.program import program_text

    return program_text(mask)


def _program(pattern: Pattern | str) -> Program:
    expression = parse(pattern) if isinstance(pattern, str) else pattern
    if not isinstance(expression, Expression):
        raise ExpressionError("pattern", got=type(pattern).__name__, expected="a pattern or its text")
    # Numbers that a call gives are unknown here, whatever their defaults.
    return lower(without_defaults(expression.node))


def _answer(a: Program, b: Program, wrong: Callable[[Node, Node], Node], verb: str) -> Verdict:
    """Whether ``wrong(a, b)`` can never hold."""
    selections = a.selections + b.selections
    right = _shifted(b.mask, len(a.selections))
    bad = canonical(wrong(a.mask, right))
    if bad == FALSE or canonical(a.mask) == canonical(right):
        return Verdict(True, "the canonical forms agree")
    free = not any(isinstance(n, Load | Selected | Chosen | Opaque | Scalar) for n in walk(bad))
    if free:
        example = _search(bad)
        if example is not None:
            return _refuted(example, bad, verb)
    return _solve(bad, selections, verb)


def _shifted(mask: Node, by: int) -> Node:
    if isinstance(mask, Selected):
        return Selected(mask.number + by)
    return nodes.rebuild(mask, tuple(_shifted(c, by) for c in mask.children))


def _widened(program: Program) -> Node:
    """A mask that lets through all that the program's does, and every candidate of its selections."""
    known: dict[Node, Node] = {}
    for number, selection in enumerate(program.selections):
        after = selection.after if isinstance(selection.after, Node) else Constant(selection.after)
        # No mask stands around a selection but "and" and "or".
        known[Selected(number)] = Apply("le", (Symbol("kv"), Apply("sub", (Symbol("q"), after))))
    return nodes.replaced(program.mask, known)


def _alternatives(mask: Node) -> list[Node]:
    """Masks of which any lets through what ``mask`` does; ``mask`` alone where they would be many."""
    match mask:
        case Apply("or", args):
            return [part for arg in args for part in _alternatives(arg)]
        case Apply("and", args):
            parts = [_alternatives(arg) for arg in args]
            if math.prod(map(len, parts)) <= _ALTERNATIVES:
                return [Apply("and", each) for each in itertools.product(*parts)]
    return [mask]


def _refuted(example: dict[str, int], bad: Node, verb: str) -> Verdict:
    kept = {n: v for n, v in example.items() if n not in SIZE_SYMBOLS or nodes.mentions(bad, n)}
    at = ", ".join(f"{name}={value}" for name, value in kept.items())
    return Verdict(False, verb.format(at=f"({at})"), kept)


def _search(bad: Node) -> dict[str, int] | None:
    """A pair at which the mask holds, among all pairs of a few small sizes."""
    for length in _SMALL:
        heads = 3 if nodes.depends_on(bad, "h", "heads") else 1
        sizes = Sizes(1, heads, length, length)
        axes = (torch.arange(n) for n in (1, heads, length, length))
        b, h, q, kv = (x.flatten() for x in torch.meshgrid(*axes, indexing="ij"))
        region = region_of(sizes, {}, 1, list(range(heads)), length, torch.device("cpu"))
        found = box_bounds(bad, Boxes(b, h, q, q, kv, kv), region).low.nonzero().flatten()
        if len(found):
            first = int(found[0])
            example = {"b": int(b[first]), "h": int(h[first]), "q": int(q[first]), "kv": int(kv[first])}
            return example | {"q_len": length, "kv_len": length, "heads": heads}
    return None


def _solve(bad: Node, selections: tuple[Any, ...], verb: str) -> Verdict:
    try:
        encoder = Encoder()
        claim = encoder.encode(bad, selections)
    except UnsupportedError as error:
        return Verdict(None, f"unknown: no counterexample at small sizes, and {error}")
    z3 = encoder.z3
    solver = z3.Solver()
    solver.set("timeout", _PATIENCE)
    solver.add(*encoder.facts, claim)
    answer = solver.check()
    if answer == z3.unsat:
        return Verdict(True, "z3 proved it for every size")
    if answer == z3.sat and encoder.chosen:
        # Scores of -inf can keep any key from being selected, so such a counterexample is real.
        solver.add(*(z3.Not(c) for c in encoder.chosen))
        if solver.check() != z3.sat:
            return Verdict(None, "unknown: it turns on which keys the scores select")
    if answer == z3.unknown:
        return Verdict(None, f"unknown: z3 gave up ({solver.reason_unknown()})")
    model = solver.model()
    example = {}
    for name in itertools.chain(INDEX_SYMBOLS, SIZE_SYMBOLS):
        value = model.eval(encoder.symbol(name), model_completion=True)
        example[name] = value.as_long()
    for name, scalar in encoder.scalars.items():
        value = model.eval(scalar, model_completion=True)
        example[name] = value.as_long() if z3.is_int(scalar) else float(value.as_fraction())
    if not encoder.faithful:
        where = ", ".join(f"{n}={example[n]}" for n in INDEX_SYMBOLS)
        return Verdict(None, f"unknown: it may fail at ({where}), which depends on what z3 does not model")
    return _refuted(example, bad, verb)
