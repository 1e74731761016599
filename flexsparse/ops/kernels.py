"""The causal operators on a GPU: one sort of the scores, and the kernels of ``codegen.kernels`` around it."""

from __future__ import annotations

import torch
from torch import Tensor

from flexsparse.codegen.kernels import grid as grids
from flexsparse.codegen.kernels import lifetimes as lifetime_kernels
from flexsparse.codegen.kernels import staircase
from flexsparse.codegen.kernels import thresholds as threshold_kernels
from flexsparse.codegen.kernels.events import counted_events, merged_events
from flexsparse.errors import ShapeError
from flexsparse.ops.causal import CausalSelection, Thresholds, bounds_of
from flexsparse.ops.projection import result_dtype

# Blocks of 512 keys are the second dimension of a launch, which CUDA limits to 65,535.
_LONGEST = 1 << 24


def select(
    u: Tensor, k: int, after: int, segments: Tensor | None, *, thresholds: bool, lifetimes: bool
) -> tuple[Thresholds | None, CausalSelection | None]:
    """Thresholds and lifetimes, as wanted, of the rows u [R, S] (contiguous) with segment ids [R, S] or none."""
    size = u.shape[1]
    if size > _LONGEST:
        raise ShapeError("u", got=f"{size} scores in a row", expected=f"at most {_LONGEST} on a GPU")
    # Beyond the row both mean the whole of it, and so fit 32 bits.
    budget, after = min(k, size), min(after, size)
    bounds = _bounds(segments)
    grid = grids.quantize(u)
    order = _order(u, bounds)
    found_thresholds, found_lifetimes = None, None
    if thresholds:
        events = merged_events(order, grid.value, grid.alive, grid.unit, bounds)
        found = staircase.crossings(events, size, budget, counts=grid.counts, unit=grid.unit, segments=bounds)
        made = threshold_kernels.thresholds(found, events, grid, budget, after, bounds, result_dtype(u))
        found_thresholds = Thresholds(*made)
    if lifetimes:
        counted = counted_events(order)
        found = staircase.crossings(counted, size, budget - 1, segments=bounds)
        lived = lifetime_kernels.lifetimes(found.reach, counted.place, grid.alive, grid.counts, budget, after, bounds)
        found_lifetimes = CausalSelection(*lived)
    return found_thresholds, found_lifetimes


def threshold_gradient(
    grad: Tensor, u: Tensor, floor: Tensor, ceil: Tensor, after: int, segments: Tensor | None
) -> Tensor:
    """dL/du [R, S] in u's dtype from dL/dtau [R, S]."""
    grid, after = grids.quantize(u), min(after, u.shape[1])
    return threshold_kernels.threshold_gradient(grad.contiguous(), grid, floor, ceil, after, _bounds(segments), u.dtype)


def slot_table(found: CausalSelection, k: int, chunk: int) -> Tensor:
    """As ``ops.causal.slot_table``."""
    return lifetime_kernels.slot_table(*found, k, chunk)


def _bounds(segments: Tensor | None) -> tuple[Tensor, Tensor] | None:
    if segments is None:
        return None
    start, end = bounds_of(segments)
    return start.int(), end.int()


def _order(u: Tensor, bounds: tuple[Tensor, Tensor] | None) -> Tensor:
    """Keys by falling score, NaN as -inf, the earlier first on ties; later segments before earlier ones."""
    scores = torch.nan_to_num(u, nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    order = scores.sort(dim=1, descending=True, stable=True).indices
    if bounds is None:
        return order
    start = bounds[0].gather(1, order)
    return order.gather(1, start.sort(dim=1, descending=True, stable=True).indices)
