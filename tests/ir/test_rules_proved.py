"""Every simplification rule, as its text states it, proved by z3 for all values; brute force is in test_simplify."""

from __future__ import annotations

import re
from typing import Any

import pytest

import flexsparse as fs
from flexsparse.analysis.solver import Encoder
from flexsparse.ir.simplify import RULES
from flexsparse.language import captured

z3: Any = pytest.importorskip("z3")

STATED = [text for rules in RULES.values() for text, _ in rules]
# Which letters stand for masks, and which for numbers, by the operator that they stand beside.
KINDS = {"int": "int", "real": "float"}


def is_logical(rule: str) -> bool:
    return bool(re.search(r"[&|^~]", rule))


def encoded(rule: str, dtype: str, encoder: Encoder) -> tuple[Any, Any]:
    """Both sides of a rule, its letters read as unknown tensors at kv."""
    letters = {"some_m": captured("some_m", dims=("s",), dtype="bool")}
    for name in ("some_x", "some_y"):
        letters[name] = captured(name, dims=("s",), dtype="bool" if is_logical(rule) else dtype)
    sides = []
    for side in rule.split(" -> "):
        text = re.sub(r"\b([mxy])\b", r"some_\1[kv]", side)
        if text in ("True", "False"):
            sides.append(z3.BoolVal(text == "True"))
        else:
            sides.append(encoder.encode(fs.parse(text, letters).node))
    return sides[0], sides[1]


def proved(left: Any, right: Any) -> bool:
    solver = z3.Solver()
    if z3.is_arith(left) and left.sort() != right.sort():
        left, right = (z3.ToReal(x) if z3.is_int(x) else x for x in (left, right))
    solver.add(left != right)
    return bool(solver.check() == z3.unsat)


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("rule", STATED)
def test_rule_holds_for_every_value(rule: str, dtype: str) -> None:
    assert proved(*encoded(rule, KINDS[dtype], Encoder())), rule


def test_a_wrong_rule_is_not_proved() -> None:
    for wrong in ("x & True -> y", "x | ~x -> False", "x - 0 -> y"):
        assert not proved(*encoded(wrong, "int", Encoder())), wrong
