"""The operators on a GPU. Causal ones: keys that may ever count are sorted, and searched for all prefixes at once."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from flexsparse.codegen.kernels import gate_inputs as gate_kernels
from flexsparse.codegen.kernels import grid as grids
from flexsparse.codegen.kernels import lifetimes as lifetime_kernels
from flexsparse.codegen.kernels import long_rows, pruning, rows, short_rows, staircase
from flexsparse.codegen.kernels import thresholds as threshold_kernels
from flexsparse.codegen.kernels.events import Ranked, merged_events, ranked
from flexsparse.codegen.kernels.gate_inputs import Finite, GateInputs
from flexsparse.codegen.kernels.grid import Quantized
from flexsparse.codegen.kernels.pruning import Kept, Left
from flexsparse.codegen.kernels.recording import Aside, operate, repeated
from flexsparse.codegen.kernels.sorting import ranked_by_merging
from flexsparse.errors import ShapeError
from flexsparse.ops.causal import CausalSelection, Thresholds, bounds_of
from flexsparse.ops.projection import Projected, result_dtype

# Blocks of 512 keys are the second dimension of a launch, which CUDA limits to 65,535.
_LONGEST = 1 << 24
# A row of up to so many scores has one program; from so many rows on, one of up to four times as many.
_ONE_PROGRAM = 8192
_MANY_ROWS = 64
# Scores of rows that are worked on together. Fewer would leave a GPU idle, more need room: some 100 bytes a score.
_TOGETHER = 1 << 22
# Rows from this length on are taken one by one, so that what they need in between is little of the results.
_ALONE = 1 << 20
# From so many scores on the host is done before the GPU.
_BESIDE = 1 << 21
_LONGEST_ROW = 1 << 30


class Wanted(NamedTuple):
    """Room for what is wanted of rows; each may be missing: a table without lifetimes, gates without thresholds."""

    thresholds: Thresholds | None
    lifetimes: CausalSelection | None
    table: Tensor | None
    gates: GateInputs | None

    @property
    def tensors(self) -> list[Tensor]:
        table = () if self.table is None else (self.table,)
        return [*(self.thresholds or ()), *(self.lifetimes or ()), *table, *(self.gates or ())]

    def of(self, rows: slice) -> Wanted:
        return Wanted(
            None if self.thresholds is None else Thresholds(*(x[rows] for x in self.thresholds)),
            None if self.lifetimes is None else CausalSelection(*(x[rows] for x in self.lifetimes)),
            None if self.table is None else self.table[rows],
            None if self.gates is None else GateInputs(*(x[rows] for x in self.gates)),
        )


def select(
    u: Tensor,
    k: int,
    after: int,
    segments: Tensor | None,
    *,
    thresholds: bool,
    lifetimes: bool,
    chunk: int = 0,
    finite: Finite | None = None,
) -> Wanted:
    """Thresholds and lifetimes, as wanted, of the rows u [R, S] (contiguous) with segment ids [R, S] or none.

    With lifetimes, and unless ``chunk`` is 0, the slot table for chunks of so many queries; with thresholds, and with
    what stands for infinities, what gates read.
    Rows are taken in groups, so that what is needed in between does not grow with their number.
    """
    rows, size = u.shape
    if size > _LONGEST:
        raise ShapeError("u", got=f"{size} scores in a row", expected=f"at most {_LONGEST} on a GPU")
    found, lived, table, gates = None, None, None, None
    if thresholds:
        made = [u.new_empty(u.shape, dtype=d) for d in (result_dtype(u), torch.int64, torch.int64, torch.int32)]
        found = Thresholds(*made)
        if finite is not None:
            gates = GateInputs(*(torch.empty_like(found.tau) for _ in range(3)))
    if lifetimes:
        lived = CausalSelection(*(u.new_empty(u.shape, dtype=torch.int32) for _ in range(3)))
        if chunk:
            table = u.new_empty((rows, -(-size // chunk), min(k, size)), dtype=torch.int32)
    wanted = Wanted(found, lived, table, gates)
    bounds = _bounds(segments)
    together = 1 if size >= _ALONE else max(1, _TOGETHER // max(size, 1))
    if rows <= together:
        _select_group(u, k, after, bounds, wanted, chunk, finite)
        return wanted
    for first in range(0, rows, together):
        group = slice(first, first + together)
        within = None if bounds is None else (bounds[0][group], bounds[1][group])
        _select_group(u[group], k, after, within, wanted.of(group), chunk, finite)
    return wanted


def _select_group(
    u: Tensor,
    k: int,
    after: int,
    bounds: tuple[Tensor, Tensor] | None,
    wanted: Wanted,
    chunk: int,
    finite: Finite | None,
) -> None:
    """As ``select``, into ``wanted``."""
    size = u.shape[1]
    # Beyond the row both mean the whole of it, and so fit 32 bits.
    budget, after = min(k, size), min(after, size)
    key = ("select", budget, after, chunk, finite, bounds is None, *[x is None for x in wanted])
    two = _side_by_side(u) and None not in wanted[:2]

    def run() -> None:
        thresholds, lifetimes, table, gates = wanted
        grid, keys, kept = _quantized_and_ranked(u, budget, after, bounds, wanted)
        # Side by side: short steps of one alone leave a GPU idle.
        beside = Aside(u.device, wanted=two)
        if lifetimes is not None:
            with beside.begun():
                _find_lifetimes(keys, grid, budget, after, bounds, kept, lifetimes, table, chunk)
        if thresholds is not None:
            _find_thresholds(keys, grid, budget, after, bounds, kept, thresholds)
            if gates is not None and finite is not None:
                gate_kernels.gate_inputs(u, thresholds.tau, thresholds.candidates, budget, finite, gates)
        # What the other stream reads is kept until it has joined.
        beside.join()

    repeated(key, [u, *(bounds or ())], wanted.tensors, run, two_streams=two)


def _quantized_and_ranked(
    u: Tensor, budget: int, after: int, bounds: tuple[Tensor, Tensor] | None, wanted: Wanted
) -> tuple[Quantized, Ranked, Kept | None]:
    """The grid and the order of all keys, or of those that are kept."""
    if short_rows.takes(u):
        return *short_rows.quantized_and_ranked(u, bounds), None
    if bounds is None and pruning.takes(u):
        candidates = None if wanted.thresholds is None else wanted.thresholds.candidates
        grid, kept = pruning.pruned(u, budget, after, Left(candidates, wanted.lifetimes))
        return grid, ranked_by_merging(grid), kept
    grid = grids.quantize(u)
    return grid, ranked(*_order(grid.score, bounds), grid), None


def _side_by_side(u: Tensor) -> bool:
    """Whether two streams spare time: a graph has them for nothing, a host takes longer than short rows run."""
    return u.is_cuda and (u.numel() >= _BESIDE or torch.cuda.is_current_stream_capturing())


def _find_thresholds(
    keys: Ranked,
    grid: Quantized,
    budget: int,
    after: int,
    bounds: tuple[Tensor, Tensor] | None,
    kept: Kept | None,
    out: Thresholds,
) -> None:
    events = merged_events(keys, grid, bounds)
    size = grid.value.shape[1]
    found = staircase.crossings(events, size, budget, counts=grid.counts, unit=grid.unit, segments=bounds)
    threshold_kernels.thresholds(found, events, grid, budget, after, bounds, kept, out)


def _find_lifetimes(
    keys: Ranked,
    grid: Quantized,
    budget: int,
    after: int,
    bounds: tuple[Tensor, Tensor] | None,
    kept: Kept | None,
    out: CausalSelection,
    table: Tensor | None,
    chunk: int,
) -> None:
    found = staircase.crossings(keys.counted, grid.value.shape[1], budget - 1, segments=bounds)
    lifetime_kernels.lifetimes(found.reach, keys.counted.place, grid, budget, after, bounds, kept, out)
    if table is not None:
        lifetime_kernels.slot_table(*out, table, chunk)


def threshold_gradient(
    grad: Tensor, u: Tensor, floor: Tensor, ceil: Tensor, after: int, segments: Tensor | None
) -> Tensor:
    """dL/du [R, S] in u's dtype from dL/dtau [R, S]."""
    after, bounds = min(after, u.shape[1]), _bounds(segments)
    grad, found = grad.contiguous(), torch.empty_like(u)

    def run() -> None:
        grid = grids.quantize(u, counted=False)
        threshold_kernels.threshold_gradient(grad, grid, floor, ceil, after, bounds, found)

    repeated(("gradient", after), [grad, u, floor, ceil, *(bounds or ())], [found], run)
    return found


def gated_gradient(
    flows: tuple[Tensor, Tensor],
    u: Tensor,
    found: Thresholds,
    after: int,
    segments: Tensor | None,
) -> Tensor:
    """dL/du [R, S] in u's dtype from what flows into the u and tau of ``gates``: [R, S] float32 each."""
    after, bounds = min(after, u.shape[1]), _bounds(segments)
    flows, total = (flows[0].contiguous(), flows[1].contiguous()), torch.empty_like(u)

    def run() -> None:
        direct, by_tau = gate_kernels.gate_input_gradients(u, found.tau, *flows)
        grid = grids.quantize(u, counted=False)
        threshold_kernels.threshold_gradient(by_tau, grid, found.floor, found.ceil, after, bounds, total, direct)

    repeated(("gated gradient", after), [*flows, u, *found[:3], *(bounds or ())], [total], run)
    return total


def project(z: Tensor, k: int) -> Projected:
    """As ``ops.projection.project``, for contiguous rows [R, N]."""
    gates, inside = rows.empty_gates(z, result_dtype(z))
    if z.numel():
        _form(z).gates_of_rows(z, min(k, z.shape[1]), gates, inside)
    return Projected(gates, inside.view(torch.bool))


def project_gradient(grad: Tensor, inside: Tensor, dtype: torch.dtype) -> Tensor:
    """As ``ops.projection.project_gradient``, for contiguous rows [R, N]."""
    found = torch.empty_like(grad, dtype=dtype)
    if grad.numel():
        _form(grad).flow_of_rows(grad, inside.view(torch.int8), found)
    return found


def _form(scores: Tensor) -> ModuleType:
    """The kernels for rows of this number and length."""
    count, size = scores.shape
    if size >= _LONGEST_ROW:
        raise ShapeError("z", got=f"{size} scores in a row", expected=f"fewer than {_LONGEST_ROW} on a GPU")
    return rows if size <= _ONE_PROGRAM * (1 if count < _MANY_ROWS else 4) else long_rows


def slot_table(found: CausalSelection, k: int, chunk: int) -> Tensor:
    """As ``ops.causal.slot_table``."""
    rows, size = found.birth.shape
    table = found.birth.new_empty(rows, -(-size // chunk), k)
    lifetime_kernels.slot_table(*found, table, chunk)
    return table


def _bounds(segments: Tensor | None) -> tuple[Tensor, Tensor] | None:
    if segments is None:
        return None
    start, end = bounds_of(segments)
    return start.int(), end.int()


def _order(score: Tensor, bounds: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """Keys by falling score, the earlier first on ties, later segments before earlier ones; and their scores.

    The scores are without NaN.
    """
    by_score, order = torch.empty_like(score), torch.empty_like(score, dtype=torch.int64)
    if bounds is None:
        operate(_sort, score, by_score, order)
    else:
        operate(_sort_by_segment, score, bounds[0], by_score, order)
    return order, by_score


def _sort(score: Tensor, by_score: Tensor, order: Tensor) -> None:
    torch.sort(score, dim=1, descending=True, stable=True, out=(by_score, order))


def _sort_by_segment(score: Tensor, start: Tensor, by_score: Tensor, order: Tensor) -> None:
    _sort(score, by_score, order)
    by_start = start.gather(1, order).sort(dim=1, descending=True, stable=True).indices
    order.copy_(order.gather(1, by_start))
    torch.gather(score, 1, order, out=by_score)
