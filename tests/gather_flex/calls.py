"""Calls over copies of selected keys, compared with the oracle, and what the functions of rows see."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import flexsparse as fs
from flexsparse.codegen.gathering.rows import Rows, rows_of
from flexsparse.pipeline import Bound, bind_call, compile_pattern
from flexsparse.runtime.inputs import Shapes
from flexsparse.runtime.rows import Tables, make_tables
from flexsparse.settings import Settings
from tests.helpers import assert_same_result, generated_mask, make_inputs, oracle, run, tensors_of
from tests.runtime import compositions

COMPOSITIONS: dict[str, Any] = {
    name: pattern for name, pattern in compositions.COMPOSITIONS.items() if fs.compile(pattern).ir.selections
}


def agree(pattern: Any, block: int = 16, change: Any = None, **shapes: Any) -> None:
    """Out, lse and all gradients are the oracle's in float64; ``change`` may write into the captured tensors."""
    inputs = make_inputs(tensors_of(pattern), **{"head_dim": 16, **shapes})
    if change is not None:
        with torch.no_grad():
            change(inputs.captured)
    got = run(fs.compile(pattern, backend="gather_flex_eager", block_size=block), inputs)
    assert_same_result(got, run(oracle(pattern), inputs))


def bound_rows(pattern: Any, size: int, block: int, **shape: Any) -> tuple[Rows, Bound, Tables, Shapes, Any]:
    """The rows of a call on example tensors, its tiles, its tables, and its functions of rows."""
    inputs = make_inputs(tensors_of(pattern), size=size, **shape)
    compiled = compile_pattern(pattern.node)
    batch, heads = inputs.query.shape[:2]
    dim, device = inputs.query.shape[3], torch.device("cpu")
    shapes = Shapes(batch, heads, inputs.key.shape[1], size, size, dim, dim, torch.float64, device)
    needed = {spec.name for spec in compiled.program.tensors} | {s.scores for s in compiled.program.selections}
    captured = {name: tensor.detach() for name, tensor in inputs.captured.items() if name in needed}
    settings = Settings(backend="gather_flex_eager", block_size=block)
    operands = (inputs.query.detach(), inputs.key.detach())
    bound = bind_call(compiled, shapes, captured, settings, operands=operands, validate=True)
    rows = rows_of(compiled.program.selections, size, block)
    tables = make_tables(rows, bound.buffers)
    values = dict(bound.buffers) | {"key_of_row": tables.key, "row_group": heads // tables.heads}
    for n in range(len(rows.ks)):
        values |= {f"from_{n}": tables.from_[n], f"until_{n}": tables.until[n]}
    functions = compiled.rows.build(**{name: values[name] for name in compiled.rows.arguments})
    return rows, bound, tables, shapes, functions


def seen_rows(rows: Rows, shapes: Shapes, functions: Any) -> Tensor:
    """Which rows each query sees: [B, H, S, rows]."""
    return generated_mask(functions, replace(shapes, kv_len=rows.total))
