"""Every rule is proved by evaluating both sides on small integers, reals and booleans; simplify is idempotent."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given

from flexsparse.ir.nodes import FALSE, OPERATIONS, TRUE, Apply, Constant, Kind, Load, Node, Symbol, TensorSpec, walk
from flexsparse.ir.simplify import FOLD, RULES, simplify
from tests.language.strategies import INDICES, MASKS

Number = int | float | bool


def variable(name: str, kind: Kind) -> Load:
    """A free variable of any kind: a look-up that the evaluation below answers from its table."""
    return Load(TensorSpec(name, ("s",), kind), (Symbol("kv"),))


M, N = variable("m", Kind.BOOL), variable("n", Kind.BOOL)
X, Y = variable("x", Kind.INT), variable("y", Kind.INT)
R = variable("r", Kind.REAL)


def evaluate(node: Node, values: Mapping[str, Number]) -> Number:
    """The node by Python's own meaning of every operation."""
    match node:
        case Constant(value):
            return value
        case Load(tensor):
            return values[tensor.name]
        case Apply(op, args):
            result = FOLD[op](*(evaluate(a, values) for a in args))
            # Python's choice of an operand keeps its type; a node of kind REAL is real whatever was chosen.
            return float(result) if node.kind is Kind.REAL else result
    raise AssertionError(node)


def same(left: Number, right: Number) -> bool:
    """Equal values of equal type, NaN included; the sign of a zero is not compared."""
    return type(left) is type(right) and (left == right or (left != left and right != right))


# For each rule, left-hand sides on which it must fire.
LEFT: dict[str, list[Apply]] = {
    "True & x -> x": [Apply("and", (TRUE, M))],
    "x & True -> x": [Apply("and", (M, TRUE))],
    "False & x -> False": [Apply("and", (FALSE, M)), Apply("and", (M, FALSE))],
    "x & y & x -> x & y": [
        Apply("and", (M, M)),
        Apply("and", (Apply("and", (M, N)), M)),
        Apply("and", (M, Apply("and", (N, M)))),
    ],
    "x & (x | y) -> x": [Apply("and", (M, Apply("or", (M, N)))), Apply("and", (Apply("or", (N, M)), M))],
    "x & ~x -> False": [Apply("and", (M, Apply("not", (M,)))), Apply("and", (Apply("not", (M,)), M))],
    "False | x -> x": [Apply("or", (FALSE, M))],
    "x | False -> x": [Apply("or", (M, FALSE))],
    "True | x -> True": [Apply("or", (TRUE, M)), Apply("or", (M, TRUE))],
    "x | y | x -> x | y": [
        Apply("or", (M, M)),
        Apply("or", (Apply("or", (M, N)), M)),
        Apply("or", (M, Apply("or", (N, M)))),
    ],
    "x | (x & y) -> x": [Apply("or", (M, Apply("and", (M, N)))), Apply("or", (Apply("and", (N, M)), M))],
    "x | ~x -> True": [Apply("or", (M, Apply("not", (M,)))), Apply("or", (Apply("not", (M,)), M))],
    "x ^ x -> False": [Apply("xor", (M, M))],
    "x ^ False -> x": [Apply("xor", (M, FALSE))],
    "False ^ x -> x": [Apply("xor", (FALSE, M))],
    "x ^ True -> ~x": [Apply("xor", (M, TRUE))],
    "True ^ x -> ~x": [Apply("xor", (TRUE, M))],
    "~~x -> x": [Apply("not", (Apply("not", (M,)),))],
    "x + 0 -> x": [Apply("add", (X, Constant(0))), Apply("add", (R, Constant(0))), Apply("add", (R, Constant(0.0)))],
    "0 + x -> x": [Apply("add", (Constant(0), X)), Apply("add", (Constant(0.0), R))],
    "x - 0 -> x": [Apply("sub", (X, Constant(0))), Apply("sub", (R, Constant(0.0)))],
    "x * 1 -> x": [Apply("mul", (X, Constant(1))), Apply("mul", (R, Constant(1))), Apply("mul", (R, Constant(1.0)))],
    "1 * x -> x": [Apply("mul", (Constant(1), X)), Apply("mul", (Constant(1.0), R))],
    "--x -> x": [Apply("neg", (Apply("neg", (X,)),)), Apply("neg", (Apply("neg", (R,)),))],
    "where(True, x, y) -> x": [Apply("where", (TRUE, X, Y)), Apply("where", (TRUE, R, X))],
    "where(False, x, y) -> y": [Apply("where", (FALSE, X, Y)), Apply("where", (FALSE, X, R))],
    "where(m, x, x) -> x": [Apply("where", (M, X, X)), Apply("where", (M, R, R))],
    "minimum(x, x) -> x": [Apply("minimum", (X, X)), Apply("minimum", (R, R))],
    "maximum(x, x) -> x": [Apply("maximum", (X, X)), Apply("maximum", (R, R))],
}
RULE_LIST = [(op, text, rule) for op, rules in RULES.items() for text, rule in rules]
WORLDS = [
    {"m": m, "n": n, "x": x, "y": y, "r": r}
    for m, n, x, y, r in itertools.product(
        (True, False), (True, False), range(-3, 4), (-2, 0, 5), (-1.5, -1.0, 0.0, 0.25, 1.0, math.inf)
    )
]


def test_every_rule_has_a_left_side_here() -> None:
    assert set(LEFT) == {text for _, text, _ in RULE_LIST}


@pytest.mark.parametrize(("op", "text", "rule"), RULE_LIST, ids=[t for _, t, _ in RULE_LIST])
def test_rule_fires_and_changes_no_value_and_no_kind(op: str, text: str, rule: Any) -> None:
    for left in LEFT[text]:
        assert left.op == op
        right = rule(left.args)
        assert right is not None, f"{text} does not fire on {left}"
        assert right.kind is left.kind
        for world in WORLDS:
            assert same(evaluate(left, world), evaluate(right, world)), f"{text} in {world}"


def trees(op: str, atoms: dict[Kind, list[Node]]) -> list[Apply]:
    """Every application of ``op`` to small arguments of the kinds it takes."""
    booleans = op in ("and", "or", "xor", "not")
    numbers = atoms[Kind.INT] + ([] if op in ("floordiv", "mod", "truncdiv", "truncmod") else atoms[Kind.REAL])
    pools = [atoms[Kind.BOOL] if booleans else numbers] * OPERATIONS[op].arity
    if op == "where":
        pools[0] = atoms[Kind.BOOL]
    return [Apply(op, args) for args in itertools.product(*pools)]


ATOMS: dict[Kind, list[Node]] = {
    Kind.BOOL: [M, N, TRUE, FALSE, Apply("not", (M,)), Apply("and", (M, N)), Apply("or", (N, M)), Apply("lt", (X, Y))],
    Kind.INT: [X, Y, Constant(0), Constant(1), Constant(-1), Apply("neg", (X,)), Apply("add", (X, Constant(0)))],
    Kind.REAL: [R, Constant(0.0), Constant(1.0), Constant(-0.5), Apply("mul", (Constant(1.0), R))],
}


@pytest.mark.parametrize("op", RULES)
def test_no_rule_fires_wrongly_on_any_small_tree(op: str) -> None:
    worlds = WORLDS[::7]
    for left in trees(op, ATOMS):
        right = simplify(left)
        assert right.kind is left.kind, left
        assert simplify(right) == right, left
        assert sum(1 for _ in walk(right)) <= sum(1 for _ in walk(left)), left
        for world in worlds:
            assert same(evaluate(left, world), evaluate(right, world)), (left, world)


FOLDED: list[tuple[str, tuple[Number, ...], Number]] = [
    ("floordiv", (-7, 2), -4),
    ("mod", (-7, 2), 1),
    ("mod", (7, -2), -1),
    ("truncdiv", (-7, 2), -3),
    ("truncdiv", (7, -2), -3),
    ("truncdiv", (-7, -2), 3),
    ("truncmod", (-7, 2), -1),
    ("truncmod", (7, -2), 1),
    ("div", (1, 2), 0.5),
    ("floor", (-0.5,), -1),
    ("add", (1, 2), 3),
    ("add", (1, 2.0), 3.0),
    ("minimum", (1, 2.0), 1.0),
    ("where", (True, 1, 2.0), 1.0),
    ("exp2", (3,), 8.0),
    ("lt", (1, 2), True),
    ("not", (True,), False),
    ("sigmoid", (0,), 0.5),
    ("abs", (-3,), 3),
    ("neg", (2,), -2),
]


@pytest.mark.parametrize(("op", "args", "wanted"), FOLDED, ids=[f"{o}{a}" for o, a, _ in FOLDED])
def test_constants_fold_by_pythons_rules(op: str, args: tuple[Number, ...], wanted: Number) -> None:
    node = simplify(Apply(op, tuple(Constant(a) for a in args)))
    assert isinstance(node, Constant)
    assert same(node.value, wanted)


@pytest.mark.parametrize(
    "node",
    [
        Apply("floordiv", (Constant(1), Constant(0))),
        Apply("mod", (Constant(1), Constant(0))),
        Apply("truncdiv", (Constant(1), Constant(0))),
        Apply("log", (Constant(0),)),
        Apply("sqrt", (Constant(-1.0),)),
        Apply("exp", (Constant(1e6),)),
        Apply("floor", (Constant(math.inf),)),
        Apply("sigmoid", (Constant(-1e6),)),
    ],
    ids=lambda n: n.op,
)
def test_what_python_refuses_stays_as_it_is(node: Apply) -> None:
    assert simplify(node) == node


def test_every_operation_folds() -> None:
    assert set(FOLD) == set(OPERATIONS)


@given(MASKS)
def test_simplify_is_idempotent_on_masks(mask: Any) -> None:
    once = simplify(mask.node)
    assert simplify(once) == once


@given(INDICES)
def test_simplify_keeps_the_kind_of_numbers(number: Any) -> None:
    assert simplify(number.node).kind is number.node.kind
