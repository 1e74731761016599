"""Masks for z3: integers as integers, captured tensors and real functions as unknown functions."""

from __future__ import annotations

from typing import Any

from flexsparse.ir.nodes import (
    COMPARISONS,
    INDEX_SYMBOLS,
    Apply,
    BlockTopK,
    Constant,
    Kind,
    Load,
    Node,
    Opaque,
    Scalar,
    Symbol,
)
from flexsparse.ir.program import Chosen, Gate, Selected


class UnsupportedError(Exception):
    """A node that has no translation, or z3 that is not installed."""


class Encoder:
    """One encoding for several masks, so that equal look-ups are equal. ``facts`` hold of every valid index.

    ``chosen`` collects the selections' answers; any of them is False for a key whose score is -inf.
    """

    def __init__(self) -> None:
        try:
            import z3
        except ImportError as error:
            raise UnsupportedError("z3 is not installed; `pip install flexsparse[proofs]` brings it") from error
        self.z3 = z3
        self.symbols: dict[str, Any] = {}
        self.functions: dict[object, Any] = {}
        self.facts: list[Any] = []
        self.chosen: list[Any] = []
        # Numbers of a call, which may be any.
        self.scalars: dict[str, Any] = {}
        # False once something was abstracted whose value a counterexample may have chosen wrongly.
        self.faithful = True
        lengths = {"b": None, "h": "heads", "q": None, "kv": "kv_len"}
        for name in INDEX_SYMBOLS:
            self.facts.append(self.symbol(name) >= 0)
            if lengths[name] is not None:
                self.facts.append(self.symbol(name) < self.symbol(str(lengths[name])))
        for name in ("q_len", "kv_len", "heads"):
            self.facts.append(self.symbol(name) >= 1)

    def symbol(self, name: str) -> Any:
        return self.symbols.setdefault(name, self.z3.Int(name))

    def unknown(self, key: object, kind: Kind, *arguments: Any) -> Any:
        """The value of a function about which nothing is known."""
        if key not in self.functions:
            sorts = [a.sort() for a in arguments]
            self.functions[key] = self.z3.Function(f"f{len(self.functions)}", *sorts, self._sort(kind))
        return self.functions[key](*arguments)

    def _sort(self, kind: Kind) -> Any:
        return {Kind.INT: self.z3.IntSort, Kind.REAL: self.z3.RealSort, Kind.BOOL: self.z3.BoolSort}[kind]()

    def indices(self) -> list[Any]:
        return [self.symbol(name) for name in INDEX_SYMBOLS]

    def encode(self, node: Node, selections: tuple[Any, ...] = ()) -> Any:
        match node:
            case Constant(value):
                return self._constant(node.kind, value)
            case Symbol(name):
                return self.symbol(name)
            case Scalar(name):
                number = (self.z3.Int if node.kind is Kind.INT else self.z3.Real)(name)
                return self.scalars.setdefault(name, number)
            case Load(spec, index):
                return self.unknown(("load", spec), spec.kind, *(self.encode(i, selections) for i in index))
            case Selected(number):
                selection = selections[number]
                chosen = self.unknown(("selected", selection), Kind.BOOL, *self.indices())
                # A selected key is a candidate.
                candidate = self.symbol("kv") <= self.symbol("q") - self._count(selection.after)
                self.facts.append(self.z3.Implies(chosen, candidate))
                self.chosen.append(chosen)
                return chosen
            case Chosen(topk):
                return self._chosen(topk)
            case Opaque(function, kind, _):
                self.faithful = False
                return self.unknown(("opaque", function), kind, *self.indices())
            case Gate():
                raise UnsupportedError("gates have no place in a mask")
            case Apply(op, args):
                return self._apply(op, node, [self.encode(a, selections) for a in args])
        raise UnsupportedError(f"{type(node).__name__} has no translation")

    def _count(self, number: Any) -> Any:
        return self.encode(number) if isinstance(number, Node) else number

    def _chosen(self, topk: BlockTopK) -> Any:
        """Some blocks for each query: its own always, and what else it is z3 does not know."""
        b, h, q, kv = self.indices()
        own = q / topk.block
        block = kv / topk.block
        chosen = self.unknown(("chosen", topk), Kind.BOOL, b, h, q, block)
        self.facts += [self.z3.Implies(block == own, chosen), self.z3.Implies(block > own, self.z3.Not(chosen))]
        self.faithful = False
        return chosen

    def _constant(self, kind: Kind, value: Any) -> Any:
        if kind is Kind.BOOL:
            return self.z3.BoolVal(value)
        if kind is Kind.INT:
            return self.z3.IntVal(value)
        if value in (float("inf"), -float("inf")):
            raise UnsupportedError("infinity")
        return self.z3.RealVal(str(value))

    def _apply(self, op: str, node: Apply, args: list[Any]) -> Any:
        z3 = self.z3
        if op in COMPARISONS:
            a, b = self._alike(args)
            table = {"eq": a == b, "ne": a != b, "lt": a < b, "le": a <= b, "gt": a > b, "ge": a >= b}
            return table[op]
        logic = {"and": z3.And, "or": z3.Or, "xor": z3.Xor, "not": z3.Not}
        if op in logic:
            return logic[op](*args)
        if op == "where":
            return z3.If(args[0], *self._alike(args[1:]))
        if op in ("add", "sub", "mul"):
            a, b = self._alike(args)
            return {"add": a + b, "sub": a - b, "mul": a * b}[op]
        if op == "neg":
            return -args[0]
        if op == "abs":
            return z3.If(args[0] >= 0, args[0], -args[0])
        if op in ("minimum", "maximum"):
            a, b = self._alike(args)
            return z3.If((a <= b) if op == "minimum" else (a >= b), a, b)
        if op in ("floordiv", "mod", "truncdiv", "truncmod"):
            return self._division(op, *args)
        if op == "floor":
            return z3.ToInt(args[0])
        if op == "div":
            a, b = (self._real(x) for x in args)
            return a / b
        # exp, log and their like: some function of their argument.
        self.faithful = False
        return self.unknown(op, node.kind, *(self._real(a) for a in args))

    def _division(self, op: str, a: Any, b: Any) -> Any:
        """z3 rounds so that the remainder is not negative; Python rounds down, C toward zero."""
        z3 = self.z3
        quotient = a / b
        exact = a == quotient * b
        floor = z3.If(z3.Or(b > 0, exact), quotient, quotient - 1)
        if op in ("floordiv", "mod"):
            return floor if op == "floordiv" else a - b * floor
        negative = (a < 0) != (b < 0)
        trunc = z3.If(z3.And(negative, z3.Not(a == floor * b)), floor + 1, floor)
        return trunc if op == "truncdiv" else a - b * trunc

    def _alike(self, args: list[Any]) -> list[Any]:
        if any(self.z3.is_real(a) for a in args):
            return [self._real(a) for a in args]
        return args

    def _real(self, value: Any) -> Any:
        return self.z3.ToReal(value) if self.z3.is_int(value) else value
