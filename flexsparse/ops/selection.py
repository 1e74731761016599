"""The causal selection operators that users call: checks, custom operators for torch.compile, and gradients."""

from __future__ import annotations

from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from flexsparse._torch import is_plain
from flexsparse.errors import DtypeError, GradientError, SegmentError, ShapeError
from flexsparse.ops import causal
from flexsparse.ops.causal import CausalSelection
from flexsparse.ops.projection import BEYOND, check_integer, check_scores, result_dtype


class CausalThresholds(NamedTuple):
    """By query: ``tau`` [..., S], and ``candidates`` [..., S] int32, how many keys above -inf it chooses from."""

    tau: Tensor
    candidates: Tensor


def causal_sparsek(
    u: Tensor, k: int, after: int = 0, segments: Tensor | None = None, *, validate: bool = True
) -> CausalThresholds:
    """The SPARSEK threshold of every causal prefix, differentiable in u.

    Its gradient goes in equal parts to the candidates whose gates are strictly between 0 and 1; 0 where there are none.

    u [..., S] float16, bfloat16, float32 or float64, by position. Query i's candidates are the keys j <= i - after,
    of i's segment where ``segments`` ([S], or broadcastable to u, non-decreasing integers) is given. tau is float32
    (float64 for float64); -inf where at most k candidates are above -inf, +inf where more than k are +inf.
    Computed on a grid of exact integers: two runs, and CPU and GPU, give the same bits. O(S log S) time and O(S)
    memory for any input; a GPU takes rows of up to 2^24 scores. Works under ``torch.compile(fullgraph=True)``, CUDA
    graphs and ``torch.func.vmap`` (``validate=False`` both); autocast does not change it.
    Raises DtypeError, ShapeError, PatternArgumentError, SegmentError, NonFiniteScoresError for NaN unless
    ``validate=False`` (then tau is NaN from that position of that row on), and GradientError for a second derivative.
    """
    flat, rows = prepared_rows(u, k, after, segments, validate)
    tau, _, _, candidates, *_ = _selected(flat, k, after, rows, True, False, 0)
    return CausalThresholds(tau.reshape(u.shape), candidates.reshape(u.shape))


@torch.no_grad()
def causal_topk(
    u: Tensor, k: int, after: int = 0, segments: Tensor | None = None, *, validate: bool = True
) -> CausalSelection:
    """The hard top-k of every causal prefix, as one interval of queries and one slot for each key.

    Arguments and errors as in ``causal_sparsek``. On ties the earlier key stays; keys of -inf are never selected
    (death = birth). Not differentiable: gradients flow through the gates.
    """
    flat, rows = prepared_rows(u, k, after, segments, validate)
    *_, birth, death, slot, _ = _selected(flat, k, after, rows, False, True, 0)
    return CausalSelection(*(x.reshape(u.shape) for x in (birth, death, slot)))


@overload
def causal_select(
    u: Tensor, k: int, after: int = 0, segments: Tensor | None = None, *, validate: bool = True, chunk: None = None
) -> tuple[CausalThresholds, CausalSelection]: ...


@overload
def causal_select(
    u: Tensor, k: int, after: int = 0, segments: Tensor | None = None, *, validate: bool = True, chunk: int
) -> tuple[CausalThresholds, CausalSelection, Tensor]: ...


def causal_select(
    u: Tensor,
    k: int,
    after: int = 0,
    segments: Tensor | None = None,
    *,
    validate: bool = True,
    chunk: int | None = None,
) -> tuple[CausalThresholds, CausalSelection] | tuple[CausalThresholds, CausalSelection, Tensor]:
    """``causal_sparsek`` and ``causal_topk`` of the same scores, which sorts them once.

    With ``chunk``, at least 1, the ``slot_table`` for chunks of so many queries too; a GPU can make it beside the
    thresholds.
    """
    if chunk is not None:
        check_integer("chunk", chunk, 1)
    flat, rows = prepared_rows(u, k, after, segments, validate)
    *found, table = _selected(flat, k, after, rows, True, True, chunk or 0)
    tau, _, _, candidates, birth, death, slot = (x.reshape(u.shape) for x in found)
    thresholds, selection = CausalThresholds(tau, candidates), CausalSelection(birth, death, slot)
    if chunk is None:
        return thresholds, selection
    return thresholds, selection, table.reshape(*u.shape[:-1], *table.shape[1:])


def slot_table(selection: CausalSelection, k: int, chunk: int) -> Tensor:
    """The key in each slot as the query ``c * chunk`` finds it: [..., ceil(S / chunk), min(k, S)] int32, -1 for none.

    ``selection`` is what ``causal_topk`` gave for this k; ``chunk`` is at least 1. Raises PatternArgumentError.
    """
    if not isinstance(selection, CausalSelection):
        raise DtypeError(
            "selection", got=type(selection).__name__, expected="a CausalSelection, as causal_topk gives it"
        )
    check_integer("k", k, 1)
    check_integer("chunk", chunk, 1)
    shape = selection.birth.shape
    rows = [x.reshape(-1, shape[-1]) for x in selection]
    table = torch.ops.flexsparse.slot_table(*rows, min(k, shape[-1]), chunk)
    return table.reshape(*shape[:-1], *table.shape[1:])


def prepared_rows(
    u: Tensor, k: int, after: int, segments: Tensor | None, validate: bool
) -> tuple[Tensor, Tensor | None]:
    """Rows [R, S] of scores and of segment ids, after the checks."""
    check_scores("u", u, k, validate)
    check_integer("after", after, 0)
    size = u.shape[-1]
    if size == 0:
        raise ShapeError("u", got="no positions", expected="at least one score in the last dimension")
    rows = None if segments is None else _segment_rows(segments, u, validate)
    return u.reshape(-1, size), rows


def _segment_rows(segments: Tensor, u: Tensor, validate: bool) -> Tensor:
    if not isinstance(segments, Tensor) or segments.is_floating_point() or segments.is_complex():
        got = str(segments.dtype) if isinstance(segments, Tensor) else type(segments).__name__
        raise DtypeError("segments", got=got, expected="a tensor of integers")
    try:
        rows = segments.expand(u.shape).reshape(-1, u.shape[-1])
    except RuntimeError:
        raise ShapeError(
            "segments", got=str(tuple(segments.shape)), expected=f"[S] or a shape that broadcasts to {tuple(u.shape)}"
        ) from None
    if validate and not torch.compiler.is_compiling():
        check_sorted("segments", segments)
    return rows


def check_sorted(name: str, segments: Tensor) -> None:
    """Raise SegmentError with the first position at which the ids fall; one synchronisation on a GPU."""
    falls = segments[..., 1:] < segments[..., :-1]
    if bool(falls.any()):
        position = [int(i) for i in falls.nonzero()[0]]
        position[-1] += 1
        raise SegmentError(
            name,
            got=f"ids that fall at position {position if len(position) > 1 else position[0]}",
            expected="non-decreasing ids along the sequence",
            mend="Number the documents in the order in which they are packed.",
        )


_Eight = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _selected(u: Tensor, k: int, after: int, *rest: Any) -> _Eight:
    """The operator of these arguments, with gradients."""
    found: _Eight
    arguments = (min(k, BEYOND), min(after, BEYOND), *rest)
    if is_plain(u):
        found = _Selection.apply(u, *arguments)
    else:
        found = torch.ops.flexsparse.causal_selection(u, *arguments)
    return found


def _select(
    u: Tensor, k: int, after: int, segments: Tensor | None, thresholds: bool, lifetimes: bool, chunk: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """tau, floor, ceil, candidates, birth, death, slot of rows [R, S], and the slot table of those.

    What is not wanted is empty: the table where ``chunk`` is 0.
    """
    table: Tensor | None = None
    # What is made of it has its strides, and is promised to be contiguous.
    u = u.contiguous()
    if u.is_cuda:
        from flexsparse.ops import kernels

        found, lived, table, _ = kernels.select(
            u, k, after, segments, thresholds=thresholds, lifetimes=lifetimes, chunk=chunk
        )
    else:
        ranges = causal.ranges_of(u, after, segments)
        found = causal.thresholds(u, k, ranges) if thresholds else None
        lived = causal.lifetimes(u, k, ranges) if lifetimes else None
        if lived is not None and chunk:
            table = causal.slot_table(lived, min(k, u.shape[1]), chunk)
    if found is not None and lived is not None and table is not None:
        return (*found, *lived, table)
    none = _selection_shapes(u, k, after, segments, False, False, 0)
    first, second = found or none[:4], lived or none[4:7]
    return (*first, *second, none[7] if table is None else table)


_selection = torch.library.custom_op("flexsparse::causal_selection", _select, mutates_args=())


@_selection.register_fake
def _selection_shapes(
    u: Tensor, k: int, after: int, segments: Tensor | None, thresholds: bool, lifetimes: bool, chunk: int
) -> tuple[Tensor, ...]:
    some, none = tuple(u.shape), (0,)
    long, short = torch.int64, torch.int32
    first = [u.new_empty(some if thresholds else none, dtype=d) for d in (result_dtype(u), long, long, short)]
    second = [u.new_empty(some if lifetimes else none, dtype=short) for _ in range(3)]
    rows, size = u.shape
    table = (rows, -(-size // chunk), min(k, size)) if lifetimes and chunk else none
    return (*first, *second, u.new_empty(table, dtype=short))


def _gradient(grad: Tensor, u: Tensor, floor: Tensor, ceil: Tensor, after: int, segments: Tensor | None) -> Tensor:
    grad, u = grad.contiguous(), u.contiguous()
    if u.is_cuda:
        from flexsparse.ops import kernels

        return kernels.threshold_gradient(grad, u, floor, ceil, after, segments)
    return causal.threshold_gradient(grad, u, floor, ceil, causal.ranges_of(u, after, segments))


_selection_backward = torch.library.custom_op("flexsparse::causal_selection_backward", _gradient, mutates_args=())


@_selection_backward.register_fake
def _selection_backward_shapes(
    grad: Tensor, u: Tensor, floor: Tensor, ceil: Tensor, after: int, segments: Tensor | None
) -> Tensor:
    return u.new_empty(u.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    u, _, after, segments, thresholds, *_ = inputs
    ctx.after, ctx.thresholds = after, thresholds
    ctx.save_for_backward(u, output[1], output[2], segments)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    u, floor, ceil, segments = ctx.saved_tensors
    found = None
    if grad is not None and ctx.thresholds:
        # The operator refuses a second derivative.
        direct = is_plain(grad) and not torch.is_grad_enabled()
        run = _gradient if direct else torch.ops.flexsparse.causal_selection_backward
        found = run(grad, u, floor, ceil, ctx.after, segments)
    return found, None, None, None, None, None, None


def _refuse_second(ctx: Any, *_: Any) -> tuple[Any, ...]:
    raise GradientError(
        "causal_sparsek",
        got="a second derivative of tau in u",
        expected="first derivatives only",
        mend="The gradient is constant between the kinks of tau: detach it, or use create_graph=False.",
    )


class _Selection(torch.autograd.Function):
    """The operator where nothing but autograd sees it."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> _Eight:
        output = _select(*inputs)
        _save(ctx, inputs, output)
        ctx.mark_non_differentiable(*output[1:])
        return output

    backward = staticmethod(_backward)


_selection.register_autograd(_backward, setup_context=_save)
_selection_backward.register_autograd(_refuse_second)


@torch.library.custom_op("flexsparse::slot_table", mutates_args=())
def _slot_table(birth: Tensor, death: Tensor, slot: Tensor, k: int, chunk: int) -> Tensor:
    found = CausalSelection(birth, death, slot)
    if birth.is_cuda:
        from flexsparse.ops import kernels

        return kernels.slot_table(found, k, chunk)
    return causal.slot_table(found, k, chunk)


@_slot_table.register_fake
def _slot_table_shapes(birth: Tensor, death: Tensor, slot: Tensor, k: int, chunk: int) -> Tensor:
    return birth.new_empty(birth.shape[0], -(-birth.shape[1] // chunk), k)


def _mapped_selection(
    info: Any, in_dims: tuple[Any, ...], u: Tensor, k: int, after: int, segments: Tensor | None, *wanted: int
) -> tuple[Any, Any]:
    """A mapped dimension is a batch dimension like any other: it joins the rows."""
    batch = info.batch_size
    u = u.movedim(in_dims[0], 0) if in_dims[0] is not None else u.expand(batch, *u.shape)
    if segments is not None:
        segments = (
            segments.movedim(in_dims[3], 0) if in_dims[3] is not None else segments.expand(batch, *segments.shape)
        )
        segments = segments.flatten(0, 1)
    found = torch.ops.flexsparse.causal_selection(u.flatten(0, 1), k, after, segments, *wanted)
    made = tuple(x.unflatten(0, u.shape[:2]) if x.dim() > 1 else x for x in found)
    return made, tuple(0 if x.dim() > 1 else None for x in made)


torch.library.register_vmap(_selection, _mapped_selection)
