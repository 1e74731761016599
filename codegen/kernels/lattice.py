"""Where a staircase passes through a lattice of times and positions, coarse to fine, as Triton kernels.

A lattice has chunks of C times, the prefixes cC < t <= (c + 1)C, and buckets of B positions, bB < x <= (b + 1)B; the
first bucket holds x = 0 too. Its cells (c, b) that the staircase may pass through are, in every column c, the buckets
from that of reach(cC) down to that of reach((c + 1)C), where reach(0) is the whole list. From one of them to the next
it goes a chunk to the right or a bucket down. So the number c + (buckets - 1 - b) grows by one from cell to cell, and a
cell stands at its number in arrays of chunks + buckets - 1 entries: nothing is counted, sorted or compacted. Of a cell
are kept its chunk (-1 behind the end of the path; its bucket follows) and the sums at its corner, over the events
before position (b + 1)B with time < cC.

The sizes are for rows with all of their keys. A row of which half, a quarter, ... remain has chunks, buckets and slices
of half, a quarter, ... the size, so that its path has as many cells.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flexsparse.codegen.kernels.events import load_events


@triton.jit
def limits(
    p_counts, p_start, p_end, p_unit, row, t, m_t, times, length, budget, COUNT: tl.constexpr, SEGMENTS: tl.constexpr
):  # fmt: skip
    """First and last position of the prefix's own segment, and its budget; that of no times reaches everything."""
    scale: tl.constexpr = 1 if COUNT else 2
    key = row * times + t - 1
    m_t = m_t & (t > 0)
    high = tl.zeros_like(t) + scale * length
    low = tl.where(t > 0, 0, high)
    if SEGMENTS:
        low = tl.where(m_t, scale * (times - tl.load(p_end + key, mask=m_t, other=0).to(tl.int32)), low)
        high = tl.where(m_t, scale * (times - tl.load(p_start + key, mask=m_t, other=0).to(tl.int32)), high)
    room = tl.zeros_like(t).to(tl.int64) + budget
    if not COUNT:
        spent = tl.load(p_counts + key, mask=m_t, other=0) >> 32
        if SEGMENTS:
            start = tl.load(p_start + key, mask=m_t, other=0)
            spent -= tl.load(p_counts + row * times + start - 1, mask=m_t & (start > 0), other=0) >> 32
        room = (room - spent) * tl.load(p_unit + row)
    return low, high, room


@triton.jit
def is_within(x, weight, moment, edge, low, high, room, COUNT: tl.constexpr):
    """Whether the prefix reaches beyond position x, from the sums over its events before x; never at the list's end."""
    reached = moment
    if not COUNT:
        reached = moment - weight.to(tl.int64) * edge
    return (x < low) | ((x < high) & (reached <= room))


@triton.jit
def own_events(p_value, p_place, p_unit, row, key, m_key, x, times, COUNT: tl.constexpr):
    """Weight and moment that the events of keys before position x bring in; no load waits for another."""
    at = row * times + key
    place = tl.load(p_place + at, mask=m_key, other=0)
    plus = m_key & (place.to(tl.int32) < x)
    if COUNT:
        weight = tl.zeros_like(key)
        moment = plus.to(tl.int32)
    else:
        minus = m_key & ((place >> 32).to(tl.int32) < x)
        value = tl.load(p_value + at, mask=m_key, other=0)
        weight = plus.to(tl.int32) - minus.to(tl.int32)
        moment = tl.where(minus, tl.load(p_unit + row), tl.where(plus, value, 0))
    return weight, moment


@triton.jit
def events_of(p_length, row, COUNT: tl.constexpr):
    """The number of events in rows' lists."""
    return tl.load(p_length + row) * (1 if COUNT else 2)


@triton.jit
def halvings_of(p_length, row, times, HALVINGS: tl.constexpr):
    """How often the sizes of a lattice are halved for the keys that rows have, HALVINGS times at most."""
    length = tl.load(p_length + row)
    halvings = tl.zeros_like(length)
    for step in tl.static_range(HALVINGS):
        halvings += (length <= (times >> (step + 1))).to(tl.int32)
    return halvings


@triton.jit
def _clear(p_column, n_columns, share, SHARE: tl.constexpr):
    """No cells yet: one program's share of all columns' entries."""
    first = tl.program_id(0) * share
    for at in range(first, tl.minimum(first + share, n_columns), SHARE):
        entry = at + tl.arange(0, SHARE)
        tl.store(p_column + entry, tl.full([SHARE], -1, tl.int32), mask=entry < tl.minimum(first + share, n_columns))


@triton.jit
def table(
    p_code, p_edge, p_length, p_weight, p_moment, p_column, times, events, chunk, n_slices, size, n_columns, share,
    COUNT: tl.constexpr, HALVINGS: tl.constexpr, PREFIXES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums over the events of one slice of positions, for the prefix of each chunk and those before it."""
    _clear(p_column, n_columns, share, 32)
    row, part = tl.program_id(0).to(tl.int64) // n_slices, tl.program_id(0) % n_slices
    halvings = halvings_of(p_length, row, times, HALVINGS)
    chunk, size = chunk >> halvings, size >> halvings
    prefix = tl.arange(0, PREFIXES)
    stop = (prefix + 1) * chunk
    # Each lane adds up its own events for all prefixes; the lanes meet once, at the end.
    weight = tl.zeros([PREFIXES, BLOCK], tl.int32)
    moment = tl.zeros([PREFIXES, BLOCK], tl.int32 if COUNT else tl.int64)
    count = events_of(p_length, row, COUNT)
    stop_event = tl.minimum((part + 1) * size, count)
    for first in range(part * size, stop_event, BLOCK):
        o_event = first + tl.arange(0, BLOCK)
        time, w, m, _ = load_events(p_code, p_edge, row * events + o_event, o_event < stop_event, COUNT)
        earlier = time[None, :] < stop[:, None]
        if not COUNT:
            weight += tl.where(earlier, w[None, :], 0)
        moment += tl.where(earlier, m[None, :], 0)
    target = (row * PREFIXES + prefix) * n_slices + part
    if not COUNT:
        tl.store(p_weight + target, tl.sum(weight, 1))
    tl.store(p_moment + target, tl.sum(moment, 1))


@triton.jit
def table_of_many(
    p_code, p_edge, p_length, p_weight, p_moment, p_column, times, events, chunk, n_slices, size, n_columns, share,
    COUNT: tl.constexpr, HALVINGS: tl.constexpr, PREFIXES: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """As ``table``, for more prefixes than lanes: those have prefixes, and all of them take an event at a time."""
    _clear(p_column, n_columns, share, 32)
    row, part = tl.program_id(0).to(tl.int64) // n_slices, tl.program_id(0) % n_slices
    halvings = halvings_of(p_length, row, times, HALVINGS)
    chunk, size = chunk >> halvings, size >> halvings
    prefix = tl.arange(0, PREFIXES)
    stop = (prefix + 1) * chunk
    weight = tl.zeros([PREFIXES], tl.int32)
    moment = tl.zeros([PREFIXES], tl.int32 if COUNT else tl.int64)
    count = events_of(p_length, row, COUNT)
    stop_event = tl.minimum((part + 1) * size, count)
    for first in range(part * size, stop_event, UNROLL):
        for step in tl.static_range(UNROLL):
            o_event = first + step
            time, w, m, _ = load_events(p_code, p_edge, row * events + o_event, o_event < stop_event, COUNT)
            earlier = time < stop
            if not COUNT:
                weight += tl.where(earlier, w, 0)
            moment += tl.where(earlier, m, 0)
    target = (row * PREFIXES + prefix) * n_slices + part
    if not COUNT:
        tl.store(p_weight + target, weight)
    tl.store(p_moment + target, moment)


@triton.jit
def _bucket_reached(
    p_edge, p_length, p_counts, p_start, p_end, p_unit, p_weight, p_moment, row, column,
    times, events, budget, chunk, bucket, n_slices,
    COUNT: tl.constexpr, SEGMENTS: tl.constexpr, PREFIXES: tl.constexpr, BUCKETS: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    """The bucket that the prefix before a column reaches, and its sums up to the top of every bucket."""
    number = tl.arange(0, BUCKETS)
    part = number[:, None] * SLICES + tl.arange(0, SLICES)[None, :]
    entry = (row * PREFIXES + column - 1) * n_slices + part
    # The prefix of no times has no entry.
    m_entry = part < tl.where(column > 0, n_slices, 0)
    length, count = tl.load(p_length + row), events_of(p_length, row, COUNT)
    moment = tl.sum(tl.load(p_moment + entry, mask=m_entry, other=0), 1)
    upto_moment = tl.cumsum(moment, 0)
    weight = tl.zeros([BUCKETS], tl.int32)
    upto_weight = weight
    if not COUNT:
        weight = tl.sum(tl.load(p_weight + entry, mask=m_entry, other=0), 1)
        upto_weight = tl.cumsum(weight, 0)
    x = number * bucket
    edge = tl.zeros([BUCKETS], tl.int64)
    if not COUNT:
        edge = tl.load(p_edge + row * events + x, mask=x < count, other=0)
    t = tl.minimum(column * chunk, length) + tl.arange(0, 1)
    low, high, room = limits(p_counts, p_start, p_end, p_unit, row, t, t >= 0, times, length, budget, COUNT, SEGMENTS)
    beyond = is_within(x, upto_weight - weight, upto_moment - moment, edge, low, high, room, COUNT)
    return tl.maximum(tl.sum(beyond.to(tl.int32), 0) - 1, 0), upto_weight, upto_moment


@triton.jit
def outline(
    p_edge, p_length, p_counts, p_start, p_end, p_unit, p_weight, p_moment, p_column, p_corner_weight, p_corner_moment,
    times, events, budget, chunk, bucket, n_chunks, n_buckets, n_slices,
    COUNT: tl.constexpr, SEGMENTS: tl.constexpr, HALVINGS: tl.constexpr, PREFIXES: tl.constexpr, BUCKETS: tl.constexpr,
    SLICES: tl.constexpr,
):  # fmt: skip
    """The cells of one column of the coarsest lattice, from the table."""
    row, column = tl.program_id(0).to(tl.int64) // n_chunks, tl.program_id(0) % n_chunks
    halvings = halvings_of(p_length, row, times, HALVINGS)
    chunk, bucket = chunk >> halvings, bucket >> halvings
    highest, upto_weight, upto_moment = _bucket_reached(
        p_edge, p_length, p_counts, p_start, p_end, p_unit, p_weight, p_moment, row, column,
        times, events, budget, chunk, bucket, n_slices, COUNT, SEGMENTS, PREFIXES, BUCKETS, SLICES,
    )  # fmt: skip
    lowest, _, _ = _bucket_reached(
        p_edge, p_length, p_counts, p_start, p_end, p_unit, p_weight, p_moment, row, column + 1,
        times, events, budget, chunk, bucket, n_slices, COUNT, SEGMENTS, PREFIXES, BUCKETS, SLICES,
    )  # fmt: skip
    number = tl.arange(0, BUCKETS)
    highest = tl.where(column * chunk < tl.load(p_length + row), highest, -1)
    here = (number <= highest) & (number >= lowest)
    target = row * (n_chunks + n_buckets - 1) + column + n_buckets - 1 - number
    tl.store(p_column + target, tl.zeros_like(number) + column, mask=here)
    tl.store(p_corner_weight + target, upto_weight, mask=here)
    tl.store(p_corner_moment + target, upto_moment, mask=here)


@triton.jit
def _parts_reached(
    p_edge, p_counts, p_start, p_end, p_unit, row, bucket, t, weight, moment, top_weight, top_moment,
    times, length, events, count, budget, size, COUNT: tl.constexpr, SEGMENTS: tl.constexpr, FACTOR: tl.constexpr,
):  # fmt: skip
    """Which of a bucket's parts the prefixes of t times [T] reach, and their sums up to each part's end [T, FACTOR].

    A prefix that does not reach beyond the bucket's first position gets -1, one that reaches beyond its last FACTOR.
    ``weight`` and ``moment`` [T, FACTOR] are the sums inside the parts, ``top_weight`` and ``top_moment`` [T] those
    before the end of the bucket.
    """
    upto_weight = weight
    if not COUNT:
        upto_weight = (top_weight - tl.sum(weight, 1))[:, None] + tl.cumsum(weight, 1)
    upto_moment = (top_moment - tl.sum(moment, 1))[:, None] + tl.cumsum(moment, 1)
    x = (bucket * FACTOR + tl.arange(0, FACTOR)) * size
    top = (bucket + 1) * FACTOR * size
    edge = tl.zeros([FACTOR], tl.int64)
    top_edge = tl.zeros([], tl.int64)
    if not COUNT:
        edge = tl.load(p_edge + row * events + x, mask=x < count, other=0)
        top_edge = tl.load(p_edge + row * events + top, mask=top < count, other=0)
    low, high, room = limits(p_counts, p_start, p_end, p_unit, row, t, t >= 0, times, length, budget, COUNT, SEGMENTS)
    beyond = is_within(
        x[None, :], upto_weight - weight, upto_moment - moment, edge[None, :], low[:, None], high[:, None],
        room[:, None], COUNT,
    )  # fmt: skip
    above = is_within(top, top_weight, top_moment, top_edge, low, high, room, COUNT)
    reached = tl.sum(beyond.to(tl.int32), 1) + above.to(tl.int32) - 1
    # Position 0 belongs to the first bucket.
    return tl.where(bucket == 0, tl.maximum(reached, 0), reached), upto_weight, upto_moment


@triton.jit
def _with_last(each, last, FACTOR: tl.constexpr):
    """Sums [FACTOR, FACTOR] of the prefixes at which parts begin, and then those [1, FACTOR] of the one at the end."""
    both = tl.join(each, tl.broadcast_to(last, [FACTOR, FACTOR]))
    return tl.reshape(tl.permute(both, (2, 0, 1)), [2 * FACTOR, FACTOR])


@triton.jit
def refine(
    p_code, p_edge, p_value, p_place, p_length, p_counts, p_start, p_end, p_unit, p_column, p_weight, p_moment,
    p_new_column, p_new_weight, p_new_moment,
    times, events, budget, coarse_buckets, coarse_cells, whole_chunk, whole_bucket, n_chunks, n_buckets,
    COUNT: tl.constexpr, SEGMENTS: tl.constexpr, HALVINGS: tl.constexpr, FACTOR: tl.constexpr, BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
):  # fmt: skip
    """The cells inside one cell of a lattice FACTOR times as coarse in both directions."""
    cell = tl.program_id(0)
    column = tl.load(p_column + cell)
    if column >= 0:
        row = cell.to(tl.int64) // coarse_cells
        halvings = halvings_of(p_length, row, times, HALVINGS)
        chunk, bucket = whole_chunk >> halvings, whole_bucket >> halvings
        coarse_bucket = column + coarse_buckets - 1 - cell % coarse_cells
        inner = tl.arange(0, FACTOR)
        t = (column * FACTOR + inner) * chunk
        last_t = (column + 1) * FACTOR * chunk
        length, count = tl.load(p_length + row), events_of(p_length, row, COUNT)
        # Keys without weight stand at the list's end, which a lattice may go beyond.
        top = tl.minimum((coarse_bucket + 1) * FACTOR * bucket, count)
        # The lanes meet once, after the loop: sums of the events inside each part of the bucket, for the prefixes at
        # which the parts of the chunk begin and for that at its end; and of the chunk's own keys before the bucket's
        # end.
        weight = tl.zeros([FACTOR, BLOCK, FACTOR], tl.int32)
        moment = tl.zeros([FACTOR, BLOCK, FACTOR], tl.int32 if COUNT else tl.int64)
        last_weight = tl.zeros([BLOCK, FACTOR], tl.int32)
        last_moment = tl.zeros([BLOCK, FACTOR], tl.int32 if COUNT else tl.int64)
        own_weight = tl.zeros([BLOCK, FACTOR], tl.int32)
        own_moment = tl.zeros([BLOCK, FACTOR], tl.int32 if COUNT else tl.int64)
        # Unrolled by hand: the loop's own option came with Triton 3.2.
        for first in range(0, tl.maximum(bucket, chunk), BLOCK * UNROLL):
            for step in tl.static_range(UNROLL):
                inside = first + step * BLOCK + tl.arange(0, BLOCK)[:, None]  # [BLOCK, 1]
                o_event = (coarse_bucket * FACTOR + inner)[None, :] * bucket + inside  # [BLOCK, FACTOR]
                m_event = (inside < bucket) & (o_event < count)
                time, w, m, _ = load_events(p_code, p_edge, row * events + o_event, m_event, COUNT)
                key = (column * FACTOR + inner)[None, :] * chunk + inside
                m_key = (inside < chunk) & (key < length)
                own_w, own_m = own_events(p_value, p_place, p_unit, row, key, m_key, top, times, COUNT)
                own_moment += own_m
                earlier = time[None, :, :] < t[:, None, None]
                moment += tl.where(earlier, m[None, :, :], 0)
                last_moment += tl.where(time < last_t, m, 0)
                if not COUNT:
                    own_weight += own_w
                    weight += tl.where(earlier, w[None, :, :], 0)
                    last_weight += tl.where(time < last_t, w, 0)
        # From FACTOR on, the prefix at the chunk's end.
        number = tl.arange(0, 2 * FACTOR)
        before = inner[None, :] < number[:, None]
        inside_moment = _with_last(tl.sum(moment, 1), tl.sum(last_moment, 0)[None, :], FACTOR)
        top_moment = tl.load(p_moment + cell) + tl.sum(tl.where(before, tl.sum(own_moment, 0)[None, :], 0), 1)
        inside_weight = tl.zeros([2 * FACTOR, FACTOR], tl.int32)
        top_weight = tl.zeros([2 * FACTOR], tl.int32)
        if not COUNT:
            inside_weight = _with_last(tl.sum(weight, 1), tl.sum(last_weight, 0)[None, :], FACTOR)
            top_weight = tl.load(p_weight + cell) + tl.sum(tl.where(before, tl.sum(own_weight, 0)[None, :], 0), 1)
        prefix = tl.minimum((column * FACTOR + tl.minimum(number, FACTOR)) * chunk, length)
        highest, upto_weight, upto_moment = _parts_reached(
            p_edge, p_counts, p_start, p_end, p_unit, row, coarse_bucket, prefix, inside_weight, inside_moment,
            top_weight, top_moment, times, length, events, count, budget, bucket, COUNT, SEGMENTS, FACTOR,
        )  # fmt: skip
        # A column ends where the next one begins.
        lowest = tl.sum(tl.where(number[None, :] == number[:, None] + 1, highest[None, :], 0), 1)
        part = column * FACTOR + number
        here = (inner[None, :] <= highest[:, None]) & (inner[None, :] >= lowest[:, None])
        here &= ((number < FACTOR) & (part * chunk < length))[:, None]
        place = part[:, None] + n_buckets - 1 - (coarse_bucket * FACTOR + inner)[None, :]  # [2 * FACTOR, FACTOR]
        target = row * (n_chunks + n_buckets - 1) + place
        tl.store(p_new_column + target, tl.zeros_like(place) + part[:, None], mask=here)
        tl.store(p_new_weight + target, upto_weight, mask=here)
        tl.store(p_new_moment + target, upto_moment, mask=here)
