"""Nodes to Python text over torch, for the functions that ``codegen.flex`` puts together."""

from __future__ import annotations

from flexsparse.ir.nodes import (
    COMPARISONS,
    OPERATIONS,
    SIZE_SYMBOLS,
    Apply,
    Constant,
    Kind,
    Load,
    Node,
    Opaque,
    Scalar,
    Symbol,
    mentions,
    walk,
)
from flexsparse.ir.program import Chosen, Gate, Held, Own, Selected

_TENSOR_CALLS = {"abs": "torch.abs", **{f: f"torch.{f}" for f in ("exp", "exp2", "log", "log2", "sqrt", "tanh", "cos")}}
_TENSOR_CALLS |= {"sigmoid": "torch.sigmoid"}
_SCALAR_CALLS = {
    **{f: f"math.{f}" for f in ("exp", "log", "log2", "sqrt", "tanh", "cos", "floor")},
    **{"abs": "abs", "minimum": "min", "maximum": "max"},
}

_CLIPPED = "torch.where(x >= 1.0, 1.0, torch.where(x <= least, least, x))"
# What a gate is of x = u - tau; under "ste_identity" x is u.
_GATE_OF = {"": _CLIPPED, "ste": _CLIPPED, "ste_identity": "x", "ste_sigmoid": "torch.sigmoid(x)"}
# The inner where keeps exp, and so its gradient, from overflowing.
_SOFTMAX = "torch.exp(torch.where(x >= 0.0, 0.0, x))"
_GATE_OF["capped_softmax"] = f"torch.where(x <= torch.log(least), least, {_SOFTMAX})"

# ``build`` takes by this name what turns a number of the call into what its functions read.
ARGUMENT = "argument"
# The place of a row in what is gathered with it.
ROW = "b, h // row_group, row"


def opaque_name(number: int) -> str:
    """The name under which ``build`` takes the ``number``-th function that could not be traced."""
    return f"opaque_{number}"


class Emitter:
    """Nodes to Python text over torch. Scalars (sizes and constants) are computed by Python itself."""

    def __init__(
        self,
        real_dtype: str,
        hoisted: dict[Node, str] | None,
        opaque: tuple[Opaque, ...] = (),
        offset: bool = False,
        rows: bool = False,
    ) -> None:
        self.real_dtype = real_dtype
        # Scores of a selection are gathered with the rows of its keys.
        self.rows = rows
        # q is a position; what was made for the queries of this call counts them from 0.
        self.row = "q - q_offset" if offset else "q"
        self.opaque = opaque
        self.hoisted = hoisted

    def emit(self, node: Node) -> str:
        return self._render(node)[0]

    def emit_mask(self, node: Node) -> str:
        """A mask that is a tensor, also where it depends on sizes alone and would be a Python boolean."""
        return f"(kv >= 0) & {self._wrapped(node, Kind.BOOL, 8)}" if is_uniform(node) else self.emit(node)

    def emit_score(self, node: Node) -> str:
        """A score with the shape and dtype of the running one, also where it does not depend on that."""
        if mentions(node, "score"):
            return self._as(Kind.REAL, node)
        # FlexAttention's backward wants a gradient for the running score, even where it is 0.
        return f"0.0 * score + {self._wrapped(node, Kind.REAL, 7)}"

    def gate_lines(self, nodes: list[Node]) -> list[str]:
        """Local variables for every gate among the nodes; each of its tensors is indexed once."""
        gates = sorted({g for n in nodes for g in walk(n) if isinstance(g, Gate)}, key=lambda g: g.number)
        lines = []
        for gate in gates:
            n = gate.number
            head = f"b, h // group_{n}"
            kind = "capped_softmax" if gate.capped else gate.through
            if kind in ("", "ste", "capped_softmax"):
                lines.append(f"least = least_{n}[{head}, q]")
            key = ROW if self.rows else f"{head}, kv"
            for suffix in ("", "_fixed") if gate.through else ("",):
                shift = "" if gate.through == "ste_identity" else f" - tau_{n}{suffix}[{head}, q]"
                lines.append(f"x = u_{n}{suffix}[{key}]{shift}")
                lines.append(f"m_{n}{suffix} = {_GATE_OF[kind]}")
            if gate.through:
                lines.append(f"m_{n} = 1.0 + (m_{n} - m_{n}_fixed)")
        return lines

    def _render(self, node: Node) -> tuple[str, int]:
        match node:
            case Constant(value):
                return repr(value) if value not in (float("inf"), -float("inf")) else f'float("{value}")', 10
            case Symbol(name):
                return name, 10
            case Scalar(name):
                return (name if self.hoisted is None else self.hoisted.setdefault(node, name)), 10
            case Load(tensor, ()):
                return tensor.name, 10
            case Opaque(function, _, args):
                number = next(n for n, known in enumerate(self.opaque) if known.function is function)
                given = [*(self.emit(a) for a in args), "b", "h", "q", "kv"]
                return f"{opaque_name(number)}({', '.join(given)})", 10
            case Load(tensor, index):
                return f"{tensor.name}[{', '.join(self.emit(i) for i in index)}]", 10
            case Selected(n):
                head = f"b, h // group_{n}, kv"
                return f"(birth_{n}[{head}] <= q) & (q < death_{n}[{head}])", 4
            case Held(n):
                return f"(from_{n}[{ROW}] <= q) & (q < until_{n}[{ROW}])", 4
            case Own():
                return "kv == row", 1
            case Chosen(topk):
                return f"{topk.name}[b, h, {self.row}, kv // {topk.block}]", 10
            case Gate(n):
                return f"m_{n}", 10
            case Apply(op, args):
                return self._render_apply(node, op, args)
        raise AssertionError(f"no code for {type(node).__name__}")

    def _render_apply(self, node: Node, op: str, args: tuple[Node, ...]) -> tuple[str, int]:
        if is_uniform(node):
            # A function of sizes is computed once, in front of the functions; of scalars, whatever it is.
            if self.hoisted is not None and (has_scalars(node) or not OPERATIONS[op].symbol):
                return self.hoisted.setdefault(node, f"c_{len(self.hoisted)}"), 10
            return self._scalar(op, args)
        operation = OPERATIONS[op]
        if op in ("minimum", "maximum"):
            return self._extreme(op, args), 10
        if op == "where":
            branches = [self._as(node.kind, a) for a in args[1:]]
            if is_uniform(args[1]) and is_uniform(args[2]) and node.kind is Kind.REAL:
                # Two Python numbers would give torch's default dtype; one full tensor fixes the score's.
                owner = self.real_dtype.removesuffix(".dtype")
                branches[0] = filled(owner, args[1], branches[0]) if owner in ("score", "like") else branches[0]
            return f"torch.where({self.emit_mask(args[0])}, {', '.join(branches)})", 10
        if op == "floor":
            return f"torch.floor({self._as(Kind.REAL, args[0])}).to(torch.int64)", 10
        if op in ("truncdiv", "truncmod"):
            call = "torch.div" if op == "truncdiv" else "torch.fmod"
            mode = ', rounding_mode="trunc"' if op == "truncdiv" else ""
            return f"{call}({self.emit(args[0])}, {self.emit(args[1])}{mode})", 10
        if not operation.symbol:
            return f"{_TENSOR_CALLS[op]}({self._as(node.kind, args[0])})", 10
        return self._infix(node, op, args)

    def _infix(self, node: Node, op: str, args: tuple[Node, ...]) -> tuple[str, int]:
        operation = OPERATIONS[op]
        wanted = node.kind
        if op in COMPARISONS:
            wanted = Kind.REAL if any(a.kind is Kind.REAL for a in args) else Kind.INT
        level = operation.precedence
        if operation.arity == 1:
            if op == "not" and is_uniform(args[0]):
                return f"(not {self.emit(args[0])})", 10
            return f"{operation.symbol}{self._wrapped(args[0], wanted, level)}", level
        if op in ("and", "or"):
            return f" {operation.symbol} ".join(self.chain(node, op)), level
        left = self._wrapped(args[0], wanted, level + 1 if op in COMPARISONS else level)
        right = self._wrapped(args[1], wanted, level + 1)
        return f"{left} {operation.symbol} {right}", level

    def chain(self, node: Node, op: str) -> list[str]:
        """The operands of a chain of one mask operator, each in parentheses unless atomic."""
        if isinstance(node, Apply) and node.op == op:
            return [operand for arg in node.args for operand in self.chain(arg, op)]
        return [self._wrapped(node, Kind.BOOL, 8)]

    def _wrapped(self, node: Node, kind: Kind, at_least: int) -> str:
        if kind is Kind.REAL and node.kind is Kind.INT and not is_uniform(node):
            return self._as(kind, node)
        rendered, level = self._render(node)
        return rendered if level >= at_least else f"({rendered})"

    def _as(self, kind: Kind, node: Node) -> str:
        """The node's text, converted where a real is wanted and an integer tensor comes."""
        if kind is Kind.REAL and node.kind is Kind.INT and not is_uniform(node):
            return f"{self._wrapped(node, Kind.INT, 10)}.to({self.real_dtype})"
        return self.emit(node)

    def _extreme(self, op: str, args: tuple[Node, ...]) -> str:
        kind = Kind.REAL if any(a.kind is Kind.REAL for a in args) else Kind.INT
        for number, tensor in (args, args[::-1]):
            if is_uniform(number):
                bound = "max" if op == "minimum" else "min"
                return f"torch.clamp({self._as(kind, tensor)}, {bound}={self.emit(number)})"
        return f"torch.{op}({', '.join(self._as(kind, a) for a in args)})"

    def _scalar(self, op: str, args: tuple[Node, ...]) -> tuple[str, int]:
        operation = OPERATIONS[op]
        shown = [self.emit(a) for a in args]
        if op == "exp2":
            return f"2.0 ** ({shown[0]})", 9
        if op == "sigmoid":
            return f"1 / (1 + math.exp(-({shown[0]})))", 7
        if op == "where":
            return f"({shown[1]} if {shown[0]} else {shown[2]})", 10
        if op == "truncdiv":
            dividend, divisor = (self._wrapped(a, Kind.INT, 10) for a in args)
            return f"int({dividend} / {divisor})", 10
        if op == "truncmod":
            return f"int(math.fmod({shown[0]}, {shown[1]}))", 10
        if not operation.symbol:
            return f"{_SCALAR_CALLS[op]}({', '.join(shown)})", 10
        if operation.arity == 1:
            return f"({'not ' if op == 'not' else '-'}{self._wrapped(args[0], Kind.REAL, 9)})", 10
        level = operation.precedence
        left = self._wrapped(args[0], Kind.REAL, level + 1 if op in COMPARISONS else level)
        return f"{left} {operation.symbol} {self._wrapped(args[1], Kind.REAL, level + 1)}", level


def filled(like: str, node: Node, shown: str) -> str:
    """A uniform expression with the shape and dtype of ``like``; an argument may be a tensor, which does not fill."""
    return f"(torch.zeros_like({like}) + {shown})" if has_scalars(node) else f"torch.full_like({like}, {shown})"


def has_scalars(node: Node) -> bool:
    """Whether a call's numbers decide the value of the node."""
    return any(isinstance(n, Scalar) for n in walk(node))


def is_uniform(node: Node) -> bool:
    """Whether the node is one number for the whole call: constants, sizes and scalars only."""
    if isinstance(node, Load | Selected | Held | Own | Gate | Opaque):
        return False
    if isinstance(node, Symbol):
        return node.name in SIZE_SYMBOLS
    return all(is_uniform(child) for child in node.children)
