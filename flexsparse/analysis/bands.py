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
from flexsparse.analysis.bounds import Bounds, Region, bounds, never_falls
from flexsparse.analysis.intervals import Intervals, everything, normal, nothing
from flexsparse.ir.nodes import COMPARISONS, Apply, Constant, Kind, Load, Node, Symbol, depends_on, mentions, walk
from flexsparse.ir.program import Selected


@dataclass(frozen=True)
class Rows:
    """Keys that some query of the tile may see, and keys that every query of it sees: [B, H, T_q, M] each.

    ``solved`` is False where a part of the mask could not be solved for kv.
    """

    may: Intervals
    must: Intervals
    solved: bool


def rows(mask: Node, region: Region) -> Rows:
    """The rows of a flattened mask; the region's q ranges are [1, 1, T_q], b [B, 1, 1] and h [1, H, 1]."""
    return _Solver(region).mask(mask)


_SWAPPED = {"le": "ge", "ge": "le", "eq": "eq"}


class _Solver:
    def __init__(self, region: Region) -> None:
        self.region = region
        self.size = region.sizes["kv_len"]
        self.all = everything(self.size, region.device)
        self.none = nothing(self.size, region.device)

    def mask(self, node: Node) -> Rows:
        if isinstance(node, Constant):
            known = self.all if node.value else self.none
            return Rows(known, known, True)
        if not _mentions_kv(node):
            return self.without_kv(node)
        if isinstance(node, Apply):
            match node.op, node.args:
                case "and", (a, b):
                    return self.both(self.mask(a), self.mask(b))
                case "or", (a, b):
                    return self.either(self.mask(a), self.mask(b))
                case "not", (a,):
                    return self.negated(self.mask(a))
                case "xor", (a, b):
                    return self.xor(self.mask(a), self.mask(b))
                case op, (a, b) if op in COMPARISONS:
                    return self.comparison(op, a, b)
        return self.open()

    def open(self) -> Rows:
        return Rows(self.all, self.none, False)

    def without_kv(self, node: Node) -> Rows:
        found = bounds(node, self.region)
        return Rows(
            intervals.where(found.high, self.all, self.none),
            intervals.where(found.low, self.all, self.none),
            True,
        )

    def both(self, a: Rows, b: Rows) -> Rows:
        return Rows(a.may & b.may, a.must & b.must, a.solved and b.solved)

    def either(self, a: Rows, b: Rows) -> Rows:
        return Rows(a.may | b.may, a.must | b.must, a.solved and b.solved)

    def negated(self, a: Rows) -> Rows:
        return Rows(~a.must, ~a.may, a.solved)

    def xor(self, a: Rows, b: Rows) -> Rows:
        return self.either(self.both(a, self.negated(b)), self.both(self.negated(a), b))

    def comparison(self, op: str, left: Node, right: Node) -> Rows:
        rewritten = _rewritten(op, left, right)
        if rewritten is not None:
            return self.mask(rewritten)
        if op in ("ne", "lt", "gt"):
            # x != y is not x == y, x < y is not x >= y, x > y is not x <= y.
            return self.negated(self.comparison({"ne": "eq", "lt": "ge", "gt": "le"}[op], left, right))
        if left.kind is not Kind.INT or right.kind is not Kind.INT:
            return self.open()
        # Bring everything that depends on kv to the left: f(kv) op rest.
        with_kv, rest = _separated(left, right)
        if len(with_kv) != 1:
            return self.open()
        sign, function = with_kv[0]
        values = self.total(rest)
        if sign < 0:
            op = _SWAPPED[op]
        else:
            values = Bounds(-values.high, -values.low)
        # Now f(kv) op value, the value lying in its bounds over the queries of the tile.
        if op == "eq":
            return self.equal(function, values)
        may = self.solve(function, op, values.high if op == "le" else values.low)
        must = self.solve(function, op, values.low if op == "le" else values.high)
        return self.open() if may is None or must is None else Rows(may, must, True)

    def equal(self, function: Node, values: Bounds) -> Rows:
        below, above = self.solve(function, "le", values.high), self.solve(function, "ge", values.low)
        if below is None or above is None:
            return self.open()
        may = below & above
        return Rows(may, intervals.where(values.low == values.high, may, self.none), True)

    def total(self, terms: list[tuple[int, Node]]) -> Bounds:
        zero = torch.zeros((), dtype=torch.long, device=self.region.device)
        low, high = zero, zero
        for sign, term in terms:
            found = bounds(term, self.region)
            low = low + (found.low if sign > 0 else -found.high)
            high = high + (found.high if sign > 0 else -found.low)
        return Bounds(low, high)

    def solve(self, function: Node, op: str, value: Tensor) -> Intervals | None:
        """The kv with ``function(kv) op value``, op being "le" or "ge"; None where function is not monotone."""
        match function:
            case Symbol("kv"):
                low = value if op == "ge" else torch.zeros_like(value)
                high = value if op == "le" else torch.full_like(value, self.size - 1)
                return normal(low.unsqueeze(-1), high.unsqueeze(-1), self.size)
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
                return self.sorted_load(self.region.tensors[spec.name], others, op, value)
        return None

    def sorted_load(self, tensor: Tensor, others: list[Node], op: str, value: Tensor) -> Intervals | None:
        """A tensor that does not fall along its last dimension is a monotone function of kv."""
        if any(_mentions_kv(i) or mentions(i, "q") for i in others) or not never_falls(tensor):
            return None
        if len(others) == 0:
            table = tensor
        elif len(others) == 1:
            found = bounds(others[0], self.region)
            if tensor.shape[0] == 1 or tensor.stride(0) == 0:
                table = tensor[0]
            else:
                table = tensor[found.low.flatten()]
                lead = [found.low.shape[0], found.low.shape[1]] if found.low.dim() == 3 else [1, 1]
                table = table.reshape(*lead, -1)
        else:
            return None
        return self.searched(table, op, value)

    def searched(self, table: Tensor, op: str, value: Tensor) -> Intervals | None:
        if table.dim() > 1:
            # A bound that depends on nothing is one number for all rows.
            value = value.reshape(1, 1, -1) if value.dim() == 0 else value
            shape = torch.broadcast_shapes(table.shape[:-1], value.shape[:-1])
            table = table.expand(*shape, -1).contiguous()
            value = value.expand(*shape, value.shape[-1]).contiguous()
        value = value.to(table.dtype)
        side = {"le": True, "ge": False}[op]
        at = torch.searchsorted(table.contiguous(), value.contiguous(), right=side)
        if op == "le":
            return normal(torch.zeros_like(at).unsqueeze(-1), (at - 1).unsqueeze(-1), self.size)
        return normal(at.unsqueeze(-1), torch.full_like(at, self.size - 1).unsqueeze(-1), self.size)


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
