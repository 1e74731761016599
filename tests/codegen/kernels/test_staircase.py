"""Crossings of all prefixes against every prefix alone, through lattices of many levels on lists that are small.

As ``test_selection_kernels`` these run on a GPU, or in Triton's interpreter in a process of their own.
"""

from __future__ import annotations

import itertools
import os
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from flexsparse.ops import causal
from tests.ops.regimes import REGIMES, draw, in_forms

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = [
    *([] if INTERPRETED else [pytest.mark.gpu]),
    pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="needs a GPU or the interpreter"),
]
# Chunk and bucket of the coarsest lattice, the refinements after it, the table's slices and prefixes.
SHAPES = [
    (8, 16, (), 16, 16),
    (8, 8, (2,), 4, 8),
    (16, 32, (4, 2), 8, 16),
    (64, 64, (4, 8), 16, 16),
    (64, 16, (2, 2, 4), 16, 32),
    (16, 128, (16,), 32, 64),
]
CHOSEN = ("normal", "heavy ties", "position slope", "both infinities", "nearly equal", "gap wider than one")
CASES = [(regime, SHAPES[i % len(SHAPES)], 59) for i, regime in enumerate(CHOSEN)]
CASES += [("falling", SHAPES[2], 45), ("rising", SHAPES[3], 64), ("all +inf", SHAPES[1], 17), ("normal", SHAPES[3], 1)]
if not INTERPRETED:
    CASES += [(regime, shape, 59) for regime in REGIMES for shape in SHAPES]
# Counts or sums, with segments or without: in the interpreter two of the four for each case.
RUNS = in_forms(CASES, (False, True), (False, True), lambda _: not INTERPRETED)


class Twin(NamedTuple):
    """Of every prefix t = 0 .. S: its crossing, and the sums over the events before every position, [S + 1, N + 1]."""

    reach: Tensor
    weight: Tensor
    moment: Tensor


def twin(code: Tensor, edge: Tensor, times: int, room: Tensor, first: Tensor, last: Tensor, *, count: bool) -> Twin:
    """One row: room, first and last position of its segment for every prefix t = 1 .. S."""
    size = len(code)
    sign = torch.where(code < 0, 0, 1 - 2 * (code & 1)).long()
    t = torch.arange(times + 1)[:, None]
    earlier = ((code >> 1)[None, :] < t) & (code >= 0)[None, :]
    nothing = torch.zeros(times + 1, 1, dtype=torch.long)
    weight = torch.cat([nothing, (earlier * sign).cumsum(1)], 1)
    moment = torch.cat([nothing, (earlier * (sign if count else sign * edge)).cumsum(1)], 1)
    reached = moment[1:, :-1] - (0 if count else weight[1:, :-1] * edge)
    x = torch.arange(size)[None, :]
    within = (x < first[:, None]) | ((x < last[:, None]) & (reached <= room[:, None]))
    reach = within.long().cummin(1).values.sum(1)
    return Twin(torch.cat([torch.tensor([size]), reach]), torch.zeros_like(weight) if count else weight, moment)


def cells_of(reach: Tensor, times: int, size: int, chunk: int, bucket: int) -> list[tuple[int, int]]:
    """The path: in every chunk the buckets from that of its first prefix down to that of the next one's."""
    ends = [int(reach[min(t, times)]) for t in range(0, times + chunk, chunk)]
    found = []
    for column, (high, low) in enumerate(itertools.pairwise(ends)):
        for number in range(max(high - 1, 0) // bucket, max(low - 1, 0) // bucket - 1, -1):
            found.append((column, number))
    return found


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("regime", "shape", "times", "count", "segmented"), RUNS)
def test_every_cell_and_every_crossing_is_that_of_its_prefix_alone(
    regime: str, shape: Any, times: int, count: bool, segmented: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flexsparse.codegen.kernels import grid as grids
    from flexsparse.codegen.kernels import staircase
    from flexsparse.codegen.kernels.events import merged_events, ranked
    from flexsparse.ops import kernels

    u = torch.stack([draw(regime, times, seed) for seed in range(2)]).to(DEVICE)
    budget = 5
    bounds = None
    if segmented:
        ids = torch.randint(0, 4, (2, times), generator=torch.Generator().manual_seed(1)).sort(1).values
        start, end = causal.bounds_of(ids)
        bounds = start.int().to(DEVICE), end.int().to(DEVICE)
    grid = grids.quantize(u)
    keys = ranked(*kernels._order(grid.score, bounds), grid)
    events = keys.counted if count else merged_events(keys, grid, bounds)
    given = {} if count else {"counts": grid.counts, "unit": grid.unit}
    lattices = staircase.Lattices(*shape)
    monkeypatch.setattr(staircase, "lattices_for", lambda *_: lattices)
    levels: list[Any] = []
    made = staircase._levels

    def kept(*args: Any) -> Any:
        found, columns = made(*args)
        levels.extend(found)
        return found, columns

    monkeypatch.setattr(staircase, "_levels", kept)
    found = staircase.crossings(events, times, budget, segments=bounds, **given)
    size = events.code.shape[1]
    scale = size // times
    for row in range(2):
        start = torch.zeros(times, dtype=torch.long) if bounds is None else bounds[0][row].cpu().long()
        end = torch.full((times,), times) if bounds is None else bounds[1][row].cpu().long()
        room = torch.full((times,), budget)
        if not count:
            infinite = torch.cat([torch.zeros(1, dtype=torch.long), grid.counts[row].cpu() >> 32])
            room = (budget - (infinite[1:] - infinite[start])) * int(grid.unit[row])
        wanted = twin(
            events.code[row].cpu(), events.edge[row].cpu(), times, room, scale * (times - end), scale * (times - start),
            count=count,
        )  # fmt: skip
        t = torch.arange(1, times + 1)
        assert found.reach[row].tolist() == wanted.reach[1:].tolist()
        if not count:
            assert found.weight[row].tolist() == wanted.weight[t, wanted.reach[1:]].tolist()
            assert found.moment[row].tolist() == wanted.moment[t, wanted.reach[1:]].tolist()
        assert len(levels) == 1 + len(lattices.factors)
        for level in levels:
            chunk, bucket = level.chunk, level.bucket
            path = cells_of(wanted.reach, times, size, chunk, bucket)
            columns = level.column[row].tolist()
            assert columns == [c for c, _ in path] + [-1] * (len(columns) - len(path))
            for at, (c, b) in enumerate(path):
                corner = (c * chunk, min((b + 1) * bucket, size))
                assert int(level.weight[row, at]) == int(wanted.weight[corner])
                assert int(level.moment[row, at]) == int(wanted.moment[corner])


def test_lattices_are_whole_small_enough_and_end_with_enough_cells() -> None:
    from flexsparse.codegen.kernels.staircase import lattices_for

    for rows in (1, 16, 512):
        for times in (1, 16, 17, 64, 1000, 4096, 65536, 1 << 20, 1 << 24):
            for scale in (1, 2):
                shape = lattices_for(rows, times, scale * times)
                assert shape.chunk * shape.prefixes >= times
                assert shape.prefixes == 16 or rows * scale * times * shape.prefixes <= 1 << 24
                assert shape.bucket % shape.slice == 0
                chunk = shape.chunk
                for factor in shape.factors:
                    assert 2 <= factor <= 8
                    assert chunk % factor == 0
                    chunk //= factor
                assert 16 <= chunk <= 128
    assert lattices_for(16, 4096, 8192).factors == (4,)
    assert lattices_for(16, 65536, 131072).factors == (8, 8)
    assert lattices_for(512, 16384, 32768).factors == (8,)
    assert lattices_for(8, 1 << 20, 1 << 21).factors == (8, 8, 8)
