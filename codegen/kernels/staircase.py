"""All prefixes at once: how far down a sorted list each prefix of time gets within its budget, as Triton kernels.

Events stand in falling order of value; each has a time (the key it comes from). For every prefix of time, t = 1 .. S,
wanted is the number of leading positions x at which

    g(x) = sum over the events before x with time < t of w * (value - value at x)

is within a budget. As t grows the answer never rises: prefixes against positions it is a staircase. One walker with a
pointer to a time and one to a position would follow it in S + N steps, taking keys in and events out of two running
sums. To have many walkers, the staircase is found in a coarse lattice of times and positions first, and then in finer
ones (``lattice``):

1. ``table``: the sums over slices of positions, for 16 prefixes; ``outline``: the cells of a lattice of 16 chunks of
   times which the staircase passes through;
2. ``refine``: the same for a lattice 2 to 16 times as fine, from the events and keys of each of these cells alone;
   repeated until there are enough cells, or they are small;
3. ``walk``: one walker a cell.

A level reads the events and keys of its path alone, a small multiple of S + N of them, and there are O(log S) levels,
2 for a row of 65,536. So the work is O(S log S) at most for any input, and memory is O(S). All sums are of int64, hence
exact, every number is written once, and no atomics are used. Packed segments need nothing more than an order in which
later segments stand first: a prefix that ends in a segment has no event of a later one, and its limit is the end of its
own segment's stretch.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from flexsparse.codegen.kernels.events import Events
from flexsparse.codegen.kernels.lattice import outline, refine, table
from flexsparse.codegen.kernels.walk import walk

# The coarsest lattice has up to 16 chunks: a table of more prefixes costs more than a refinement.
_PREFIXES = 16
# Times and positions of the finest lattice's cells, at least and at most, and how many walkers keep a device busy.
_SMALLEST, _LARGEST, _WALKERS = 16, 128, 1 << 15
_MOST_BITS = 4
# About how many programs the table has, and how many warps a refinement where its cells allow.
_PROGRAMS, _WARPS = 1024, 8192
# Walkers of one program, and their steps before it looks whether all have arrived.
_LANES, _STEPS = 32, 4


class Lattices(NamedTuple):
    """The coarsest lattice, how many times as fine each following one is, and how the table cuts the positions."""

    chunk: int
    bucket: int
    factors: tuple[int, ...]
    slice: int

    @property
    def finest(self) -> int:
        """By how much the last lattice is finer than the first."""
        return math.prod(self.factors)


class Crossings(NamedTuple):
    """For the prefix of t times, at [r, t - 1]: the number of positions, and the sums over the events before."""

    reach: Tensor  # [R, S] int32
    weight: Tensor  # [R, S] int32
    moment: Tensor  # [R, S] int64


class _Level(NamedTuple):
    """The cells of one lattice, at their numbers [R, chunks + buckets - 1]."""

    column: Tensor  # int32, -1 behind the path's end
    weight: Tensor  # int32
    moment: Tensor  # int64


def lattices_for(rows: int, times: int, size: int) -> Lattices:
    """Lattices for ``rows`` lists of ``size`` events of ``times`` keys.

    A walk takes up to chunk + bucket steps, each of which waits for memory: cells are made so small that the walkers
    fill a device, and no smaller, for every refinement reads the list again. It reads a cell's events and its chunk's
    keys, 12 bytes and 16: about equal numbers of both, as in square cells, come close to the least. Factors beyond 16
    would save a launch, but each event is compared with as many prefixes.
    """
    chunk = max(_SMALLEST, triton.next_power_of_2(triton.cdiv(times, _PREFIXES)))
    wanted = _LARGEST
    while wanted > _SMALLEST and rows * (times + size) < wanted * _WALKERS:
        wanted //= 2
    bits = max(0, (chunk // wanted).bit_length() - 1)
    levels = triton.cdiv(bits, _MOST_BITS)
    # The finer refinements have the more cells; they get the larger share.
    factors = tuple(1 << ((bits + level) // levels) for level in range(levels))
    length = min(chunk, max(_SMALLEST, triton.next_power_of_2(triton.cdiv(rows * size, _PROGRAMS))))
    return Lattices(chunk, chunk, factors, length)


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
    flags = {"COUNT": unit is None, "SEGMENTS": segments is not None}
    shape = lattices_for(rows, times, size)
    chunk, bucket = shape.chunk, shape.bucket
    cells = _outline(events, shared, flags, shape, times, budget)
    for factor in shape.factors:
        coarse = (triton.cdiv(size, bucket), cells.column.shape[1])
        chunk, bucket = chunk // factor, bucket // factor
        n_chunks, n_buckets = triton.cdiv(times, chunk), triton.cdiv(size, bucket)
        finer = _level(rows, n_chunks + n_buckets - 1, events.code.device)
        programs = cells.column.numel()
        warps = max(1, min(8, triton.next_power_of_2(triton.cdiv(_WARPS, programs)), factor * bucket // 32))
        # An event of each part of a cell for every so many lanes: a lane takes one at a time.
        block = max(2, 32 * warps // factor)
        refine[(programs,)](
            *events, *shared, *cells, *finer, times, size, budget, *coarse, chunk, bucket, n_chunks, n_buckets,
            **flags, FACTOR=factor, BLOCK=block, UNROLL=min(4, triton.cdiv(bucket, block)), num_warps=warps,
        )  # fmt: skip
        cells = finer
    result = Crossings(*(torch.empty(rows, times, dtype=x.dtype, device=x.device) for x in cells))
    n_all = cells.column.numel()
    walk[(triton.cdiv(n_all, _LANES),)](
        *events, *shared, *cells, *result,
        times, size, budget, chunk, bucket, triton.cdiv(times, chunk), triton.cdiv(size, bucket), n_all,
        **flags, LANES=_LANES, STEPS=_STEPS, num_warps=1,
    )  # fmt: skip
    return result


def _level(rows: int, n_cells: int, device: torch.device) -> _Level:
    column = torch.full((rows, n_cells), -1, dtype=torch.int32, device=device)
    return _Level(column, torch.empty_like(column), torch.empty_like(column, dtype=torch.int64))


def _outline(
    events: Events, shared: tuple[Tensor, ...], flags: dict[str, bool], shape: Lattices, times: int, budget: int
) -> _Level:
    """The path through the coarsest lattice."""
    rows, size = events.code.shape
    n_chunks, n_buckets = triton.cdiv(times, shape.chunk), triton.cdiv(size, shape.bucket)
    n_slices = triton.cdiv(size, shape.slice)
    cells = _level(rows, n_chunks + n_buckets - 1, events.code.device)
    weight = torch.empty(rows, _PREFIXES, n_slices, dtype=torch.int32, device=events.code.device)
    moment = torch.empty_like(weight, dtype=torch.int64)
    table[(rows * n_slices,)](
        events.code, events.edge, weight, moment, size, shape.chunk, n_slices, shape.slice,
        COUNT=flags["COUNT"], PREFIXES=_PREFIXES, BLOCK=min(128, shape.slice),
    )  # fmt: skip
    outline[(rows * n_chunks,)](
        events.edge, *shared, weight, moment, *cells,
        times, size, budget, shape.chunk, shape.bucket, n_chunks, n_buckets, n_slices,
        **flags, PREFIXES=_PREFIXES, BUCKETS=triton.next_power_of_2(n_buckets), SLICES=shape.bucket // shape.slice,
    )  # fmt: skip
    return cells
