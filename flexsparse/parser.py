"""Text to expression: Python's grammar, the language's names, and nothing else is ever executed."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any

from flexsparse import language
from flexsparse.errors import FlexsparseError, ParseError, did_you_mean
from flexsparse.expression import Expression, Pattern, pattern_of
from flexsparse.ir.nodes import Constant

_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.BitAnd: operator.and_,
    ast.BitOr: operator.or_,
    ast.BitXor: operator.xor,
}
_UNARY: dict[type[ast.unaryop], Callable[[Any], Any]] = {ast.USub: operator.neg, ast.Invert: operator.invert}
_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_SYMBOLS = ("b", "h", "q", "kv", "q_len", "kv_len", "heads", "score")
_FUNCTIONS = (
    *("where", "minimum", "maximum", "exp", "exp2", "log", "log2", "sqrt", "tanh", "cos", "sigmoid", "floor"),
    *("truncdiv", "truncmod", "per_head", "topk", "block_topk", "captured", "scalar"),
)


# What text may name beside the patterns of the catalogue.
NAMES = (*_SYMBOLS, *_FUNCTIONS, "abs")


def parse(source: str, captured: Mapping[str, language.Captured] | None = None) -> Expression:
    """The expression that ``source`` writes, equal to the same expression written in Python.

    A pattern without required arguments may drop its parentheses: ``"causal & sliding_window(512)"``.
    ``captured`` gives tensors declared elsewhere by name, so that ``"doc[b, q] == doc[b, kv]"`` can be read;
    text may also declare them in place: ``captured("doc", dims=("b", "s"))[b, q]``.
    Raises ParseError, with the column, for anything that is not an expression of the language, and the
    pattern's own error for a wrong argument.
    """
    if not isinstance(source, str):
        raise ParseError("parse(source)", got=type(source).__name__, expected="text")
    try:
        tree = ast.parse(source.strip(), mode="eval")
    except SyntaxError as error:
        # Python gives no place to what ends too early.
        at = f"at column {error.offset}" if error.offset else "where it ends"
        raise ParseError(
            f"expression {source!r}",
            got=f"{error.msg} {at}" if source.strip() else "no text",
            expected="an expression such as causal & sliding_window(512)",
            column=error.offset or 0,
        ) from None
    except (RecursionError, ValueError, MemoryError) as error:
        raise ParseError("expression", got=str(error), expected="an expression of moderate depth") from None
    result = _Reader(source.strip(), dict(captured or {})).read(tree.body)
    if isinstance(result, bool):
        # `everything` prints as True.
        result = pattern_of(Constant(result))
    if not isinstance(result, Expression):
        raise ParseError(f"expression {source!r}", got=repr(result), expected="a pattern, a mask or a score")
    return result


class _Reader:
    """Evaluates the few syntax nodes that the language has."""

    def __init__(self, source: str, captured: dict[str, language.Captured]) -> None:
        from flexsparse.patterns import catalogue

        self.source = source
        self.captured = captured
        self.patterns = catalogue()
        self.constants: dict[str, object] = {"inf": float("inf")}

    def read(self, node: ast.expr) -> Any:
        match node:
            case ast.Constant(value) if isinstance(value, bool | int | float | str) or value is None:
                return value
            case ast.Name(name):
                return self._name(node, name)
            case ast.BinOp(left, op, right) if type(op) in _BINARY:
                return self._apply(node, _BINARY[type(op)], self.read(left), self.read(right))
            case ast.UnaryOp(unary, operand) if type(unary) in _UNARY:
                return self._apply(node, _UNARY[type(unary)], self.read(operand))
            case ast.Compare(left, [compare], [right]) if type(compare) in _COMPARE:
                return self._apply(node, _COMPARE[type(compare)], self.read(left), self.read(right))
            case ast.Subscript(value, index):
                return self._subscript(node, value, index)
            case ast.Call(func, args, keywords):
                return self._call(node, func, args, keywords)
            case ast.List(elements) | ast.Tuple(elements):
                items = [self.read(e) for e in elements]
                return items if isinstance(node, ast.List) else tuple(items)
        raise self._unsupported(node)

    def _apply(self, node: ast.expr, function: Callable[..., Any], *args: Any, **named: Any) -> Any:
        try:
            result = function(*args, **named)
        except FlexsparseError:
            raise
        except (TypeError, ZeroDivisionError, ValueError, OverflowError) as error:
            raise self._error(node, str(error), "operands that the operator takes") from None
        return result

    def _name(self, node: ast.expr, name: str) -> Any:
        if name in self.captured:
            return self.captured[name]
        if name in _SYMBOLS:
            return getattr(language, name)
        if name in self.patterns:
            return self.patterns[name]()
        if name in self.constants:
            return self.constants[name]
        known = (*self.patterns, *_SYMBOLS, *_FUNCTIONS, *self.captured)
        mend = did_you_mean(name, known)
        if not mend.startswith("Did"):
            mend = 'Patterns are listed by `flexsparse list`; a tensor is written captured("name", dims=("b", "s")).'
        raise self._error(node, f"the name {name!r}", "a pattern, a symbol or a function of the language", mend)

    def _subscript(self, node: ast.Subscript, value: ast.expr, index: ast.expr) -> Any:
        tensor = self.read(value)
        if not isinstance(tensor, language.Captured):
            raise self._error(node, ast.unparse(node), "a captured tensor before [...]")
        return tensor[self.read(index)]

    def _call(self, node: ast.Call, func: ast.expr, args: list[ast.expr], keywords: list[ast.keyword]) -> Any:
        if any(isinstance(a, ast.Starred) for a in args) or any(k.arg is None for k in keywords):
            raise self._error(node, ast.unparse(node), "arguments without * and **")
        positional = [self.read(a) for a in args]
        named = {str(k.arg): self.read(k.value) for k in keywords}
        return self._apply(node, self._function(func), *positional, **named)

    def _function(self, func: ast.expr) -> Callable[..., Any]:
        if isinstance(func, ast.Attribute) and func.attr in ("score", "sink"):
            base = self.read(func.value)
            if isinstance(base, Pattern):
                return base.score if func.attr == "score" else base.sink
        if not isinstance(func, ast.Name):
            raise self._error(
                func, ast.unparse(func), "the name of a pattern or function, pattern.score or pattern.sink"
            )
        if func.id in self.patterns:
            return self.patterns[func.id]
        if func.id == "abs":
            return abs
        if func.id in _FUNCTIONS:
            function: Callable[..., Any] = getattr(language, func.id)
            return function
        mend = did_you_mean(func.id, (*self.patterns, *_FUNCTIONS, "abs"))
        raise self._error(func, f"the name {func.id!r}", "a pattern or function of the language", mend)

    def _unsupported(self, node: ast.expr) -> ParseError:
        if isinstance(node, ast.Compare):
            return self._error(
                node,
                f"the chained comparison {ast.unparse(node)}",
                "one comparison at a time",
                "Write (q >= kv) & (q - kv < w) for 0 <= q - kv < w.",
            )
        if isinstance(node, ast.BoolOp) or (isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not)):
            return self._error(node, ast.unparse(node), "& | ~ between masks", "Replace and, or, not by & | ~.")
        return self._error(node, ast.unparse(node), "patterns, symbols, numbers, operators and calls")

    def _error(self, node: ast.expr, got: str, expected: str, mend: str = "") -> ParseError:
        column = node.col_offset + 1
        return ParseError(
            f"expression {self.source!r}, column {column}", got=got, expected=expected, mend=mend, column=column
        )
