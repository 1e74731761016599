"""SPARSEK of independent rows: the projection onto gates in [0, 1] that sum to k, with its exact gradient."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from flexsparse._torch import has_tangent
from flexsparse.errors import DtypeError, GradientError, NonFiniteScoresError, PatternArgumentError, ShapeError
from flexsparse.ops.range_search import Found

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def sparsek(z: Tensor, k: int, dim: int = -1, *, validate: bool = True) -> Tensor:
    """Gates ``p = clip(z - tau, 0, 1)`` along ``dim``, with tau the least threshold at which they sum to at most k.

    For finite rows this is ``argmin ||p - z||^2`` subject to ``0 <= p <= 1`` and ``sum p = k`` (all ones where
    n <= k); k = 1 is sparsemax. z: any shape, float16, bfloat16, float32 or float64; the result has z's shape and
    is float32, or float64 for float64. -inf has gate 0 and is no candidate; +inf has gate 1, and beyond k of them
    the first k do. The gradient is ``(diag(s) - s s^T / |s|) g`` with s marking the gates strictly between 0 and
    1, and 0 where there are none.
    Computed on a grid of exact integers: CPU and GPU give the same bits in every run. A GPU does not sort, and works
    under CUDA graphs and ``torch.func.vmap`` with ``validate=False``. ``torch.compile(fullgraph=True)`` takes it;
    autocast does not change it. Source of the operator: Lou, Jia, Zheng, Tu, arXiv 2406.16747.
    Raises DtypeError, PatternArgumentError for k < 1, ShapeError for an empty ``dim``, NonFiniteScoresError for
    NaN (one synchronisation on a GPU, switched off by ``validate=False``; then rows with NaN give NaN), and
    GradientError for a second derivative.
    """
    check_scores("z", z, k, validate)
    if isinstance(dim, bool) or not isinstance(dim, int) or not -z.dim() <= dim < z.dim():
        raise ShapeError("dim", got=repr(dim), expected=f"an integer from {-z.dim()} to {z.dim() - 1}")
    if z.shape[dim] == 0:
        raise ShapeError("z", got=f"size 0 along dim {dim}", expected="at least one score")
    rows = z.movedim(dim, -1)
    gates: Tensor = torch.ops.flexsparse.sparsek(rows.reshape(-1, rows.shape[-1]), min(k, BEYOND))[0]
    return gates.reshape(rows.shape).movedim(-1, dim)


# More than any row has. Operators take numbers of 64 bits.
BEYOND = 1 << 40


def check_scores(name: str, scores: Tensor, k: int, validate: bool) -> None:
    """The checks that every selection operator makes of its scores and its budget."""
    if not isinstance(scores, Tensor) or scores.dtype not in FLOATS:
        got = str(scores.dtype) if isinstance(scores, Tensor) else type(scores).__name__
        raise DtypeError(name, got=got, expected="a tensor of float16, bfloat16, float32 or float64")
    if scores.dim() == 0:
        raise ShapeError(name, got="a scalar", expected="at least one dimension")
    check_integer("k", k, 1)
    refuse_tangent(name, scores)
    if validate and not torch.compiler.is_compiling():
        refuse_nan(name, scores)


def refuse_tangent(name: str, tensor: Tensor) -> None:
    """Raise GradientError for a tensor with a forward-mode derivative, which an operator would drop."""
    if not torch.compiler.is_compiling() and has_tangent(tensor):
        raise GradientError(
            name,
            got="a tensor with a forward-mode derivative (torch.func.jvp, jacfwd, forward_ad)",
            expected="derivatives of the backward pass only",
            mend="Use torch.autograd.grad.",
        )


def check_integer(name: str, number: int, least: int) -> None:
    """Raise PatternArgumentError for what is no integer of at least ``least``."""
    if isinstance(number, bool) or not isinstance(number, int) or number < least:
        raise PatternArgumentError(name, got=repr(number), expected=f"an integer of at least {least}")


def refuse_nan(name: str, scores: Tensor) -> None:
    """Raise with the position of the first NaN; costs one synchronisation on a GPU."""
    bad = torch.isnan(scores)
    if bool(bad.any()):
        position = tuple(int(i) for i in bad.nonzero()[0])
        raise NonFiniteScoresError(
            name,
            got=f"NaN at {position} and {int(bad.sum()) - 1} more",
            expected="numbers; -inf excludes a key",
            mend="Find where the scorer diverged, or mask padding with -inf.",
        )


def result_dtype(scores: Tensor) -> torch.dtype:
    return torch.float64 if scores.dtype is torch.float64 else torch.float32


class Grid(NamedTuple):
    """Scores on a grid of integers, fine enough for float32 and coarse enough that int64 sums are exact.

    One ``unit`` is a score difference of 1. Equal scores, and scores that differ by exactly 1, stay so, which is
    what kinks and plateaus turn on. A grid step is at most ``range * size * 2^-61``, and tau moves by no more.
    """

    values: Tensor  # [R, N] int64, 0 for scores that are not finite
    unit: Tensor  # [R, 1] int64
    step: Tensor  # [R, 1] float64
    center: Tensor  # [R, 1] float64

    def to_scores(self, values: Tensor) -> Tensor:
        return values * self.step + self.center


def on_grid(scores: Tensor, finite: Tensor) -> Grid:
    """The finest grid on which the sums of a row cannot overflow; scores [R, N] float64."""
    top = torch.where(finite, scores, -torch.inf).amax(1, keepdim=True)
    bottom = torch.where(finite, scores, torch.inf).amin(1, keepdim=True)
    some = torch.isfinite(top)
    # Half of each first: the sum of two huge scores may overflow. A whole centre keeps whole scores whole.
    center = torch.where(some, (top / 2 + bottom / 2).round(), 0.0)
    extent = torch.where(some, torch.maximum(top - center, center - bottom), 0.0) + 1
    bits = 60 - max(scores.shape[1], 1).bit_length() - torch.frexp(extent).exponent
    step = torch.exp2(-bits.clamp(max=52).double())
    values = torch.where(finite, ((scores - center) / step).round(), 0.0).long()
    unit = (1 / step).round().clamp(min=1).long()
    return Grid(values, unit, step, center)


def events_of(grid: Grid, finite: Tensor) -> tuple[Tensor, Tensor]:
    """The 2n events of each row, at u (weight +1) and u - 1 (weight -1), side by side: [R, 2N] int64 both.

    Scores that are not finite have events of weight 0.
    """
    values = torch.stack((grid.values, grid.values - grid.unit), dim=-1).flatten(1)
    sign = torch.tensor([1, -1], device=values.device)
    return values, (finite.long().unsqueeze(-1) * sign).flatten(1)


class Threshold(NamedTuple):
    """tau as a score, and as the grid points around it, by which keys are classed exactly."""

    tau: Tensor  # float64; -inf where every candidate has gate 1, +inf where the certain ones exceed the budget
    floor: Tensor  # int64
    ceil: Tensor  # int64


_LOWEST = torch.iinfo(torch.int64).min


def threshold(grid: Grid, found: Found, budget: Tensor, edge: Tensor) -> Threshold:
    """tau from the sums over the events at or above the found position; found and budget [R, M], edge [R, N]."""
    upper = edge.gather(1, found.position.clamp(min=0))
    # f falls by `weight` a step below `upper`, where it is still within the budget by `room`.
    room = budget - (found.moment - found.weight * upper)
    weight = found.weight.clamp(min=1)
    floor, ceil = upper + (-room).div(weight, rounding_mode="floor"), upper - room.div(weight, rounding_mode="floor")
    # From the grid point above, so that any event between two kinks gives the same bits.
    tau = grid.to_scores(ceil.double() - room.remainder(weight).double() / weight.double())
    everything, nothing = found.weight <= 0, found.position < 0
    tau = tau.masked_fill(everything, -torch.inf).masked_fill(nothing, torch.inf)
    floor = floor.masked_fill(everything, _LOWEST).masked_fill(nothing, -_LOWEST - 1)
    ceil = ceil.masked_fill(everything, _LOWEST).masked_fill(nothing, -_LOWEST - 1)
    return Threshold(tau, floor, ceil)


class Projected(NamedTuple):
    gates: Tensor  # [R, N] float32, or float64 for float64
    inside: Tensor  # [R, N] bool: the gates strictly between 0 and 1, which alone have a gradient


def project(z: Tensor, k: int) -> Projected:
    """The gates of rows z [R, N], by sorting; ``ops.kernels.project`` gives the same bits without."""
    exact = z.double()
    finite, ones = torch.isfinite(exact), exact == torch.inf
    grid = on_grid(exact, finite)
    # A budget beyond the row is the row, which also keeps the product small.
    budget = (min(k, z.shape[1]) - ones.sum(1, keepdim=True)) * grid.unit
    values, weights = events_of(grid, finite)
    edge, order = values.sort(1, descending=True)
    weight = weights.gather(1, order)
    sum_weight, sum_moment = weight.cumsum(1), (weight * edge).cumsum(1)
    reached = sum_moment - sum_weight * edge
    position = (reached <= budget).long().sum(1, keepdim=True) - 1
    at = position.clamp(min=0)
    found = Found(position, sum_weight.gather(1, at), sum_moment.gather(1, at))
    tau = threshold(grid, found, budget, edge)
    inside = finite & (grid.values > tau.floor) & (grid.values - grid.unit < tau.ceil)
    gates = torch.where(inside, exact - tau.tau, (finite & (grid.values > tau.floor)).double())
    gates = torch.where(ones & (ones.cumsum(1) <= k), 1.0, gates.clamp(0, 1))
    return Projected(gates.masked_fill(torch.isnan(exact).any(1, keepdim=True), torch.nan).to(result_dtype(z)), inside)


def project_gradient(grad: Tensor, inside: Tensor, dtype: torch.dtype) -> Tensor:
    """dL/dz [R, N] in ``dtype`` from dL/dgates [R, N]."""
    kept = torch.where(inside, grad, 0).double()
    mean = kept.sum(1, keepdim=True) / inside.sum(1, keepdim=True).clamp(min=1)
    return torch.where(inside, kept - mean, 0).to(dtype)


@torch.library.custom_op("flexsparse::sparsek", mutates_args=())
def _sparsek(z: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Gates and inside of rows [R, N], as in ``Projected``."""
    # What is made of it has its strides, and is promised to be contiguous.
    z = z.contiguous()
    if z.is_cuda:
        from flexsparse.ops import kernels

        return kernels.project(z, k)
    return project(z, k)


@_sparsek.register_fake
def _sparsek_shapes(z: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return z.new_empty(z.shape, dtype=result_dtype(z)), z.new_empty(z.shape, dtype=torch.bool)


@torch.library.custom_op("flexsparse::sparsek_backward", mutates_args=())
def _sparsek_backward(grad: Tensor, inside: Tensor, dtype: torch.dtype) -> Tensor:
    grad, inside = grad.contiguous(), inside.contiguous()
    if grad.is_cuda:
        from flexsparse.ops import kernels

        return kernels.project_gradient(grad, inside, dtype)
    return project_gradient(grad, inside, dtype)


@_sparsek_backward.register_fake
def _sparsek_backward_shapes(grad: Tensor, inside: Tensor, dtype: torch.dtype) -> Tensor:
    return grad.new_empty(grad.shape, dtype=dtype)


def _save(ctx: Any, inputs: tuple[Tensor, int], output: tuple[Tensor, Tensor]) -> None:
    ctx.dtype = inputs[0].dtype
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, None]:
    found = None
    if grad is not None:
        found = torch.ops.flexsparse.sparsek_backward(grad, ctx.saved_tensors[0], ctx.dtype)
    return found, None


def _refuse_second(ctx: Any, *_: Any) -> tuple[Any, ...]:
    raise GradientError(
        "sparsek",
        got="a second derivative of the gates in z",
        expected="first derivatives only",
        mend="The gradient is constant between the kinks of tau: detach it, or use create_graph=False.",
    )


_sparsek.register_autograd(_backward, setup_context=_save)
_sparsek_backward.register_autograd(_refuse_second)


def _mapped(info: Any, in_dims: tuple[int | None, None], z: Tensor, k: int) -> tuple[Any, Any]:
    """A mapped dimension is a batch dimension like any other: it joins the rows."""
    z = z.movedim(in_dims[0], 0) if in_dims[0] is not None else z.expand(info.batch_size, *z.shape)
    made = torch.ops.flexsparse.sparsek(z.flatten(0, 1), k)
    return tuple(x.unflatten(0, z.shape[:2]) for x in made), (0, 0)


def _mapped_backward(
    info: Any, in_dims: tuple[int | None, ...], grad: Tensor, inside: Tensor, dtype: torch.dtype
) -> tuple[Any, Any]:
    both = [
        x.movedim(dim, 0) if dim is not None else x.expand(info.batch_size, *x.shape)
        for x, dim in zip((grad, inside), in_dims, strict=False)
    ]
    found = torch.ops.flexsparse.sparsek_backward(*(x.flatten(0, 1) for x in both), dtype)
    return found.unflatten(0, both[0].shape[:2]), 0


torch.library.register_vmap(_sparsek, _mapped)
torch.library.register_vmap(_sparsek_backward, _mapped_backward)
