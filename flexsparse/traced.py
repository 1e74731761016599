"""A call under torch.compile: the checks and the selections are traced, the attention is one custom operator.

The operator names its pattern by a text, from which another process makes the same pattern again. What it computes,
forward and backward, is what an eager call computes; tiles are classified when it runs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import operator
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flexsparse._dynamo import is_whole_graph
from flexsparse._torch import OUTSIDE_GRAPHS, as_outside, autograd_inside, refuse_second_derivative
from flexsparse.errors import BackendError, FlexsparseError
from flexsparse.ir.program import Numbers
from flexsparse.pipeline import Bound, bind_checked, compile_pattern
from flexsparse.plan import choose
from flexsparse.runtime.buffers import selection_buffers
from flexsparse.runtime.inputs import Shapes, check_captured, check_scale, completed_by, shapes_of, tensors_of
from flexsparse.settings import CHUNK

if TYPE_CHECKING:
    from flexsparse.compiler import CompiledAttention
    from flexsparse.expression import Expression
    from flexsparse.settings import Settings

# The backends that the operator always runs. FlexAttention's have graphs of their own, which it runs where the one that
# is traced may not be left: without a graph of autograd they compute a call once more in its backward pass.
_OPERATED = ("gather", "chunked")
# Stands for any length: a long one, and a multiple of what residue classes are taken by.
_LENGTH = 55440
_ATTENTIONS: dict[str, CompiledAttention] = {}


def key_of(expression: Expression, settings: Settings) -> str:
    """A text from which another process can compile the same: the pattern, its settings, and a digest of both."""
    fields = {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings)}
    fields["kernel_options"] = dict(settings.kernel_options)
    digest = hashlib.sha256(repr((expression.node, fields)).encode()).hexdigest()[:16]
    # What JSON cannot say, another process cannot make again; the digest tells.
    return json.dumps({"pattern": str(expression), **fields, "digest": digest}, default=repr)


def remember(key: str, attention: CompiledAttention) -> None:
    """Keep what a key stands for."""
    _ATTENTIONS[key] = attention


def _attention_of(key: str) -> CompiledAttention:
    if key not in _ATTENTIONS:
        from flexsparse.compiler import compile

        fields = json.loads(key)
        text, digest = fields.pop("pattern"), fields.pop("digest")
        try:
            made: CompiledAttention | None = compile(text, **fields)
        except FlexsparseError:
            made = None
        if made is None or json.loads(made.key)["digest"] != digest:
            raise BackendError(
                "torch.ops.flexsparse.attend",
                got=f"the pattern {text}, which was traced in another process",
                expected="a pattern that its text says completely",
                mend="Call flexsparse.compile on the pattern in this process first.",
            )
        _ATTENTIONS[key] = made
    return _ATTENTIONS[key]


def attend_traced(
    attention: CompiledAttention,
    operands: tuple[Tensor, Tensor, Tensor],
    given: Mapping[str, Tensor | None],
    numbers: Numbers,
    scale: float | None,
    q_offset: int,
    validate: bool,
) -> tuple[Tensor, Tensor] | None:
    """out and lse as ``CompiledAttention.__call__`` gives them; None where the call is one ``outside_graphs``.

    The numbers of a call are constants of the graph.
    """
    key = attention.key
    if isinstance(scale, int | float) and not isinstance(scale, bool):
        scale = _constant(scale)
    if numbers:
        constants = [_constant(n) for _, n in numbers]
        key = _key_at(key, ",".join([name for name, _ in numbers]), *constants)
    shapes = shapes_of(*operands, q_offset)
    # What a choice is made by is constant in a graph; lengths are not, and count as far as they are equal.
    lengths = (_LENGTH, _LENGTH) if shapes.q_len == shapes.kv_len else (_LENGTH, 2 * _LENGTH)
    fixed = (shapes.heads, shapes.kv_heads, *lengths, shapes.head_dim, shapes.value_dim)
    inputs = [*operands, *(x for x in given.values() if x is not None)]
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    # Of a position that changes from call to call the graph knows only whether it is 0.
    offset = 1 if q_offset != 0 else 0
    backend = _backend(key, *(operator.index(n) for n in fixed), shapes.dtype, shapes.device, offset, needs_grad)
    if not backend:
        return None
    program = attention.ir if not numbers else _attention_of(key).ir
    values = {spec.name: spec.value for spec in program.tensors if spec.value is not None}
    captured = check_captured(program, shapes, completed_by(values, given), validate=False)
    selected = selection_buffers(program, captured, CHUNK if backend == "gather" else 0)
    tensors = {spec.name: captured[spec.name] for spec in program.tensors} | selected
    out, lse, *_ = torch.ops.flexsparse.attend(
        *operands,
        list(tensors.values()),
        ",".join(tensors),
        key,
        backend,
        check_scale(scale, shapes.head_dim),
        q_offset,
        validate,
    )
    return out, lse


def _constant(number: float) -> float:
    """By these calls Dynamo takes a number as it is; it would make a symbol of the second one it meets."""
    return operator.index(number) if isinstance(number, int) else number.__float__()


def attention_within(attention: CompiledAttention) -> CompiledAttention:
    """What a call with ``lengths`` computes, found while it is traced."""
    return _attention_of(_key_within(attention.key))


@torch.compiler.disable  # type: ignore[untyped-decorator]
def outside_graphs(attention: CompiledAttention, *operands: Tensor, **given: Any) -> Any:
    """A call that breaks the graph which is traced, for backends that build graphs of their own."""
    return attention(*operands, **given)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _key_within(key: str) -> str:
    return _attention_of(key).within_lengths.key


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _key_at(key: str, names: str, *values: int | float) -> str:
    """The key of the attention with these numbers as the defaults of its scalars."""
    made = _attention_of(key).with_values(**dict(zip(names.split(","), values, strict=True)))
    # Dynamo cannot wait for the lock of a property that is not cached yet.
    assert made.ir.gates is not None
    return made.key


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _backend(
    key: str,
    heads: int,
    kv_heads: int,
    q_len: int,
    kv_len: int,
    head_dim: int,
    value_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    q_offset: int,
    needs_grad: bool,
) -> str:
    """The backend of a call, chosen while it is traced; "" where it runs outside of the graph."""
    attention = _attention_of(key)
    tensors_of(attention.pattern.node)
    shapes = Shapes(1, heads, kv_heads, q_len, kv_len, head_dim, value_dim, dtype, device, q_offset, needs_grad)
    try:
        chosen = choose(attention.ir, shapes, attention.settings)[0]
    except BackendError:
        if attention.settings.fallback is None:
            raise
        chosen = "reference"
    if chosen in _OPERATED:
        return chosen
    if not is_whole_graph():
        return ""
    if chosen == "reference" or (device.type == "cpu" and not chosen.endswith("eager")):
        raise BackendError(
            f"backend={chosen!r}",
            got=f"a call on {device} that torch.compile(fullgraph=True) traces",
            expected="a backend that stands in one graph there",
            mend="Leave fullgraph out, so that the call breaks the graph, or use backend='chunked'.",
        )
    # Masks alone are run by what is best for the lengths of each call.
    return chosen if attention.ir.selections else attention.settings.backend


def _bound(
    attention: CompiledAttention,
    operands: tuple[Tensor, Tensor, Tensor],
    named: Mapping[str, Tensor],
    backend: str,
    q_offset: int,
    validate: bool,
) -> Bound:
    compiled = compile_pattern(attention.pattern.node, q_offset != 0)
    captured = {spec.name: named[spec.name] for spec in compiled.program.tensors}
    selected = {name: tensor for name, tensor in named.items() if name not in captured}
    return bind_checked(
        compiled,
        shapes_of(*operands, q_offset),
        captured,
        replace(attention.settings, backend=backend),
        operands=operands[:2],
        selected=selected,
        validate=validate,
    )


def _surroundings(backend: str) -> contextlib.AbstractContextManager[None]:
    """FlexAttention runs inside of an operator as it does outside."""
    return contextlib.nullcontext() if backend in _OPERATED else as_outside()


@torch.library.custom_op("flexsparse::attend", mutates_args=(), **OUTSIDE_GRAPHS)
def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tensors: list[Tensor],
    names: str,
    pattern: str,
    backend: str,
    scale: float,
    q_offset: int,
    validate: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """out, lse, and what the backward pass wants besides: level, share, and out and lse without a sink."""
    attention, operands = _attention_of(pattern), (query, key, value)
    named = dict(zip(names.split(","), tensors, strict=bool(tensors)))
    bound = _bound(attention, operands, named, backend, q_offset, validate)
    kept: list[Tensor] = []
    with _surroundings(backend), torch.no_grad():
        out, lse = attention.runner.run(bound, scale, operands, True, kept)
    level, share, plain_out, plain_lse = (query.new_empty(0) for _ in range(4))
    if kept:
        level, share = kept[2:]
    if kept and attention.ir.has_sink:
        plain_out, plain_lse = kept[:2]
    # Fake tensors are contiguous; an output that follows its query's strides is not.
    made = (out, lse, level, share, plain_out, plain_lse)
    return tuple(x.contiguous() for x in made)  # type: ignore[return-value]


@_attend.register_fake
def _attend_shapes(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tensors: list[Tensor],
    names: str,
    pattern: str,
    backend: str,
    *rest: Any,
) -> tuple[Tensor, ...]:
    out = query.new_empty(*query.shape[:3], value.shape[3])
    real = torch.float64 if query.dtype is torch.float64 else torch.float32
    rows = [query.new_empty(query.shape[:3], dtype=real) for _ in range(3)]
    none = [query.new_empty(0) for _ in range(4)]
    if backend != "gather":
        return (out, rows[0], *none)
    plain = (torch.empty_like(out), torch.empty_like(rows[0])) if _attention_of(pattern).ir.has_sink else none[:2]
    return (out, *rows, *plain)


@torch.library.custom_op("flexsparse::attend_backward", mutates_args=(), **OUTSIDE_GRAPHS)
def _attend_backward(
    d_out: Tensor,
    d_lse: Tensor,
    results: list[Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tensors: list[Tensor],
    wanted: list[bool],
    names: str,
    pattern: str,
    backend: str,
    scale: float,
    q_offset: int,
) -> list[Tensor]:
    """The gradients of those of query, key, value and tensors that are wanted."""
    attention = _attention_of(pattern)
    out, lse, level, share, plain_out, plain_lse = results
    kept = [out, lse] if backend == "chunked" else [out, lse, level, share]
    if backend == "gather" and attention.ir.has_sink:
        kept[:2] = plain_out, plain_lse
    leaves = [x.detach().requires_grad_(w) for x, w in zip((query, key, value, *tensors), wanted, strict=True)]
    operands = (leaves[0], leaves[1], leaves[2])
    named = dict(zip(names.split(","), leaves[3:], strict=bool(tensors)))
    with torch.no_grad():
        detached = {name: x.detach() for name, x in named.items()}
        bound = _bound(attention, operands, detached, backend, q_offset, False)
    with _surroundings(backend), autograd_inside():
        bound = replace(bound, buffers={**bound.buffers, **named})
        found = attention.runner.run(bound, scale, operands, True, [x.detach() for x in kept])
        pairs = [(x, g) for x, g in zip(found, (d_out, d_lse), strict=True) if x.requires_grad]
        ends, flows = zip(*pairs, strict=True)
        asked = [x for x, w in zip(leaves, wanted, strict=True) if w]
        gradients = torch.autograd.grad(ends, asked, flows, allow_unused=True)
    # An operator may return no tensor twice, and none of its inputs; contiguous, as its fake tensors are.
    solid = torch.contiguous_format
    return [
        torch.zeros_like(x, memory_format=solid) if g is None else g.clone(memory_format=solid)
        for x, g in zip(asked, gradients, strict=True)
    ]


@_attend_backward.register_fake
def _attend_backward_shapes(
    d_out: Tensor,
    d_lse: Tensor,
    results: list[Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tensors: list[Tensor],
    wanted: list[bool],
    *rest: Any,
) -> list[Tensor]:
    return [x.new_empty(x.shape) for x, w in zip((query, key, value, *tensors), wanted, strict=True) if w]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, key, value, tensors, *ctx.settings, _ = inputs
    ctx.save_for_backward(*output, query, key, value, *tensors)


def _backward(ctx: Any, d_out: Tensor, d_lse: Tensor, *_: Any) -> tuple[Any, ...]:
    results, inputs = ctx.saved_tensors[:6], ctx.saved_tensors[6:]
    needs = [*ctx.needs_input_grad[:3], *ctx.needs_input_grad[3]]
    made = torch.ops.flexsparse.attend_backward(
        d_out, d_lse, list(results), *inputs[:3], list(inputs[3:]), needs, *ctx.settings
    )
    found = iter(made)
    gradients = [next(found) if wanted else None for wanted in needs]
    return (*gradients[:3], gradients[3:], *[None] * 6)


_attend.register_autograd(_backward, setup_context=_save)
_attend_backward.register_autograd(refuse_second_derivative)
