"""The tensors that generated functions read: captured ones, tables, and what each selection was resolved to."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from flexsparse.codegen.emitter import ARGUMENT
from flexsparse.codegen.flex import selection_arguments
from flexsparse.errors import CapturedError, ExpressionError
from flexsparse.ir.program import Program, table_name
from flexsparse.ir.text import text
from flexsparse.ops.blocks import choose_blocks
from flexsparse.ops.capped_softmax import causal_capped_softmax
from flexsparse.ops.causal import CausalSelection
from flexsparse.ops.gated import gate_inputs, gated_select
from flexsparse.ops.selection import causal_topk
from flexsparse.runtime.inputs import Shapes, refuse_beyond_keys
from flexsparse.runtime.numbers import as_argument


def make_buffers(
    program: Program,
    shapes: Shapes,
    captured: Mapping[str, Tensor],
    operands: tuple[Tensor, Tensor] | None = None,
    selected: Mapping[str, Tensor] | None = None,
    chunk: int = 0,
) -> dict[str, Any]:
    """Every value that ``Generated.build`` may ask for, by name.

    ``operands`` are query [B, H, S_q, D] and key [B, H_kv, S_kv, D], from which blocks are chosen; ``selected`` is
    what ``selection_buffers`` gave, where it was asked before. Without it scores are read from ``captured``; ``chunk``
    is that of ``selection_buffers``.
    Raises ExpressionError where the pattern needs them and they are not given, ShapeError for queries beyond the keys.
    """
    real = torch.float64 if shapes.dtype is torch.float64 else torch.float32
    buffers: dict[str, Any] = {spec.name: captured[spec.name] for spec in program.tensors}
    for number, values in enumerate(program.tables):
        dtype = torch.int64 if all(isinstance(v, int) for v in values) else real
        buffers[table_name(number)] = torch.tensor(values, dtype=dtype, device=shapes.device)
    _check_per_head(program, shapes.heads)
    buffers |= selection_buffers(program, captured, chunk) if selected is None else selected
    buffers |= dict(program.numbers)
    if program.numbers:
        buffers[ARGUMENT] = functools.partial(as_argument, real=real, device=shapes.device)
    for topk in program.chosen:
        if operands is None:
            raise needs_operands(text(topk))
        refuse_beyond_keys(shapes)
        buffers[topk.name] = choose_blocks(*operands, topk.k, topk.block, topk.score, shapes.q_offset)
    buffers |= {"q_len": shapes.q_len, "kv_len": shapes.kv_len, "heads": shapes.heads, "q_offset": shapes.q_offset}
    for number in range(len(program.selections)):
        buffers[f"group_{number}"] = shapes.heads // buffers[f"birth_{number}"].shape[1]
    return buffers


def selection_buffers(program: Program, captured: Mapping[str, Tensor], chunk: int = 0) -> dict[str, Tensor]:
    """What the selections of a program become by its scores: lifetimes, slots, and what their gates read.

    Unless ``chunk`` is 0, slot tables for chunks of so many queries too, where they cost less beside a selection.
    """
    buffers: dict[str, Tensor] = {}
    for number in range(len(program.selections)):
        buffers |= _selection(program, number, captured, chunk)
    return buffers


def needs_operands(argument: str) -> ExpressionError:
    """The error for a pattern that cannot be evaluated before query and key are known."""
    return ExpressionError(
        argument,
        got="a selection that depends on query and key",
        expected="a mask that is known before the call",
        mend="Use flexsparse.compile, which chooses the blocks and classifies the tiles at each call.",
    )


def _check_per_head(program: Program, heads: int) -> None:
    for entries in program.head_groups:
        if heads % entries:
            raise CapturedError(
                "per_head",
                got=f"{entries} entries for {heads} query heads",
                expected="a number of entries that divides the number of query heads",
            )


def _selection(program: Program, number: int, captured: Mapping[str, Tensor], chunk: int) -> dict[str, Tensor]:
    selection = program.selections[number]
    scores = captured[selection.scores]
    segments = None
    if selection.segments is not None:
        segments = captured[selection.segments]
        segments = segments.unsqueeze(1) if segments.dim() == 2 else segments
    arguments: dict[str, Any] = {"after": selection.after, "segments": segments, "validate": False}
    gated = f"u_{number}" in selection_arguments(program, number)
    if not gated:
        chosen = causal_topk(scores, selection.k, **arguments)
        return _lifetimes(number, chosen)
    if selection.gate == "capped_softmax":
        tau, count = causal_capped_softmax(scores, selection.k, **arguments)
        made = _lifetimes(number, causal_topk(scores, selection.k, **arguments))
        u, tau, least = gate_inputs(scores, tau, count, selection.k)
    else:
        u, tau, least, chosen, table = gated_select(scores, selection.k, selection.after, segments, chunk)
        made = _lifetimes(number, chosen) | ({} if table is None else {f"slots_{number}": table})
    made |= {f"u_{number}": u, f"tau_{number}": tau, f"least_{number}": least}
    if f"u_{number}_fixed" in selection_arguments(program, number):
        made |= {f"u_{number}_fixed": u.detach(), f"tau_{number}_fixed": tau.detach()}
    return made


def _lifetimes(number: int, chosen: CausalSelection) -> dict[str, Tensor]:
    return {f"{name}_{number}": tensor for name, tensor in chosen._asdict().items()}


def refuse_outside(program: Program, shapes: Shapes, buffers: Mapping[str, Any]) -> None:
    """Raise CapturedError where an index can leave its tensor; masks do not protect a look-up in a kernel."""
    from flexsparse.analysis.tiles import index_errors

    tensors = {name: value for name, value in buffers.items() if isinstance(value, Tensor)}
    for name, expression in program.expressions.items():
        for load, dim, low, high in index_errors(expression, shapes.sizes, tensors):
            size = tensors[load.tensor.name].shape[dim]
            raise CapturedError(
                f"{text(load)} in the {name}",
                got=f"an index from {low} to {high} in dimension {dim} of size {size}",
                expected=f"indices from 0 to {size - 1} for every query and key, hidden ones included",
                mend=f"Clamp it: minimum(maximum({text(load.index[dim])}, 0), {size - 1}).",
            )


def sequence_dims(program: Program, name: str) -> tuple[int, ...]:
    """The dimensions of a tensor that ``make_buffers`` makes which change with the lengths."""
    for spec in program.tensors:
        if spec.name == name:
            return tuple(n for n, dim in enumerate(spec.dims) if dim in ("s", "q"))
    if name in {topk.name for topk in program.chosen}:
        return (2, 3)
    derived = {n for i in range(len(program.selections)) for n in selection_arguments(program, i)}
    return (2,) if name in derived else ()
