"""Example tensors for a pattern: whatever it captures, made up from a seed, and how to say so."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from flexsparse.analysis.tiles import index_errors
from flexsparse.compiler import CompiledAttention
from flexsparse.ir.nodes import Kind, Node, PerHead, TensorSpec, walk
from flexsparse.ir.program import Program, table_name
from flexsparse.runtime.inputs import Shapes
from flexsparse.tolerance import Call

_DOCUMENTS = 4


def fitting_heads(pattern: Node, least: int) -> int:
    """``least``, raised to a multiple of the entries of every ``per_head``."""
    return math.lcm(least, *(len(n.entries) for n in walk(pattern) if isinstance(n, PerHead)))


def example_captured(program: Program, shapes: Shapes, seed: int) -> dict[str, Tensor]:
    """A tensor for every name that the pattern asks for, on CPU, the same for the same seed.

    Scores [B, H_kv, S] are normal; segments and documents are non-decreasing ids of about four documents,
    lengths [B] lie in the upper half of S, other integers are 0 or 1, reals lie between 0 and 1. One boolean in
    eight is true along positions, every second one elsewhere; the parents of a tree are any earlier tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    cuts = _boundaries(shapes.kv_len, generator)
    segments = {s.segments for s in program.selections}
    free = _free_sizes(program, shapes)
    made = {}
    for spec in program.tensors:
        made[spec.name] = _tensor(spec, spec.name in segments, shapes, free, cuts, generator)
    for name in sorted({s.scores for s in program.selections}):
        made[name] = torch.randn(shapes.batch, shapes.kv_heads, shapes.kv_len, generator=generator)
    return made


def describe(program: Program, captured: Mapping[str, Tensor], seed: int) -> list[str]:
    """One line a tensor, saying that it is made up and how."""
    scores = {s.scores for s in program.selections}
    specs = {spec.name: spec for spec in program.tensors}
    lines = []
    for name, tensor in captured.items():
        if name in scores:
            what = "normal random scores"
        elif specs[name].encoding == "boundaries":
            what = f"boundaries {tensor.tolist()}"
        elif specs[name].encoding == "parents":
            what = "a random tree"
        elif specs[name].kind is Kind.INT and tensor.shape[-1] > 8:
            what = f"{len(tensor.unique())} documents"
        elif specs[name].kind is Kind.INT:
            what = f"{tensor.tolist()}"
        else:
            what = "random values"
        lines.append(f"{name}: example data, {what}, shape {list(tensor.shape)}, seed {seed}")
    if program.chosen:
        lines.append(f"query, key: example data, normal random values, from which blocks are chosen, seed {seed}")
    return lines


def example_call(attention: CompiledAttention, shapes: Shapes, seed: int) -> Call:
    """Normal random operands with example tensors, in the dtype and on the device of ``shapes``."""
    generator = torch.Generator().manual_seed(seed + 1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(shapes.device)

    keys = (shapes.batch, shapes.kv_heads, shapes.kv_len)
    queries = (shapes.batch, shapes.heads, shapes.q_len)
    captured = example_captured(attention.ir, shapes, seed)
    return Call(
        query=normal(*queries, shapes.head_dim),
        key=normal(*keys, shapes.head_dim),
        value=normal(*keys, shapes.value_dim),
        captured={name: tensor.to(shapes.device) for name, tensor in captured.items()},
        learned=learned_names(attention.ir),
        grad_out=normal(*queries, shapes.value_dim),
        grad_lse=normal(*queries),
    ).cast(shapes.dtype)


def example_operands(shapes: Shapes, seed: int) -> tuple[Tensor, Tensor]:
    """Normal random query [B, H, S_q, D] and key [B, H_kv, S_kv, D], for patterns whose mask depends on them."""
    generator = torch.Generator().manual_seed(seed + 1)
    query = torch.randn(shapes.batch, shapes.heads, shapes.q_len, shapes.head_dim, generator=generator)
    key = torch.randn(shapes.batch, shapes.kv_heads, shapes.kv_len, shapes.head_dim, generator=generator)
    return query.to(shapes.device), key.to(shapes.device)


def learned_names(program: Program) -> tuple[str, ...]:
    """The scores of selections and the learnable tensors: what receives gradients beside the operands."""
    return (*sorted({s.scores for s in program.selections}), *program.learnable)


def _boundaries(length: int, generator: torch.Generator) -> Tensor:
    """[N + 1] from 0 to length: about four documents of different lengths."""
    inner = torch.randperm(max(length - 1, 0), generator=generator)[: _DOCUMENTS - 1] + 1
    return torch.cat((torch.tensor([0]), inner.sort().values, torch.tensor([length])))


def _tensor(
    spec: TensorSpec,
    segments: bool,
    shapes: Shapes,
    free: Mapping[str, int],
    cuts: Tensor,
    generator: torch.Generator,
) -> Tensor:
    if spec.encoding == "boundaries":
        return cuts
    if spec.encoding == "parents":
        return (torch.rand(shapes.kv_len, generator=generator) * torch.arange(shapes.kv_len)).long() - 1
    size = [_known(shapes).get(dim, free.get(dim, 1)) for dim in spec.dims]
    if spec.kind is Kind.REAL:
        return torch.rand(size, generator=generator)
    if spec.kind is Kind.BOOL:
        return torch.rand(size, generator=generator) < (1 / 8 if spec.dims[-1] in ("s", "q") else 1 / 2)
    if segments or spec.dims[-1] in ("s", "q"):
        ids = torch.searchsorted(cuts, torch.arange(size[-1]), right=True) - 1
        return ids.expand(size).clone()
    if spec.dims == ("b",):
        return torch.randint(-(-shapes.kv_len // 2), shapes.kv_len + 1, size, generator=generator)
    return torch.randint(0, 2, size, generator=generator)


def _known(shapes: Shapes) -> dict[str, int]:
    return {"b": shapes.batch, "h": shapes.heads, "s": shapes.kv_len, "q": shapes.q_len}


def _free_sizes(program: Program, shapes: Shapes) -> dict[str, int]:
    """The least size of each dimension with a name of its own such that every look-up stays inside."""
    known = _known(shapes)
    tensors = {
        spec.name: torch.zeros([known.get(d, 1) for d in spec.dims], dtype=torch.int64) for spec in program.tensors
    }
    tensors |= {table_name(n): torch.tensor(values) for n, values in enumerate(program.tables)}
    sizes: dict[str, int] = {}
    for expression in program.expressions.values():
        for load, dim, _, high in index_errors(expression, shapes.sizes, tensors):
            name = load.tensor.dims[dim]
            if name not in known:
                sizes[name] = max(sizes.get(name, 1), high + 1)
    return sizes
