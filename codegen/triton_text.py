"""Nodes to Triton text, for kernels into which a pattern's mask, score and gates are printed.

The text reads ``b``, ``h``, ``q`` and ``kv``, integer tensors that broadcast together, the sizes, the PRECISION of
products, on which functions may depend, and one pointer and its strides for each captured tensor. Functions of sizes
and scalars alone are computed by the host, and passed as numbers.
"""

from __future__ import annotations

from flexsparse.codegen.emitter import Emitter, has_scalars, is_uniform
from flexsparse.ir.nodes import COMPARISONS, OPERATIONS, Apply, Constant, Kind, Load, Node, Scalar, Symbol
from flexsparse.ir.program import Gate, Selected

_CALLS = {f: f"tl.{f}" for f in ("abs", "exp", "exp2", "log", "log2", "sqrt", "cos", "sigmoid")}
_CALLS |= {"tanh": "tanh", "minimum": "tl.minimum", "maximum": "tl.maximum"}
_INTEGER_CALLS = {"floordiv": "floordiv", "mod": "floormod"}
_TRUNCATING = {"truncdiv": "//", "truncmod": "%"}
_NEVER_NEGATIVE = ("b", "h", "q", "kv", "q_len", "kv_len", "heads")


class TritonText:
    """Nodes to text; ``numbers`` collects functions of sizes, as the Python text by which the host computes them.

    ``given`` names those among them that the call's own numbers decide.
    """

    def __init__(self) -> None:
        self.numbers: dict[str, str] = {}
        self.given: set[str] = set()
        self._host = Emitter("torch.float32", None)

    def emit(self, node: Node) -> str:
        return self._render(node)[0]

    def _render(self, node: Node) -> tuple[str, int]:
        match node:
            case Constant(value):
                return f'float("{value}")' if value in (float("inf"), -float("inf")) else repr(value), 10
            case Symbol(name):
                return name, 10
            case Scalar(name):
                # A kernel has names of its own, which a user may choose for a number too.
                self.numbers[f"given_{name}"] = name
                self.given.add(f"given_{name}")
                return f"given_{name}", 10
            case Load(tensor, index):
                steps = [f"{self._place(i)} * of_{tensor.name}_stride_{n}" for n, i in enumerate(index)]
                found = f"tl.load({' + '.join([f'p_of_{tensor.name}', *steps])})"
                # Whatever the tensor's own type, as wide as the other backends have it.
                return found + {Kind.REAL: ".to(tl.float32)", Kind.INT: ".to(tl.int64)", Kind.BOOL: ""}[tensor.kind], 10
            case Selected(n):
                return f"selected_{n}", 10
            case Gate(n):
                assert not node.through
                return f"m_{n}", 10
            case Apply(op, args):
                return self._number(node) if is_uniform(node) else self._apply(node, op, args)
        raise AssertionError(f"no Triton code for {type(node).__name__}")

    def _place(self, index: Node) -> str:
        """An index that may be multiplied by a stride: 64 bits."""
        text = self._wrapped(index, Kind.INT, 10)
        return text if is_uniform(index) else f"{text}.to(tl.int64)"

    def _number(self, node: Apply) -> tuple[str, int]:
        text = self._host.emit(node)
        text = f"float({text})" if has_scalars(node) and node.kind is Kind.REAL else text
        name = next((known for known, other in self.numbers.items() if other == text), f"c_{len(self.numbers)}")
        self.numbers[name] = text
        if has_scalars(node):
            self.given.add(name)
        return (f"({name} != 0)" if node.kind is Kind.BOOL else name), 10

    def _apply(self, node: Apply, op: str, args: tuple[Node, ...]) -> tuple[str, int]:
        operation = OPERATIONS[op]
        if op == "where":
            return f"tl.where({self.emit(args[0])}, {', '.join(self._as(node.kind, a) for a in args[1:])})", 10
        if op == "floor":
            return f"tl.floor({self._as(Kind.REAL, args[0])}).to(tl.int64)", 10
        if op in _INTEGER_CALLS and not (_is_natural(args[0]) and _is_positive(args[1])):
            return f"{_INTEGER_CALLS[op]}({', '.join(self.emit(a) for a in args)})", 10
        if op in _TRUNCATING:
            return f"{self._wrapped(args[0], Kind.INT, 7)} {_TRUNCATING[op]} {self._wrapped(args[1], Kind.INT, 8)}", 7
        if not operation.symbol:
            given = [self._as(node.kind, a) for a in args]
            if op == "tanh":
                given.append("PRECISION")
            return f"{_CALLS[op]}({', '.join(given)})", 10
        wanted = node.kind
        if op in COMPARISONS:
            wanted = Kind.REAL if any(a.kind is Kind.REAL for a in args) else Kind.INT
        level = operation.precedence
        if operation.arity == 1:
            return f"{operation.symbol}{self._wrapped(args[0], wanted, level)}", level
        if op in ("and", "or", "xor"):
            return f" {operation.symbol} ".join(self._wrapped(a, Kind.BOOL, level) for a in args), level
        left = self._wrapped(args[0], wanted, level + 1 if op in COMPARISONS else level)
        return f"{left} {operation.symbol} {self._wrapped(args[1], wanted, level + 1)}", level

    def _wrapped(self, node: Node, kind: Kind, at_least: int) -> str:
        if kind is Kind.REAL and node.kind is Kind.INT and not isinstance(node, Constant):
            return self._as(kind, node)
        # Once: to ask for the level again would double the work with every level of the tree.
        text, level = self._render(node)
        return text if level >= at_least else f"({text})"

    def _as(self, kind: Kind, node: Node) -> str:
        """The node's text, as a real where one is wanted; a product makes one of tensors and of numbers alike."""
        if kind is Kind.REAL and node.kind is Kind.INT and not isinstance(node, Constant):
            text, level = self._render(node)
            return f"({text} * 1.0)" if level >= 7 else f"(({text}) * 1.0)"
        return self.emit(node)


def _is_natural(node: Node) -> bool:
    """Whether an integer is certainly not negative: then the division of the machine is the one that is meant."""
    if isinstance(node, Constant):
        return node.value >= 0
    if isinstance(node, Symbol):
        return node.name in _NEVER_NEGATIVE
    return isinstance(node, Apply) and node.op in ("add", "mul", "floordiv", "mod") and all(map(_is_natural, node.args))


def _is_positive(node: Node) -> bool:
    return isinstance(node, Constant) and node.value > 0
