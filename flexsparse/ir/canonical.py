"""The canonical form of masks: integer comparisons as sorted sums against a constant, sets of operands in order.

Two masks with the same canonical form are equal; the converse does not hold. Sums and products of integers are
sympy's work; what sympy does not know (floor division, look-ups, minimum, ...) stands in them as a symbol.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping

import sympy

from flexsparse.ir.nodes import COMPARISONS, FALSE, TRUE, Apply, Constant, Kind, Named, Node, is_plain, rebuild
from flexsparse.ir.program import program_text
from flexsparse.ir.simplify import simplify

_POLYNOMIAL = ("add", "sub", "mul", "neg")
_NEGATED = {"eq": "ne", "ne": "eq", "le": "gt", "gt": "le", "lt": "ge", "ge": "lt"}


@functools.lru_cache(maxsize=4096)
def canonical(node: Node) -> Node:
    """The canonical form of a mask or an index expression; patterns keep their selections and scores."""
    if isinstance(node, Named):
        return canonical(node.body)
    if node.kind is Kind.BOOL and not is_plain(node):
        # The rules are for masks: p & p applies a score twice, and False & p keeps its sink.
        return rebuild(node, tuple(canonical(c) for c in node.children))
    node = simplify(node)
    if isinstance(node, Named):
        return canonical(node.body)
    if isinstance(node, Apply) and node.kind is Kind.BOOL:
        return _canonical_mask(node)
    if node.kind is Kind.INT and isinstance(node, Apply):
        return _from_sum(_Terms(node).expanded())
    return rebuild(node, tuple(canonical(c) for c in node.children))


def _canonical_mask(node: Apply) -> Node:
    if node.op in ("and", "or"):
        operands = {o for arg in node.args for o in _chain(node.op, canonical(arg))}
        return _joined(node.op, operands)
    if node.op == "not":
        return _negation(canonical(node.args[0]))
    if node.op == "xor":
        left, right = sorted((canonical(a) for a in node.args), key=program_text)
        return simplify(Apply("xor", (left, right)))
    if node.op in COMPARISONS and all(a.kind is Kind.INT for a in node.args):
        return _comparison(node.op, *node.args)
    return rebuild(node, tuple(canonical(c) for c in node.children))


def _chain(op: str, node: Node) -> list[Node]:
    if isinstance(node, Apply) and node.op == op:
        return [x for arg in node.args for x in _chain(op, arg)]
    return [node]


def _joined(op: str, operands: set[Node]) -> Node:
    """Operands without duplicates, complements, absorbed ones or weaker bounds, in the order of their text."""
    neutral, absorbing = (TRUE, FALSE) if op == "and" else (FALSE, TRUE)
    operands = {o for o in operands if o != neutral}
    negations = {o: _negation(o) for o in operands if o != absorbing}
    if absorbing in operands or not operands.isdisjoint(negations.values()) or _opposed(op, negations):
        return absorbing
    operands = _tightest(op, operands)
    other = "or" if op == "and" else "and"
    kept = [o for o in operands if not any(p != o and p in _chain(other, o) for p in operands)]
    if not kept:
        return neutral
    ordered = sorted(kept, key=program_text)
    result = ordered[0]
    for operand in ordered[1:]:
        result = Apply(op, (result, operand))
    return result


def _tightest(op: str, operands: set[Node]) -> set[Node]:
    """Of ``sum <= c`` with one sum keep the least c under &, the greatest under |."""
    bounds: dict[Node, int] = {}
    rest = set()
    choose = min if op == "and" else max
    for operand in operands:
        bound = _bound(operand)
        if bound is None:
            rest.add(operand)
        else:
            total, c = bound
            bounds[total] = choose(c, bounds.get(total, c))
    return rest | {Apply("le", (total, Constant(c))) for total, c in bounds.items()}


def _opposed(op: str, negations: Mapping[Node, Node]) -> bool:
    """Whether two bounds, on a sum and on its negative, leave nothing under &, everything under |.

    ``negations``: the operands with theirs.
    """
    bounds = [(operand, bound) for operand in negations if (bound := _bound(operand)) is not None]
    for operand, _ in bounds:
        least = _bound(negations[operand])
        for _, (total, c) in bounds:
            if least is not None and total == least[0] and (c <= least[1] if op == "and" else c >= least[1]):
                return True
    return False


def _bound(node: Node) -> tuple[Node, int] | None:
    """The sum and c of ``sum <= c`` of integers, None for anything else."""
    match node:
        case Apply("le", (total, Constant(c))) if all(arg.kind is Kind.INT for arg in node.args):
            return total, int(c)
    return None


def _negation(node: Node) -> Node:
    """The canonical form of ~node, node being canonical: De Morgan, and comparisons turned round."""
    match node:
        case Constant(value):
            return Constant(not value)
        case Apply("not", (inner,)):
            return inner
        case Apply("and" | "or", _):
            other = "or" if node.op == "and" else "and"
            return _joined(other, {_negation(o) for o in _chain(node.op, node)})
        case Apply(op, args) if op in COMPARISONS and all(a.kind is Kind.INT for a in args):
            return _comparison(_NEGATED[op], *args)
    return Apply("not", (node,))


def _comparison(op: str, left: Node, right: Node) -> Node:
    """``sum <= c``, ``sum == 0`` or its negation, coefficients without a common divisor."""
    if op in ("lt", "gt", "ge"):
        left, right = (right, left) if op in ("gt", "ge") else (left, right)
        # x < y is x + 1 <= y for integers.
        return _comparison("le", Apply("add", (left, Constant(1))) if op in ("lt", "gt") else left, right)
    terms = _Terms(Apply("sub", (left, right)))
    expanded = terms.expanded()
    constant = int(expanded.constant)
    if not expanded.coefficients:
        return Constant({"le": constant <= 0, "eq": constant == 0, "ne": constant != 0}[op])
    divisor = math.gcd(*expanded.coefficients.values())
    if op == "le":
        # sum + constant <= 0 and every coefficient a multiple of the divisor.
        bound = -constant // divisor
        return Apply("le", (_sum(expanded.scaled(divisor)), Constant(bound)))
    if constant % divisor:
        return Constant(op == "ne")
    scaled = expanded.scaled(divisor)
    first = next(iter(sorted(scaled, key=program_text)))
    if scaled[first] < 0:
        scaled, constant = {k: -v for k, v in scaled.items()}, -constant
    equal = Apply("eq", (_sum(scaled), Constant(-constant // divisor)))
    return equal if op == "eq" else Apply("not", (equal,))


class _Expanded:
    """An integer expression as a sum: coefficients of products of opaque terms, and a constant."""

    def __init__(self, coefficients: dict[Node, int], constant: int) -> None:
        self.coefficients = coefficients
        self.constant = constant

    def scaled(self, divisor: int) -> dict[Node, int]:
        return {node: c // divisor for node, c in self.coefficients.items()}


class _Terms:
    """Hands sums and products to sympy, with symbols for everything else."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.symbols: dict[Node, sympy.Symbol] = {}

    def symbol(self, node: Node) -> sympy.Symbol:
        return self.symbols.setdefault(node, sympy.Symbol(f"t{len(self.symbols)}", integer=True))

    def translate(self, node: Node) -> sympy.Expr:
        match node:
            case Constant(value):
                return sympy.Integer(int(value))
            case Named(_, _, body):
                return self.translate(body)
            case Apply(op, args) if op in _POLYNOMIAL:
                parts = [self.translate(a) for a in args]
                if op == "neg":
                    return -parts[0]
                return {"add": parts[0] + parts[-1], "sub": parts[0] - parts[-1], "mul": parts[0] * parts[-1]}[op]
        return self.symbol(rebuild(node, tuple(canonical(c) for c in node.children)))

    def expanded(self) -> _Expanded:
        total = sympy.expand(self.translate(self.node))
        names = {symbol: node for node, symbol in self.symbols.items()}
        coefficients: dict[Node, int] = {}
        constant = 0
        for product, coefficient in total.as_coefficients_dict().items():
            if product == 1:
                constant = int(coefficient)
                continue
            factors = sorted((names[f] for f in _factors(product)), key=program_text)
            node = factors[0]
            for factor in factors[1:]:
                node = Apply("mul", (node, factor))
            coefficients[node] = int(coefficient)
        return _Expanded(coefficients, constant)


def _factors(product: sympy.Expr) -> list[sympy.Symbol]:
    result = []
    for factor in sympy.Mul.make_args(product):
        base, power = factor.as_base_exp()
        result += [base] * int(power)
    return result


def _sum(coefficients: dict[Node, int]) -> Node:
    """The sum in the order of its terms' text, positive ones first, so that it reads like q - kv."""
    ordered = sorted(coefficients.items(), key=lambda item: (item[1] < 0, program_text(item[0])))
    result: Node | None = None
    for node, coefficient in ordered:
        term = node if abs(coefficient) == 1 else Apply("mul", (Constant(abs(coefficient)), node))
        if result is None:
            result = term if coefficient > 0 else Apply("neg", (term,))
        else:
            result = Apply("add" if coefficient > 0 else "sub", (result, term))
    assert result is not None
    return result


def _from_sum(expanded: _Expanded) -> Node:
    if not expanded.coefficients:
        return Constant(expanded.constant)
    result = _sum(expanded.coefficients)
    if expanded.constant:
        op = "add" if expanded.constant > 0 else "sub"
        result = Apply(op, (result, Constant(abs(expanded.constant))))
    return result
