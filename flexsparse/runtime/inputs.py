"""The checks of a call: shapes, dtypes, devices, captured tensors; each mistake has its own error."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flexsparse.analysis.tiles import Sizes
from flexsparse.errors import CapturedError, DeviceError, DtypeError, ShapeError, did_you_mean
from flexsparse.ir.nodes import Kind, Load, Node, TensorSpec, walk
from flexsparse.ir.program import Program
from flexsparse.ops.projection import FLOATS, refuse_nan
from flexsparse.ops.selection import check_sorted


@dataclass(frozen=True)
class Shapes:
    """Everything about a call that a plan depends on, without the tensors."""

    batch: int
    heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    head_dim: int
    value_dim: int
    dtype: torch.dtype
    device: torch.device
    q_offset: int = 0
    needs_grad: bool = False

    @property
    def sizes(self) -> Sizes:
        return Sizes(self.batch, self.heads, self.q_len, self.kv_len, self.q_offset)


def class_shapes(shapes: Shapes, modulus: int) -> Shapes:
    """The shapes of attention within classes, each of which is a row of its own."""
    length = shapes.q_len // modulus
    return replace(shapes, batch=shapes.batch * modulus, q_len=length, kv_len=length)


def shapes_of(query: Tensor, key: Tensor, value: Tensor, q_offset: int) -> Shapes:
    """Check query, key and value against each other.

    Raises ShapeError, DtypeError or DeviceError, naming the argument.
    """
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor):
            raise ShapeError(name, got=type(tensor).__name__, expected="a tensor [B, H, S, D]")
        if tensor.dim() != 4:
            mend = "Add the missing dimensions, such as query[None]." if tensor.dim() < 4 else ""
            raise ShapeError(
                name, got=f"shape {tuple(tensor.shape)}", expected="four dimensions [B, H, S, D]", mend=mend
            )
        if tensor.dtype not in FLOATS:
            raise DtypeError(name, got=str(tensor.dtype), expected="float16, bfloat16, float32 or float64")
        if tensor.dtype is not query.dtype:
            raise DtypeError(
                name,
                got=str(tensor.dtype),
                expected=f"query's dtype, {query.dtype}",
                mend="Convert with .to(query.dtype), or run the projections under one autocast.",
            )
        if tensor.device != query.device:
            raise DeviceError(
                name, got=str(tensor.device), expected=f"query's device, {query.device}", mend="Move it with .to(...)."
            )
        if tensor.is_meta:
            raise DeviceError(
                name,
                got="a tensor on meta, which has no values",
                expected="a device that computes",
                mend="Use bind(...) for a plan from shapes alone.",
            )
        if 0 in tensor.shape:
            raise ShapeError(name, got=f"shape {tuple(tensor.shape)}", expected="no dimension of size 0")
    batch, heads, q_len, head_dim = query.shape
    if key.shape[0] != batch or value.shape[0] != batch:
        got = f"key batch {key.shape[0]}, value batch {value.shape[0]}"
        raise ShapeError(
            "key, value", got=got, expected=f"query's batch, {batch}", mend="Expand them to query's batch."
        )
    if key.shape[:3] != value.shape[:3]:
        raise ShapeError(
            "value", got=f"shape {tuple(value.shape)}", expected=f"[B, H_kv, S_kv] of key, {tuple(key.shape[:3])}"
        )
    if key.shape[3] != head_dim:
        raise ShapeError("key", got=f"head_dim {key.shape[3]}", expected=f"query's head_dim, {head_dim}")
    if heads % key.shape[1]:
        raise ShapeError(
            "key",
            got=f"{key.shape[1]} KV heads for {heads} query heads",
            expected="a number of KV heads that divides the number of query heads",
            mend=f"Use one of {[n for n in range(1, heads + 1) if heads % n == 0]}.",
        )
    if isinstance(q_offset, bool) or not isinstance(q_offset, int) or q_offset < 0:
        raise ShapeError("q_offset", got=repr(q_offset), expected="an integer of at least 0, the position of query 0")
    return Shapes(
        batch,
        heads,
        key.shape[1],
        q_len,
        key.shape[2],
        head_dim,
        value.shape[3],
        query.dtype,
        query.device,
        q_offset,
    )


def check_scale(scale: float | None, head_dim: int) -> float:
    """``scale``, or 1 / sqrt(head_dim) where it is None."""
    if scale is None:
        return 1 / math.sqrt(head_dim)
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale):
        raise ShapeError("scale", got=repr(scale), expected="a finite int or float, or None for 1 / sqrt(head_dim)")
    return float(scale)


def with_values(pattern: Node, given: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """What was given, completed by the tensors that came with the expression. Raises as ``tensors_of``."""
    return completed_by(tensors_of(pattern), given)


def completed_by(values: Mapping[str, Tensor], given: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """What was given, and ``values`` where nothing was."""
    return {**values, **{name: tensor for name, tensor in given.items() if tensor is not None}}


def tensors_of(pattern: Node) -> dict[str, Tensor]:
    """The tensors that came with an expression (``from_flex``), by name.

    Raises CapturedError where two functions closed over different tensors under one name.
    """
    values: dict[str, Tensor] = {}
    for node in walk(pattern):
        if isinstance(node, Load) and node.tensor.value is not None:
            known = values.setdefault(node.tensor.name, node.tensor.value)
            if known is not node.tensor.value:
                raise CapturedError(
                    node.tensor.name,
                    got="two different tensors that traced functions call by this name",
                    expected="one tensor for each name",
                    mend="Rename the variable in one of the functions.",
                )
    return values


def check_captured(
    program: Program, shapes: Shapes, present: Mapping[str, Tensor], *, validate: bool
) -> dict[str, Tensor]:
    """The given tensors by name, complete and checked; boundaries become segment ids, batch rows are expanded.

    Raises CapturedError for a missing or unknown name, ShapeError, DtypeError, DeviceError, and under
    ``validate`` SegmentError and NonFiniteScoresError for values.
    """
    specs = {spec.name: spec for spec in program.tensors}
    score_names = {selection.scores for selection in program.selections}
    needed = {*specs, *score_names}
    # A tensor that the pattern names may be given, whatever simplification made of it.
    present = {name: tensor for name, tensor in present.items() if name not in program.idle}
    for name in present:
        if name not in needed:
            others = {scalar.name for scalar in program.printed.scalars}
            hint = did_you_mean(name, (needed | others) - set(present))
            hint = hint or ("The pattern takes no other." if needed else "The pattern takes no tensors.")
            raise CapturedError(name, got="a tensor that the pattern does not use", expected=_names(needed), mend=hint)
    for name in sorted(needed):
        if name not in present:
            what = "the scores of its selection" if name in score_names else f"dims {specs[name].dims}"
            raise CapturedError(
                name, got="nothing", expected=f"a tensor ({what})", mend=f"Pass {name}=... to the call."
            )
    for name, tensor in present.items():
        if not isinstance(tensor, Tensor):
            raise CapturedError(name, got=type(tensor).__name__, expected="a tensor")
        if tensor.device != shapes.device:
            raise DeviceError(
                name, got=str(tensor.device), expected=f"query's device, {shapes.device}", mend="Move it with .to(...)."
            )
    free: dict[str, tuple[int, str]] = {}
    checked = {name: _captured(spec, present[name], shapes, free, validate) for name, spec in specs.items()}
    for name in score_names:
        checked[name] = _scores(name, present[name], shapes, validate)
    if validate:
        for name in {s.segments for s in program.selections if s.segments is not None}:
            check_sorted(name, checked[name])
    return checked


def _names(names: set[str]) -> str:
    return f"only {', '.join(sorted(names))}" if names else "no captured tensors"


def _captured(
    spec: TensorSpec, tensor: Tensor, shapes: Shapes, free: dict[str, tuple[int, str]], validate: bool
) -> Tensor:
    name = spec.name
    fits = {
        Kind.INT: not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype is torch.bool),
        Kind.BOOL: tensor.dtype is torch.bool,
        Kind.REAL: tensor.is_floating_point(),
    }[spec.kind]
    if not fits:
        raise DtypeError(
            name,
            got=str(tensor.dtype),
            expected={Kind.INT: "integers", Kind.BOOL: "booleans", Kind.REAL: "floating point"}[spec.kind],
        )
    if tensor.requires_grad and not spec.learnable:
        raise CapturedError(
            name,
            got="a tensor that requires a gradient",
            expected="one that does not, as the pattern declares it without learnable=True",
            mend=f"Declare captured({name!r}, ..., learnable=True), or pass {name}.detach().",
        )
    if spec.encoding == "boundaries":
        return _segment_ids(name, tensor, shapes, validate)
    if spec.encoding == "parents":
        return _tree_walk(name, tensor, shapes)
    given = tuple(tensor.shape)
    if spec.dims[:1] == ("b",) and tensor.dim() == len(spec.dims) - 1:
        tensor = tensor.unsqueeze(0)
    if tensor.dim() != len(spec.dims):
        raise ShapeError(name, got=f"shape {tuple(tensor.shape)}", expected=f"dimensions {list(spec.dims)}")
    known = {"b": shapes.batch, "h": shapes.heads, "s": shapes.kv_len, "q": shapes.q_len}
    target = list(tensor.shape)
    for position, (dim, size) in enumerate(zip(spec.dims, tensor.shape, strict=True)):
        if dim == "b" and size == 1:
            target[position] = shapes.batch
        elif dim in known and size != known[dim]:
            raise ShapeError(
                name,
                got=f"size {size} in dimension {position - tensor.dim() + len(given)} of shape {given}",
                expected=f"{known[dim]}, the {_DIM_NAMES[dim]}",
            )
        elif dim not in known:
            first, owner = free.setdefault(dim, (size, name))
            if first != size:
                raise ShapeError(name, got=f"size {size} for {dim!r}", expected=f"{first}, as in {owner}")
    return tensor.expand(target)


_DIM_NAMES = {"b": "batch size", "h": "number of query heads", "s": "key length", "q": "query length"}


def _segment_ids(name: str, boundaries: Tensor, shapes: Shapes, validate: bool) -> Tensor:
    """Cumulative lengths [N + 1] -> the id of each position's document, [S] int64."""
    if boundaries.dim() != 1 or boundaries.shape[0] < 2:
        raise ShapeError(name, got=f"shape {tuple(boundaries.shape)}", expected="[N + 1] cumulative lengths, N >= 1")
    if validate:
        values = boundaries.tolist()
        if values[0] != 0 or values[-1] != shapes.kv_len or sorted(values) != values:
            raise ShapeError(
                name,
                got=f"{values[:8]}{'...' if len(values) > 8 else ''}",
                expected=f"non-decreasing numbers from 0 to the key length, {shapes.kv_len}",
                mend="Start with 0 and end with the total length of the packed sequence.",
            )
    positions = torch.arange(shapes.kv_len, device=boundaries.device, dtype=boundaries.dtype)
    return torch.searchsorted(boundaries.contiguous(), positions, right=True) - 1


def _tree_walk(name: str, parents: Tensor, shapes: Shapes) -> Tensor:
    """Parents [S] -> where a depth-first walk enters and leaves each token, [2, S] int64."""
    if tuple(parents.shape) != (shapes.kv_len,):
        raise ShapeError(name, got=f"shape {tuple(parents.shape)}", expected=f"[{shapes.kv_len}], a parent a token")
    return torch.ops.flexsparse.tree_walk(parents, name)


@torch.library.custom_op("flexsparse::tree_walk", mutates_args=())
def _walk_tree(parents: Tensor, name: str) -> Tensor:
    """``_tree_walk`` of parents that have the right shape; torch.compile does not trace the walk itself."""
    given = parents.tolist()
    for token, parent in enumerate(given):
        if not -1 <= parent < token:
            raise ShapeError(
                name,
                got=f"parent {parent} of token {token}",
                expected="an earlier token, or -1 for a root",
                mend="Order the tokens so that parents come before their children.",
            )
    sizes = [1] * len(given)
    for token in reversed(range(len(given))):
        if given[token] >= 0:
            sizes[given[token]] += sizes[token]
    # Each token starts where its earlier siblings end; the entry behind the last is that of the roots.
    enters, free = [0] * len(given), [0] * (len(given) + 1)
    for token, parent in enumerate(given):
        enters[token] = free[parent]
        free[parent] += sizes[token]
        free[token] = enters[token] + 1
    leaves = [enter + size for enter, size in zip(enters, sizes, strict=True)]
    return torch.tensor([enters, leaves], device=parents.device)


@_walk_tree.register_fake
def _walk_tree_shape(parents: Tensor, name: str) -> Tensor:
    return parents.new_empty(2, parents.shape[0], dtype=torch.int64)


def _scores(name: str, scores: Tensor, shapes: Shapes, validate: bool) -> Tensor:
    allowed = dict.fromkeys((1, shapes.kv_heads, shapes.heads))
    if scores.dtype not in FLOATS:
        raise DtypeError(name, got=str(scores.dtype), expected="floating point; float32 is best at any length")
    fits = scores.dim() == 3 and scores.shape[1] in allowed
    if not fits or scores.shape[0] != shapes.batch or scores.shape[2] != shapes.kv_len:
        mend = "Scores are one number a key: [B, heads, S]; squeeze a last dimension of 1." if scores.dim() == 4 else ""
        expected = " or ".join(f"[{shapes.batch}, {n}, {shapes.kv_len}]" for n in allowed)
        raise ShapeError(name, got=f"shape {tuple(scores.shape)}", expected=expected, mend=mend)
    refuse_beyond_keys(shapes)
    if validate and not torch.compiler.is_compiling():
        refuse_nan(name, scores)
    return scores


def refuse_beyond_keys(shapes: Shapes) -> None:
    """Raise ShapeError where a query stands beyond the last key: a selection from its prefix has no meaning there."""
    if shapes.q_offset + shapes.q_len > shapes.kv_len:
        raise ShapeError(
            "query",
            got=f"positions up to {shapes.q_offset + shapes.q_len - 1} with {shapes.kv_len} keys",
            expected="query positions below the key length, as the pattern selects from a causal prefix",
            mend="Pass the keys and scores of every position up to the last query.",
        )
