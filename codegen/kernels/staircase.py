"""All prefixes at once: how far down a sorted list each prefix of time gets within its budget, as Triton kernels.

Events stand in falling order of value; each has a time (the key it comes from). For every prefix of time, t = 1 .. S,
wanted is the number of leading positions x at which

    g(x) = sum over the events before x with time < t of w * (value - value at x)

is within a budget. As t grows the answer never rises: prefixes against positions it is a staircase. One walker with a
pointer to a time and one to a position would follow it in S + N steps, taking keys in and events out of two running
sums. To have many walkers, the staircase is found in a coarse lattice of times and positions first, and then in finer
ones (``lattice``):

1. ``table``: the sums over slices of positions, for 16 to 64 prefixes; ``outline``: the cells of a lattice of so many
   chunks of times which the staircase passes through;
2. ``refine``: the same for a lattice 2 to 8 times as fine, from the events and keys of each of these cells alone;
   repeated until there are enough cells, or they are small;
3. ``walk``: one walker a cell.

A refinement reads the events and keys of its path's cells alone, of which there are (S + N) / C at most with C events
and C keys each: S + N of either. There are O(log S) refinements: one for 16 rows of 4,096, two for 16 of 65,536, three
for 8 of a million. So the work is O(S log S) at most for any input, and memory is O(S). All sums are of int64, hence
exact, every number is written once, and no atomics are used. Packed segments need nothing more than an order in which
later segments stand first: a prefix that ends in a segment has no event of a later one, and its limit is the end of its
own segment's stretch.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
from typing import NamedTuple

import torch
from torch import Tensor

from flexsparse.codegen.kernels.arithmetic import cdiv, next_power_of_2
from flexsparse.codegen.kernels.events import Events
from flexsparse.codegen.kernels.lattice import outline, refine, table, table_of_many
from flexsparse.codegen.kernels.launch import launch
from flexsparse.codegen.kernels.walk import walk

# Chunks of the coarsest lattice, and the comparisons of events with prefixes that its table may take: more chunks save
# a refinement, but each event is compared with every prefix.
_PREFIXES, _MOST_PREFIXES, _COMPARED = 16, 64, 1 << 24
# Times and positions of the finest lattice's cells, at least and at most, and how many walkers keep a device busy.
_SMALLEST, _LARGEST, _WALKERS = 16, 128, 1 << 15
_MOST_BITS = 3
# Times and positions of its cells at least, where rows have few keys left.
_LEAST = 4
# About how many programs the table has, and the events that a lane of a refinement takes.
_PROGRAMS, _EVENTS_A_LANE = 1024, 32
# Walkers of one program.
_LANES = 32


class Lattices(NamedTuple):
    """The coarsest lattice, how many times as fine each following one is, and how the table cuts the positions.

    ``prefixes`` chunks of it have entries in the table.
    """

    chunk: int
    bucket: int
    factors: tuple[int, ...]
    slice: int
    prefixes: int

    @property
    def halvings(self) -> int:
        """How often all of these sizes may be halved for rows that have fewer keys."""
        finest = min(self.chunk, self.bucket) // math.prod(self.factors)
        return max(0, min(finest // _LEAST, self.slice).bit_length() - 1)


class Crossings(NamedTuple):
    """For the prefix of t times, at [r, t - 1]: the number of positions, and the sums over the events before.

    A count has no sums, and its ``found`` is [R, S] int32. Else ``found`` is [R, S, 2] int64: weight and number in the
    upper and the lower half of the first, moment the second.
    """

    found: Tensor

    @property
    def reach(self) -> Tensor:
        return self.found if self.found.dim() == 2 else self.found.view(torch.int32)[..., 0]

    @property
    def weight(self) -> Tensor:
        return self.found.view(torch.int32)[..., 1]

    @property
    def moment(self) -> Tensor:
        return self.found[..., 1]


class Level(NamedTuple):
    """One lattice, and its cells at their numbers [R, chunks + buckets - 1]."""

    chunk: int
    bucket: int
    n_chunks: int
    n_buckets: int
    column: Tensor  # int32, -1 behind the path's end
    weight: Tensor  # int32
    moment: Tensor  # int64

    @property
    def sizes(self) -> tuple[int, ...]:
        return self[:4]

    @property
    def cells(self) -> tuple[Tensor, ...]:
        return self[4:]


@functools.lru_cache(maxsize=1024)
def lattices_for(rows: int, times: int, size: int) -> Lattices:
    """Lattices for ``rows`` lists of ``size`` events of ``times`` keys.

    A walk takes up to chunk + bucket steps, each of which waits for memory: cells are made so small that the walkers
    fill a device, and no smaller, for every refinement reads the list again. It reads a cell's events and its chunk's
    keys, 12 bytes and 16: about equal numbers of both, as in square cells, come close to the least. Factors beyond 8
    would save a launch, but each event is compared with twice as many prefixes.
    """
    prefixes = _MOST_PREFIXES
    while prefixes > _PREFIXES and rows * size * prefixes > _COMPARED:
        prefixes //= 2
    chunk = max(_SMALLEST, next_power_of_2(cdiv(times, prefixes)))
    wanted = _LARGEST
    while wanted > _SMALLEST and rows * (times + size) < wanted * _WALKERS:
        wanted //= 2
    bits = max(0, (chunk // wanted).bit_length() - 1)
    # A last halving is not worth a refinement more.
    bits -= int(bits > _MOST_BITS and bits % _MOST_BITS == 1 and wanted < _LARGEST)
    levels = cdiv(bits, _MOST_BITS)
    # The finer refinements have the more cells; they get the larger share.
    factors = tuple(1 << ((bits + level) // levels) for level in range(levels))
    length = min(chunk, max(_SMALLEST, next_power_of_2(cdiv(rows * size, _PROGRAMS))))
    return Lattices(chunk, chunk, factors, length, prefixes)


def crossings(
    events: Events,
    times: int,
    budget: int,
    *,
    counts: Tensor | None = None,
    unit: Tensor | None = None,
    segments: tuple[Tensor, Tensor] | None = None,
) -> Crossings:
    """The crossing of every prefix, for ``budget`` units, less one for each +inf in it; without ``unit``, of a count.

    counts [R, S] int64 as in ``Quantized``; unit [R] int64; segments: the first time of each time's segment and the
    one past its last, [R, S] int32 both. A count takes every weight as 1, and g as the number of events before.
    """
    rows, size = events.code.shape
    start, end = segments if segments is not None else (events.place, events.place)
    shared = (counts if counts is not None else events.place, start, end, unit if unit is not None else events.edge)
    lattices = lattices_for(rows, times, size)
    flags = {"COUNT": unit is None, "SEGMENTS": segments is not None, "HALVINGS": lattices.halvings}
    levels, columns = _levels(rows, times, size, lattices, events.code.device)
    coarse = levels[0]
    _outline(events, shared, flags, coarse, columns, lattices, times, budget)
    for factor, fine in zip(lattices.factors, levels[1:], strict=True):
        warps = max(1, min(8, factor * fine.bucket // (32 * _EVENTS_A_LANE)))
        # A lane takes one event of one part of a cell at a time.
        block = max(2, 32 * warps // factor)
        launch(
            refine, (coarse.column.numel(),), (*events, *shared, *coarse.cells, *fine.cells),
            (times, size, budget, coarse.n_buckets, coarse.column.shape[1], *fine.sizes), **flags,
            FACTOR=factor, BLOCK=block, UNROLL=min(4, cdiv(fine.bucket, block)), num_warps=warps,
        )  # fmt: skip
        coarse = fine
    shape, dtype = ((rows, times), torch.int32) if unit is None else ((rows, times, 2), torch.int64)
    found = torch.empty(shape, dtype=dtype, device=events.code.device)
    n_all = coarse.column.numel()
    launch(
        walk, (cdiv(n_all, _LANES),), (*events, *shared, *coarse.cells, found),
        (times, size, budget, *coarse.sizes, n_all), **flags, LANES=_LANES, num_warps=1,
    )  # fmt: skip
    return Crossings(found)


@functools.lru_cache(maxsize=1024)
def _sizes(rows: int, times: int, size: int, lattices: Lattices) -> list[tuple[int, int, int, int, int]]:
    """Of every lattice chunk, bucket, the numbers of both, and the room for its cells, a multiple of 32."""
    found = []
    for scale in itertools.accumulate((1, *lattices.factors), operator.mul):
        chunk, bucket = lattices.chunk // scale, lattices.bucket // scale
        chunks, buckets = cdiv(times, chunk), cdiv(size, bucket)
        found.append((chunk, bucket, chunks, buckets, 32 * cdiv(rows * (chunks + buckets - 1), 32)))
    return found


def _levels(
    rows: int, times: int, size: int, lattices: Lattices, device: torch.device
) -> tuple[list[Level], Tensor]:  # fmt: skip
    """Room for the cells of lattices, and all of their columns, unset; each array begins at a multiple of 128 bytes."""
    sizes = _sizes(rows, times, size, lattices)
    column = torch.empty(sum(length for *_, length in sizes), dtype=torch.int32, device=device)
    weight, moment = torch.empty_like(column), torch.empty_like(column, dtype=torch.int64)
    levels, first = [], 0
    for chunk, bucket, n_chunks, n_buckets, length in sizes:
        shape = (rows, n_chunks + n_buckets - 1)
        cells = [x[first : first + shape[0] * shape[1]].view(shape) for x in (column, weight, moment)]
        levels.append(Level(chunk, bucket, n_chunks, n_buckets, *cells))
        first += length
    return levels, column


def _outline(
    events: Events, shared: tuple[Tensor, ...], flags: dict[str, int], coarse: Level, columns: Tensor,
    lattices: Lattices, times: int, budget: int,
) -> None:  # fmt: skip
    """The path through the coarsest lattice, from a table over slices of positions; the others have no cells yet."""
    rows, size = events.code.shape
    length, prefixes = lattices.slice, lattices.prefixes
    n_slices = cdiv(size, length)
    weight = torch.empty(rows, prefixes, n_slices, dtype=torch.int32, device=events.code.device)
    n_columns = columns.numel()
    moment = torch.empty_like(weight, dtype=torch.int64)
    many = prefixes > 32
    shape: dict[str, int] = {"UNROLL": min(16, length), "num_warps": 1} if many else {"BLOCK": min(128, length)}
    launch(
        table_of_many if many else table, (rows * n_slices,),
        (events.code, events.edge, events.length, weight, moment, columns),
        (times, size, coarse.chunk, n_slices, length, n_columns, cdiv(n_columns, rows * n_slices)),
        COUNT=flags["COUNT"], HALVINGS=flags["HALVINGS"], PREFIXES=prefixes, **shape,
    )  # fmt: skip
    launch(
        outline, (rows * coarse.n_chunks,), (events.edge, events.length, *shared, weight, moment, *coarse.cells),
        (times, size, budget, *coarse.sizes, n_slices), **flags, PREFIXES=prefixes,
        BUCKETS=next_power_of_2(coarse.n_buckets), SLICES=coarse.bucket // length,
    )  # fmt: skip
