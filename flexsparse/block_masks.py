"""``block_mask``: torch's BlockMask of a pattern, for use with plain flex_attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flexsparse.codegen.block_mask import make_block_mask
from flexsparse.codegen.flex import opaque_functions
from flexsparse.errors import ShapeError
from flexsparse.expression import Expression, Pattern
from flexsparse.ir.nodes import Node
from flexsparse.ir.program import Program
from flexsparse.ir.scalars import scalars_of, without_defaults
from flexsparse.parser import parse
from flexsparse.pipeline import Compiled, classify_tiles, compile_pattern
from flexsparse.runtime.buffers import make_buffers, needs_operands, refuse_outside
from flexsparse.runtime.inputs import Shapes, check_captured, with_values
from flexsparse.runtime.numbers import split_numbers
from flexsparse.settings import Settings

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


def block_mask(
    pattern: Pattern | str,
    q_len: int,
    kv_len: int | None = None,
    batch: int = 1,
    heads: int = 1,
    device: torch.device | str | None = None,
    block_size: int = 128,
    **captured: Tensor | int | float | None,
) -> BlockMask:
    """The BlockMask of a pattern: which tiles of queries x keys are empty, partial or full, and its mask_mod.

    ``kv_len`` defaults to q_len, ``device`` to that of the captured tensors, else the default device. A mask that
    does not depend on batch or head has 1 in their place, which flex_attention broadcasts. Only the mask is used:
    scores, gates and sink of the pattern are left out (``Pattern.to_flex`` gives those that FlexAttention can express).
    Work and memory grow with the tiles that exist; captured tensors enter through range minima and maxima. Rows
    of a large mask may share the storage of their indices, and its index tensors may be narrower than the number
    of key tiles; ``BlockMask.to_dense`` needs the full width, which masks up to 16 MiB of indices have.
    Raises ShapeError for lengths below 1, ExpressionError for a selection that depends on query and key, and the
    errors of a call for captured tensors.
    """
    kv_len = q_len if kv_len is None else kv_len
    for name, size in (("q_len", q_len), ("kv_len", kv_len), ("batch", batch), ("heads", heads)):
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ShapeError(name, got=repr(size), expected="an integer of at least 1")
    settings = Settings(block_size=block_size)
    expression = _parsed(pattern)
    numbers, tensors = split_numbers(scalars_of(expression.node), captured)
    compiled = compile_pattern(without_defaults(expression.node)).numbered(numbers)
    if compiled.program.chosen:
        raise needs_operands(f"block_mask({expression})")
    shapes, buffers = _bound(expression.node, compiled, (q_len, kv_len), batch, heads, device, tensors)
    refuse_outside(compiled.program, shapes, buffers)
    tiles = classify_tiles(compiled.program, shapes, settings, buffers)
    return make_block_mask(tiles, _functions(compiled, buffers)["mask_mod"])


def bind_functions(
    pattern: Pattern | str,
    *,
    heads: int,
    q_len: int,
    kv_len: int | None,
    captured: Mapping[str, Tensor | int | float | None],
) -> tuple[dict[str, Any], Program]:
    """The generated functions with their tensors, and the program that they came from."""
    node = _parsed(pattern).node
    numbers, tensors = split_numbers(scalars_of(node), captured)
    compiled = compile_pattern(without_defaults(node)).numbered(numbers)
    if compiled.program.selections or compiled.program.chosen:
        return {}, compiled.program
    _, buffers = _bound(node, compiled, (q_len, kv_len or q_len), None, heads, None, tensors)
    return _functions(compiled, buffers), compiled.program


def _parsed(pattern: Pattern | str) -> Expression:
    return parse(pattern) if isinstance(pattern, str) else pattern


def _bound(
    node: Node,
    compiled: Compiled,
    lengths: tuple[int, int],
    batch: int | None,
    heads: int,
    device: torch.device | str | None,
    captured: Mapping[str, Tensor | None],
) -> tuple[Shapes, dict[str, Any]]:
    """The shapes and what the functions read. ``batch`` and ``device`` that are None are those of the tensors."""
    given = with_values(node, captured)
    tensors = {name: tensor for name, tensor in given.items() if isinstance(tensor, Tensor)}
    if device is None:
        device = next((t.device for t in tensors.values()), torch.get_default_device())
    if batch is None:
        rows = {spec.name for spec in compiled.program.tensors if spec.dims[:1] == ("b",)}
        batch = next((t.shape[0] for name, t in tensors.items() if name in rows), 1)
    # A device may be written without its number.
    where = torch.empty(0, device=device).device
    shapes = Shapes(batch, heads, heads, *lengths, 64, 64, torch.float32, where)
    checked = check_captured(compiled.program, shapes, given, validate=True)
    return shapes, make_buffers(compiled.program, shapes, checked)


def _functions(compiled: Compiled, buffers: Mapping[str, Any]) -> dict[str, Any]:
    values = {**buffers, **opaque_functions(compiled.program)}
    return compiled.generated.build(**{name: values[name] for name in compiled.generated.arguments})
