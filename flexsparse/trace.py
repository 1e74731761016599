"""FlexAttention functions as patterns: ``from_flex`` traces them into expressions, ``to_flex`` gives functions back.

A function is run once on index tensors under torch's tracer, and the operations that it performed are read back
as an expression. An operation that the language lacks makes the whole function an opaque leaf, which still runs.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node as Step
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

from flexsparse.errors import ExpressionError, FlexsparseError
from flexsparse.expression import Pattern, wrap
from flexsparse.ir.nodes import TRUE, Apply, Constant, Kind, Load, Named, Node, Opaque, Scored, Symbol, TensorSpec
from flexsparse.ir.simplify import simplify
from flexsparse.ir.text import function_name

FlexFunction = Callable[..., Any]


def from_flex(mask_mod: FlexFunction | None = None, score_mod: FlexFunction | None = None) -> Pattern:
    """A pattern from ordinary FlexAttention functions, which stay as they are.

    ``mask_mod(b, h, q_idx, kv_idx)`` gives a boolean, ``score_mod(score, b, h, q_idx, kv_idx)`` a real; both may close
    over tensors, which become captured tensors under the names of their variables: the pattern brings their values,
    and a call may give others by keyword. A closed-over tensor that requires a gradient is learnable.
    What the language cannot express becomes an opaque leaf: it runs unchanged, but its tiles are judged from single
    elements only, and ``explain`` says why.
    Raises ExpressionError for functions that branch on data or call ``.item()``, and for a mask that is not boolean.
    """
    if mask_mod is None and score_mod is None:
        raise ExpressionError("from_flex", got="neither mask_mod nor score_mod", expected="at least one of them")
    for name, function in (("mask_mod", mask_mod), ("score_mod", score_mod)):
        if function is not None and not callable(function):
            raise ExpressionError(f"from_flex({name})", got=repr(function), expected="a FlexAttention function")
    node: Node = TRUE
    if mask_mod is not None:
        node = _named(mask_mod, trace(mask_mod, scored=False))
    if score_mod is not None:
        node = Scored(node, _named(score_mod, trace(score_mod, scored=True)))
    pattern = wrap(node)
    assert isinstance(pattern, Pattern)
    return pattern


def _named(function: FlexFunction, node: Node) -> Node:
    return Named(function_name(function), (), node)


def trace(function: FlexFunction, *, scored: bool) -> Node:
    """The expression that a FlexAttention function computes, or an Opaque node with the reason."""
    what = "score_mod" if scored else "mask_mod"
    names = ("score", "b", "h", "q", "kv") if scored else ("b", "h", "q", "kv")
    device = _device_of(function)
    inputs = [torch.zeros((), device=device, dtype=torch.float32 if n == "score" else torch.int64) for n in names]
    try:
        with _IndexWithTensors(), torch.no_grad():
            graph = make_fx(function, tracing_mode="real")(*inputs)
    except FlexsparseError:
        raise
    except Exception as error:
        raise _cannot_run(what, function, error) from error
    try:
        result = _Reader(graph, names, _tensor_names(function)).read()
    except _UnknownError as unknown:
        args = (Symbol("score"),) if scored else ()
        return Opaque(function, Kind.REAL if scored else Kind.BOOL, args, str(unknown))
    if not scored and result.kind is not Kind.BOOL:
        raise ExpressionError(
            f"{what} {function_name(function)}",
            got=f"{'integers' if result.kind is Kind.INT else 'floats'}",
            expected="booleans",
            mend="Return a comparison, such as q_idx >= kv_idx.",
        )
    if scored and result.kind is Kind.BOOL:
        raise ExpressionError(f"{what} {function_name(function)}", got="booleans", expected="the changed score")
    return simplify(result)


def _cannot_run(what: str, function: FlexFunction, error: Exception) -> ExpressionError:
    name = f"{what} {function_name(function)}"
    text = str(error)
    if "value out of a tracing tensor" in text or "data-dependent" in text.lower():
        return ExpressionError(
            name,
            got="a function that branches on its arguments or calls .item()",
            expected="tensor arithmetic",
            mend="Replace `if` by torch.where, `and`/`or`/`not` by & | ~, and .item() by the tensor itself.",
        )
    lines = [line for line in text.splitlines() if line.strip()] or ["no message"]
    return ExpressionError(
        name, got=f"{type(error).__name__}: {lines[0][:200]}", expected="a function that runs on scalar index tensors"
    )


def _device_of(function: FlexFunction) -> torch.device:
    """Where the closed-over tensors are; tracing must run there."""
    for tensor in _tensor_names(function).values():
        return tensor.device
    return torch.device("cpu")


def _tensor_names(function: FlexFunction) -> dict[str, Tensor]:
    """The tensors that a function closes over, by the names of their variables, helpers' closures included."""
    found: dict[str, Tensor] = {}
    waiting: list[Any] = [function]
    seen: set[int] = set()
    while waiting:
        current = waiting.pop()
        if isinstance(current, functools.partial):
            waiting += [current.func, *current.args, *current.keywords.values()]
            continue
        if id(current) in seen or not inspect.isfunction(current):
            continue
        seen.add(id(current))
        variables = inspect.getclosurevars(current)
        for name, value in {**variables.globals, **variables.nonlocals}.items():
            if isinstance(value, Tensor):
                found.setdefault(name, value)
            elif inspect.isfunction(value) or isinstance(value, functools.partial):
                waiting.append(value)
    return found


class _IndexWithTensors(TorchFunctionMode):
    """Makes ``tensor[i, j]`` with scalar tensors a traceable look-up instead of a read of their values."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__getitem__:
            tensor, index = args
            parts = index if isinstance(index, tuple) else (index,)
            if any(isinstance(p, Tensor) for p in parts) and all(isinstance(p, Tensor | int) for p in parts):
                indices = [p if isinstance(p, Tensor) else torch.tensor(p, device=tensor.device) for p in parts]
                return torch.ops.aten.index(tensor, indices)
        return func(*args, **(kwargs or {}))


class _UnknownError(Exception):
    """An operation that the language cannot express."""


_DIRECT = {
    **{op: op for op in ("eq", "ne", "lt", "le", "gt", "ge", "mul", "minimum", "maximum", "abs", "neg")},
    **{op: op for op in ("exp", "exp2", "log", "log2", "sqrt", "tanh", "cos", "sigmoid")},
    **{"logical_and": "and", "logical_or": "or", "logical_xor": "xor", "logical_not": "not"},
}
_BITWISE = {"bitwise_and": "and", "bitwise_or": "or", "bitwise_xor": "xor", "bitwise_not": "not"}
_BITWISE |= {f"__{short}__": full for short, full in (("and", "and"), ("or", "or"), ("xor", "xor"))}
_UNCHANGED = ("clone", "detach", "alias", "lift_fresh_copy", "lift_fresh", "view", "squeeze", "_unsafe_view")
_FLOATS = (torch.float32, torch.float64)
_INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64)


class _Reader:
    """Reads a traced graph, step by step, as nodes."""

    def __init__(self, graph: torch.fx.GraphModule, names: tuple[str, ...], tensors: dict[str, Tensor]) -> None:
        self.graph = graph
        self.inputs = iter(names)
        self.tensors = tensors
        self.values: dict[Step, Node] = {}

    def read(self) -> Node:
        result: Any = None
        for step in self.graph.graph.nodes:
            if step.op == "placeholder":
                self.values[step] = Symbol(next(self.inputs))
            elif step.op == "call_function":
                self.values[step] = self.operation(step)
            elif step.op == "output":
                result = step.args[0]
        if not isinstance(result, Step):
            raise _UnknownError("it returns something other than one tensor")
        return self.node(result)

    def node(self, value: Any) -> Node:
        if isinstance(value, Step):
            return self.values[value] if value in self.values else self.tensor(value, ())
        if isinstance(value, bool | int | float):
            return Constant(value)
        raise _UnknownError(f"a constant of type {type(value).__name__}")

    def operation(self, step: Step) -> Node:
        name = getattr(step.target, "_schema", None)
        name = name.name.split("::")[-1] if name is not None else str(step.target)
        if name in _UNCHANGED:
            return self.node(step.args[0])
        if name == "index":
            return self.look_up(step)
        if name in ("scalar_tensor", "full", "full_like"):
            return Constant(step.args[0 if name == "scalar_tensor" else 1])  # type: ignore[arg-type]
        if name in ("zeros_like", "ones_like", "new_zeros", "new_ones"):
            return Constant(float(name in ("ones_like", "new_ones")))
        if name in ("_to_copy", "to"):
            return self.cast(self.node(step.args[0]), step.kwargs.get("dtype"))
        args = [self.node(a) for a in step.args if a is not None]
        special: Callable[..., Node] | None = getattr(self, f"op_{name.strip('_')}", None)
        if special is not None:
            return special(step, *args)
        if name in _BITWISE:
            if any(a.kind is not Kind.BOOL for a in args):
                raise _UnknownError(f"{name} of integers")
            return Apply(_BITWISE[name], tuple(args))
        if name in _DIRECT:
            if name.startswith("logical"):
                args = [self.cast(a, torch.bool) for a in args]
            return Apply(_DIRECT[name], tuple(self.number(a) if not name.startswith("logical") else a for a in args))
        raise _UnknownError(f"the operation {name}")

    def look_up(self, step: Step) -> Node:
        source, indices = step.args
        if not isinstance(source, Step) or source.op != "get_attr" or not isinstance(indices, list | tuple):
            raise _UnknownError("a look-up in a computed tensor")
        nodes = tuple(self.node(i) for i in indices if i is not None)
        if len(nodes) != len(indices) or any(n.kind is not Kind.INT for n in nodes):
            raise _UnknownError("a look-up with slices or booleans")
        return self.tensor(source, nodes)

    def tensor(self, step: Step, index: tuple[Node, ...]) -> Node:
        value = getattr(self.graph, str(step.target))
        if value.dim() != len(index):
            raise _UnknownError("a look-up that leaves dimensions")
        if value.dim() == 0 and not any(value is t for t in self.tensors.values()):
            return Constant(value.item())
        names = [name for name, tensor in self.tensors.items() if tensor is value or _same_storage(tensor, value)]
        name = names[0] if names else f"tensor_{str(step.target).removeprefix('_tensor_constant')}"
        kind = Kind.BOOL if value.dtype is torch.bool else Kind.REAL if value.is_floating_point() else Kind.INT
        owner = self.tensors.get(name, value)
        learnable = bool(owner.requires_grad)
        spec = TensorSpec(name, tuple(f"{name}_{d}" for d in range(value.dim())), kind, learnable, value=owner)
        return Load(spec, index)

    def number(self, node: Node) -> Node:
        return Apply("where", (node, Constant(1), Constant(0))) if node.kind is Kind.BOOL else node

    def cast(self, node: Node, dtype: Any) -> Node:
        if (
            dtype is None
            or (dtype in _INTEGERS and node.kind is Kind.INT)
            or (dtype in _FLOATS and node.kind is Kind.REAL)
        ):
            return node
        if dtype is torch.bool:
            return node if node.kind is Kind.BOOL else Apply("ne", (node, Constant(0)))
        number = self.number(node)
        if dtype in _FLOATS:
            return Apply("mul", (number, Constant(1.0)))
        if dtype in _INTEGERS:
            if number.kind is Kind.INT:
                return number
            down = Apply("floor", (number,))
            up = Apply("neg", (Apply("floor", (Apply("neg", (number,)),)),))
            return Apply("where", (Apply("ge", (number, Constant(0.0))), down, up))
        raise _UnknownError(f"a conversion to {dtype}")

    def op_add(self, step: Step, a: Node, b: Node) -> Node:
        alpha = step.kwargs.get("alpha", 1)
        a, b = self.number(a), self.number(b)
        return Apply("add", (a, b if alpha == 1 else Apply("mul", (b, self.node(alpha)))))

    def op_sub(self, step: Step, a: Node, b: Node) -> Node:
        alpha = step.kwargs.get("alpha", 1)
        a, b = self.number(a), self.number(b)
        return Apply("sub", (a, b if alpha == 1 else Apply("mul", (b, self.node(alpha)))))

    def op_rsub(self, step: Step, a: Node, b: Node) -> Node:
        return self.op_sub(step, b, a)

    def op_div(self, step: Step, a: Node, b: Node, *_: Node) -> Node:
        mode = step.kwargs.get("rounding_mode")
        if mode is None:
            return Apply("div", (a, b))
        if a.kind is Kind.INT and b.kind is Kind.INT:
            return Apply("floordiv" if mode == "floor" else "truncdiv", (a, b))
        raise _UnknownError(f"division of reals with rounding_mode={mode!r}")

    def op_floor_divide(self, step: Step, a: Node, b: Node) -> Node:
        if a.kind is Kind.INT and b.kind is Kind.INT:
            return Apply("floordiv", (a, b))
        raise _UnknownError("floor division of reals")

    def op_remainder(self, step: Step, a: Node, b: Node) -> Node:
        if a.kind is Kind.INT and b.kind is Kind.INT:
            return Apply("mod", (a, b))
        raise _UnknownError("remainder of reals")

    def op_fmod(self, step: Step, a: Node, b: Node) -> Node:
        if a.kind is Kind.INT and b.kind is Kind.INT:
            return Apply("truncmod", (a, b))
        raise _UnknownError("fmod of reals")

    def op_where(self, step: Step, condition: Node, a: Node, b: Node) -> Node:
        condition = self.cast(condition, torch.bool)
        if a.kind is Kind.BOOL and b.kind is Kind.BOOL:
            yes = Apply("and", (condition, a))
            return Apply("or", (yes, Apply("and", (Apply("not", (condition,)), b))))
        return Apply("where", (condition, self.number(a), self.number(b)))

    def op_clamp(self, step: Step, *_: Node) -> Node:
        value, *bounds = step.args
        low, high = [*bounds, None, None][:2]
        low, high = step.kwargs.get("min", low), step.kwargs.get("max", high)
        node = self.node(value)
        if low is not None:
            node = Apply("maximum", (node, self.node(low)))
        return node if high is None else Apply("minimum", (node, self.node(high)))

    def op_clamp_min(self, step: Step, a: Node, b: Node) -> Node:
        return Apply("maximum", (a, b))

    def op_clamp_max(self, step: Step, a: Node, b: Node) -> Node:
        return Apply("minimum", (a, b))

    def op_pow(self, step: Step, a: Node, b: Node) -> Node:
        if isinstance(b, Constant) and b.value == 2:
            return Apply("mul", (a, a))
        if isinstance(b, Constant) and b.value == 0.5:
            return Apply("sqrt", (a,))
        if isinstance(a, Constant) and a.value == 2:
            return Apply("exp2", (b,))
        raise _UnknownError("a general power")

    def op_floor(self, step: Step, a: Node) -> Node:
        return a if a.kind is Kind.INT else Apply("mul", (Apply("floor", (a,)), Constant(1.0)))

    def op_reciprocal(self, step: Step, a: Node) -> Node:
        return Apply("div", (Constant(1.0), a))

    def op_rsqrt(self, step: Step, a: Node) -> Node:
        return Apply("div", (Constant(1.0), Apply("sqrt", (a,))))


def _same_storage(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors show the same numbers in the same order: tracing may hand on a detached alias."""
    same = a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()
    return same and a.dtype == b.dtype and a.device == b.device


def to_flex(
    pattern: Pattern | str,
    *,
    heads: int = 1,
    q_len: int = 1,
    kv_len: int | None = None,
    **captured: Tensor | int | float,
) -> tuple[FlexFunction, FlexFunction | None]:
    """mask_mod and score_mod of a pattern, for plain flex_attention; score_mod is None where scores are untouched.

    ``heads``, ``q_len`` and ``kv_len`` matter only to patterns that mention them (alibi, per_head); captured tensors
    are bound by keyword. Raises ExpressionError for a gate on V or a sink, which a score_mod cannot express, and for
    selections, whose functions need their scores: compile those.
    """
    from flexsparse.block_masks import bind_functions

    functions, program = bind_functions(pattern, heads=heads, q_len=q_len, kv_len=kv_len, captured=captured)
    if program.selections:
        raise ExpressionError(
            f"to_flex({pattern})",
            got="a pattern with a selection",
            expected="masks and scores alone",
            mend="Use flexsparse.compile, which computes the selection at each call.",
        )
    if program.chosen:
        raise ExpressionError(
            f"to_flex({pattern})",
            got="a selection that depends on query and key",
            expected="functions of indices and of tensors that are known",
            mend="Use flexsparse.compile, which chooses the blocks at each call.",
        )
    if program.has_sink:
        raise ExpressionError(
            f"to_flex({pattern})",
            got="a pattern with a sink",
            expected="masks and scores alone: FlexAttention's functions give every term of the softmax a key",
            mend="Use flexsparse.compile, or apply out * sigmoid(lse - sink) to what flex_attention returns.",
        )
    return functions["mask_mod"], functions["score_mod"]
