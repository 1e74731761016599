"""For each tile of queries, which keys may be seen and which must be: masks solved for kv, row by row.

A comparison is solved for kv where one side is a monotone function of kv (kv, kv // m, c * kv + d, or a sorted
captured tensor at kv) and the rest does not depend on kv. Whatever cannot be solved is "may be anything", and
the tiles that it leaves open are decided one by one elsewhere. Work grows with the number of query tiles.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flexsparse.analysis import intervals
from flexsparse.analysis.bounds import bounds
from flexsparse.analysis.intervals import Intervals, everything, nothing
from flexsparse.analysis.loads import searched
from flexsparse.analysis.region import Bounds, Region
from flexsparse.ir.nodes import (
    COMPARISONS,
    Apply,
    Constant,
    Kind,
    Load,
    Node,
    Symbol,
    TensorSpec,
    depends_on,
    mentions,
    walk,
)
from flexsparse.ir.program import Selected


@dataclass(frozen=True)
class Rows:
    """Keys that some query of the range may see, and keys that every query of it sees: [2, B, H, R, M].

    ``solved`` is False where a part of the mask could not be solved for kv. Where it holds, the rows of ranges of
    one query are exact: both sets are the keys that it sees.
    """

    keys: Intervals
    solved: bool

    @property
    def may(self) -> Intervals:
        return self._side(0)

    @property
    def must(self) -> Intervals:
        return self._side(1)

    def _side(self, number: int) -> Intervals:
        if self.keys.low.dim() == 1:
            return self.keys
        return Intervals(self.keys.low[number], self.keys.high[number], self.keys.size)


def rows(mask: Node, region: Region) -> Rows:
    """The rows of a flattened mask; the region's q ranges are [1, 1, R], b [B, 1, 1] and h [1, H, 1]."""
    return _Solver(region).mask(mask)


_SWAPPED = {"lt": "gt", "gt": "lt", "le": "ge", "ge": "le", "eq": "eq"}
# Between integers x < y is x <= y - 1, and x > y is x >= y + 1.
_LOOSE = {"lt": ("le", -1), "gt": ("ge", 1)}


class _Solver:
    """Every set is one array for both "may" and "must", [2, B, H, R, M], or [M] where it is known everywhere."""

    def __init__(self, region: Region) -> None:
        self.region = region
        self.size = region.sizes["kv_len"]
        self.all = everything(self.size, region.device)
        self.none = nothing(self.size, region.device)

    def mask(self, node: Node) -> Rows:
        if isinstance(node, Constant):
            return Rows(self.all if node.value else self.none, True)
        if not _mentions_kv(node):
            return self.without_kv(node)
        if isinstance(node, Apply):
            match node.op, node.args:
                case "and", (a, b):
                    return self.both(self.mask(a), self.mask(b))
                case "or", _:
                    return self.either([self.mask(part) for part in _chain("or", node)])
                case "not", (a,):
                    return self.negated(self.mask(a))
                case "xor", (a, b):
                    return self.xor(self.mask(a), self.mask(b))
                case op, (a, b) if op in COMPARISONS:
                    return self.comparison(op, a, b)
        return self.open()

    def open(self) -> Rows:
        low, high = (
            torch.stack((one, other)).reshape(2, 1, 1, 1, 1)
            for one, other in ((self.all.low, self.none.low), (self.all.high, self.none.high))
        )
        return Rows(Intervals(low, high, self.size), False)

    def without_kv(self, node: Node) -> Rows:
        found = _in_rows(bounds(node, self.region))
        return Rows(intervals.where(_both_sides(found.high, found.low), self.all), True)

    def both(self, a: Rows, b: Rows) -> Rows:
        return Rows(a.keys & b.keys, a.solved and b.solved)

    def either(self, parts: list[Rows]) -> Rows:
        return Rows(intervals.union([part.keys for part in parts]), all(part.solved for part in parts))

    def negated(self, a: Rows) -> Rows:
        hidden = ~a.keys
        if hidden.low.dim() > 1:
            hidden = Intervals(hidden.low.flip(0), hidden.high.flip(0), self.size)
        return Rows(hidden, a.solved)

    def xor(self, a: Rows, b: Rows) -> Rows:
        return self.either([self.both(a, self.negated(b)), self.both(self.negated(a), b)])

    def comparison(self, op: str, left: Node, right: Node) -> Rows:
        rewritten = _rewritten(op, left, right)
        if rewritten is not None:
            return self.mask(rewritten)
        if op == "ne":
            return self.negated(self.comparison("eq", left, right))
        if left.kind is not Kind.INT or right.kind is not Kind.INT:
            return self.open()
        # Bring everything that depends on kv to the left: f(kv) op rest.
        with_kv, rest = _separated(left, right)
        if len(with_kv) != 1:
            return self.open()
        sign, function = with_kv[0]
        op = op if sign > 0 else _SWAPPED[op]
        op, more = _LOOSE.get(op, (op, 0))
        values = _in_rows(self.total(rest, -sign, more))
        # Now f(kv) op value, the value lying in its bounds over the queries of the range.
        if op == "eq":
            return self.equal(function, values)
        ends = (values.high, values.low) if op == "le" else (values.low, values.high)
        keys = self.solve(function, op, _both_sides(*ends))
        return self.open() if keys is None else Rows(keys, True)

    def equal(self, function: Node, values: Bounds) -> Rows:
        below, above = self.solve(function, "le", values.high), self.solve(function, "ge", values.low)
        if below is None or above is None:
            return self.open()
        may = below & above
        must = intervals.where(values.low == values.high, may)
        return Rows(Intervals(_both_sides(may.low, must.low), _both_sides(may.high, must.high), self.size), True)

    def total(self, terms: list[tuple[int, Node]], sign: int, more: int) -> Bounds:
        """The sum of the terms times ``sign``, plus ``more``."""
        ends: tuple[Tensor, Tensor] | None = None
        for own, term in terms:
            positive = own == sign
            known = self.number(term)
            if known is not None:
                more += known if positive else -known
                continue
            found = bounds(term, self.region)
            here = (found.low, found.high) if positive else (-found.high, -found.low)
            ends = here if ends is None else (ends[0] + here[0], ends[1] + here[1])
        if ends is None:
            value = torch.tensor(more, device=self.region.device)
            return Bounds(value, value)
        return Bounds(ends[0] + more, ends[1] + more) if more else Bounds(*ends)

    def number(self, node: Node) -> int | None:
        """The value of an integer constant or of a size."""
        if isinstance(node, Symbol):
            return self.region.sizes.get(node.name)
        return int(node.value) if isinstance(node, Constant) else None

    def solve(self, function: Node, op: str, value: Tensor) -> Intervals | None:
        """The kv with ``function(kv) op value``, op being "le" or "ge"; None where function is not monotone."""
        match function:
            case Symbol("kv"):
                return self.from_end(op, value)
            case Apply("neg", (inner,)):
                return self.solve(inner, _SWAPPED[op], -value)
            case Apply("floordiv", (inner, Constant(m))) if m > 0:
                return self.solve(inner, op, value * m + (m - 1 if op == "le" else 0))
            case Apply("mul", (inner, Constant(c)) | (Constant(c), inner)) if c != 0:
                op, value, c = (op, value, c) if c > 0 else (_SWAPPED[op], -value, -c)
                quotient = (
                    value.div(c, rounding_mode="floor") if op == "le" else -(-value).div(c, rounding_mode="floor")
                )
                return self.solve(inner, op, quotient)
            case Apply("add" | "sub", (left, right)):
                sign = 1 if function.op == "add" else -1
                if isinstance(right, Constant):
                    return self.solve(left, op, value - sign * right.value)
                if isinstance(left, Constant):
                    inner_op = op if sign > 0 else _SWAPPED[op]
                    return self.solve(right, inner_op, sign * (value - left.value))
            case Load(spec, (*others, last)) if isinstance(last, Symbol) and spec.kind is Kind.INT:
                return self.sorted_load(spec, others, op, value)
        return None

    def from_end(self, op: str, end: Tensor) -> Intervals:
        """The keys up to ``end`` ("le"), or from it on ("ge")."""
        end = end.clamp(-1, self.size).to(intervals.dtype_for(self.size)).unsqueeze(-1)
        if op == "le":
            return Intervals(self.all.low.expand_as(end), end.clamp_(max=self.size - 1), self.size)
        return Intervals(end.clamp_(min=0), self.all.high.expand_as(end), self.size)

    def sorted_load(self, spec: TensorSpec, others: list[Node], op: str, value: Tensor) -> Intervals | None:
        """A tensor that does not fall along its last dimension is a monotone function of kv."""
        if any(_mentions_kv(i) or mentions(i, "q") for i in others) or not self.region.rises(spec.name):
            return None
        tensor = self.region.tensors[spec.name]
        if len(others) == 0:
            table = tensor
        elif len(others) == 1:
            found = bounds(others[0], self.region)
            if tensor.shape[0] == 1 or tensor.stride(0) == 0:
                table = tensor[0]
            else:
                table = tensor[found.low.flatten().to(tensor.device)]
                lead = [found.low.shape[0], found.low.shape[1]] if found.low.dim() == 3 else [1, 1]
                table = table.reshape(*lead, -1)
        else:
            return None
        at = searched(table, op, value)
        return self.from_end(op, at - 1 if op == "le" else at)


def _both_sides(may: Tensor, must: Tensor) -> Tensor:
    """Numbers or ends for "may" and for "must" as one array, [2, ...]."""
    return torch.stack(torch.broadcast_tensors(may, must))


def _in_rows(found: Bounds) -> Bounds:
    """Bounds with all three dimensions [B, H, R]."""
    return found if found.low.dim() else Bounds(found.low.reshape(1, 1, 1), found.high.reshape(1, 1, 1))


def _chain(op: str, node: Node) -> list[Node]:
    """The operands of a chain of one associative operation."""
    if isinstance(node, Apply) and node.op == op:
        return [part for arg in node.args for part in _chain(op, arg)]
    return [node]


def _mentions_kv(node: Node) -> bool:
    return depends_on(node, "kv") or any(isinstance(n, Selected) for n in walk(node))


def _rewritten(op: str, left: Node, right: Node) -> Node | None:
    """A comparison of abs, minimum, maximum or where as comparisons of what is inside; None for others."""
    for node, other, here in ((left, right, op), (right, left, _flipped(op))):
        if not isinstance(node, Apply) or not _mentions_kv(node):
            continue
        inside = node.args
        if node.op == "abs":
            within = {"lt": "lt", "le": "le"}.get(here)
            if within:
                upper, lower = (Apply(within, (x, other)) for x in (inside[0], Apply("neg", inside)))
                return Apply("and", (upper, lower))
            if here in ("gt", "ge"):
                return Apply("not", (Apply("le" if here == "gt" else "lt", (node, other)),))
        if node.op in ("minimum", "maximum") and here in ("lt", "le", "gt", "ge"):
            joined = "or" if (node.op == "minimum") == (here in ("lt", "le")) else "and"
            return Apply(joined, tuple(Apply(here, (x, other)) for x in inside))
        if node.op == "where":
            condition, this, that = inside
            yes = Apply("and", (condition, Apply(here, (this, other))))
            no = Apply("and", (Apply("not", (condition,)), Apply(here, (that, other))))
            return Apply("or", (yes, no))
    return None


def _flipped(op: str) -> str:
    return {"lt": "gt", "gt": "lt", "le": "ge", "ge": "le"}.get(op, op)


def _separated(left: Node, right: Node) -> tuple[list[tuple[int, Node]], list[tuple[int, Node]]]:
    """The terms of left - right with their signs: those that depend on kv, and the rest."""
    with_kv: list[tuple[int, Node]] = []
    rest: list[tuple[int, Node]] = []

    def split(sign: int, node: Node) -> None:
        if isinstance(node, Apply) and node.op in ("add", "sub"):
            split(sign, node.args[0])
            split(sign if node.op == "add" else -sign, node.args[1])
        elif isinstance(node, Apply) and node.op == "neg":
            split(-sign, node.args[0])
        else:
            (with_kv if _mentions_kv(node) else rest).append((sign, node))

    split(1, left)
    split(-1, right)
    return with_kv, rest
