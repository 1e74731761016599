"""All prefixes at once: how far down a sorted list each prefix of time gets within its budget, as Triton kernels.

Events stand in falling order of value; each has a time (the key it comes from). For every prefix of time, t = 1 .. S,
wanted is the number of leading positions x at which

    g(x) = sum over the events before x with time < t of w * (value - value at x)

is within a budget. As t grows the answer never rises: prefixes against positions it is a staircase. One walker with a
pointer to a time and one to a position would follow it in S + N steps, taking keys in and events out of two running
sums. To have many walkers, the staircase is cut wherever it crosses a coarse grid of times and positions:

1. ``_table``: the sums of every bucket of positions, for some 32 to 256 prefixes;
2. ``_rows``: where the staircase crosses each of these prefixes, ``_columns``: where it crosses each bucket's edge;
3. ``_walk``: from each crossing to the next, at most one chunk of times and one bucket of positions away.

That is O(256 S) work for the table and O(S) for the rest, for any input, with O(S) memory. All sums are of int64,
hence exact, and no atomics are used. Packed segments need nothing more than an order in which later segments stand
first: a prefix that ends in a segment has no event of a later one, and its limit is the end of its own segment's
stretch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexsparse.codegen.kernels.events import Events, load_events

_PREFIXES = 256
_LANES = 32


class Crossings(NamedTuple):
    """For the prefix of t times, at [r, t - 1]: the number of positions, and the sums over the events before."""

    reach: Tensor  # [R, S] int32
    weight: Tensor  # [R, S] int32
    moment: Tensor  # [R, S] int64


@triton.jit
def _limits(p_counts, p_start, p_end, p_unit, row, t, m_t, times, budget, COUNT: tl.constexpr, SEGMENTS: tl.constexpr):
    """First and last position of the prefix's own segment, and its budget."""
    scale: tl.constexpr = 1 if COUNT else 2
    key = row * times + t - 1
    low = tl.zeros_like(t)
    high = low + scale * times
    if SEGMENTS:
        low = scale * (times - tl.load(p_end + key, mask=m_t, other=times).to(tl.int32))
        high = scale * (times - tl.load(p_start + key, mask=m_t, other=0).to(tl.int32))
    room = tl.zeros_like(t).to(tl.int64) + budget
    if not COUNT:
        spent = tl.load(p_counts + key, mask=m_t, other=0) >> 32
        if SEGMENTS:
            start = tl.load(p_start + key, mask=m_t, other=0)
            spent -= tl.load(p_counts + row * times + start - 1, mask=m_t & (start > 0), other=0) >> 32
        room = (room - spent) * tl.load(p_unit + row)
    return low, high, room


@triton.jit
def _table(
    p_code, p_edge, p_weight, p_moment, times, events, chunk, n_rows, n_buckets,
    COUNT: tl.constexpr, BUCKET: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Sums of one bucket of events, for each prefix over the events of earlier time.

    A product of matrices: which events are earlier, times the moments' bytes, whose sums float32 holds exactly.
    """
    row, bucket = tl.program_id(0).to(tl.int64), tl.program_id(1)
    part = tl.arange(0, 16)
    shift = 8 * tl.minimum(part, 7)
    for first_row in range(0, n_rows, ROWS):
        prefix = first_row + tl.arange(0, ROWS)
        sums = tl.zeros([ROWS, 16], tl.int64)
        for first in range(bucket * BUCKET, (bucket + 1) * BUCKET, BLOCK):
            o_event = first + tl.arange(0, BLOCK)
            time, weight, moment, edge = load_events(p_code, p_edge, row * events + o_event, o_event < events, COUNT)
            # Eight bytes of the value, moved up so that it is positive, then the weight itself.
            sign = moment.to(tl.int32) if COUNT else weight
            byte = ((edge + 1152921504606846976)[:, None] >> shift[None, :]).to(tl.int32) & 255
            byte = tl.where(part[None, :] < 8, byte, (part == 8).to(tl.int32)[None, :]) * sign[:, None]  # [BLOCK, 16]
            earlier = time[None, :] < ((prefix + 1) * chunk)[:, None]  # [ROWS, BLOCK]
            sums += tl.dot(earlier.to(tl.float16), byte.to(tl.float16)).to(tl.int64)
        count = tl.sum(tl.where(part[None, :] == 8, sums, 0), 1)
        target = (row * n_rows + prefix) * n_buckets + bucket
        if COUNT:
            tl.store(p_weight + target, tl.zeros_like(count).to(tl.int32), mask=prefix < n_rows)
            tl.store(p_moment + target, count, mask=prefix < n_rows)
        else:
            total = tl.sum(tl.where(part[None, :] < 8, sums << shift[None, :].to(tl.int64), 0), 1)
            tl.store(p_weight + target, count.to(tl.int32), mask=prefix < n_rows)
            tl.store(p_moment + target, total - (count << 60), mask=prefix < n_rows)


@triton.jit
def _rows(
    p_code, p_edge, p_counts, p_start, p_end, p_unit, p_weight, p_moment, p_t, p_x, p_w, p_m, p_key,
    times, events, chunk, n_rows, n_buckets, n_corners, budget,
    COUNT: tl.constexpr, SEGMENTS: tl.constexpr, BUCKET: tl.constexpr, BUCKETS: tl.constexpr,
):  # fmt: skip
    """The crossing of one prefix: its bucket first, then its position in the bucket."""
    row, prefix = tl.program_id(0).to(tl.int64), tl.program_id(1)
    t = tl.minimum((prefix + 1) * chunk, times)
    low, high, room = _limits(
        p_counts, p_start, p_end, p_unit, row, t + tl.arange(0, 1), tl.full([1], 1, tl.int1), times, budget,
        COUNT, SEGMENTS,
    )  # fmt: skip
    o_bucket = tl.arange(0, BUCKETS)
    m_bucket = o_bucket < n_buckets
    # The table holds sums up to each bucket's end.
    entry = (row * n_rows + prefix) * n_buckets + o_bucket - 1
    weight = tl.load(p_weight + entry, mask=m_bucket & (o_bucket > 0), other=0)
    moment = tl.load(p_moment + entry, mask=m_bucket & (o_bucket > 0), other=0)
    first = o_bucket * BUCKET
    reached = moment
    if not COUNT:
        reached = moment - weight.to(tl.int64) * tl.load(p_edge + row * events + first, mask=m_bucket, other=0)
    within = m_bucket & ((first < low) | ((first < high) & (reached <= room)))
    # The first position may already be beyond the budget; its bucket is the first one then.
    here = tl.maximum(tl.sum(within.to(tl.int32), 0) - 1, 0)
    base_weight = tl.sum(tl.where(o_bucket == here, weight, 0), 0)
    base_moment = tl.sum(tl.where(o_bucket == here, moment, 0), 0)
    o_event = here * BUCKET + tl.arange(0, BUCKET)
    time, w, m, edge = load_events(p_code, p_edge, row * events + o_event, o_event < events, COUNT)
    w = tl.where(time < t, w, 0)
    m = tl.where(time < t, m, 0)
    before_weight = base_weight + tl.cumsum(w, 0) - w
    before_moment = base_moment + tl.cumsum(m, 0) - m
    reached = before_moment - before_weight.to(tl.int64) * edge
    within = (o_event < events) & ((o_event < low) | ((o_event < high) & (reached <= room)))
    x = here * BUCKET + tl.sum(within.to(tl.int32), 0)
    target = row * n_corners + prefix
    tl.store(p_t + target, t)
    tl.store(p_x + target, x)
    tl.store(p_w + target, base_weight + tl.sum(tl.where(within, w, 0), 0))
    tl.store(p_m + target, base_moment + tl.sum(tl.where(within, m, 0), 0))
    # In the order of time; of corners at one time the lowest position comes last.
    tl.store(p_key + target, (t.to(tl.int64) << 32) - x)


@triton.jit
def _own(
    p_value, p_plus, p_minus, p_unit, row, key, m_key, x, times, COUNT: tl.constexpr,
):  # fmt: skip
    """Weight and moment that the events of keys before position x bring in."""
    plus = tl.load(p_plus + row * times + key, mask=m_key, other=2147483647) < x
    if COUNT:
        weight = tl.zeros_like(key)
        moment = plus.to(tl.int64)
    else:
        minus = tl.load(p_minus + row * times + key, mask=m_key, other=2147483647) < x
        value = tl.load(p_value + row * times + key, mask=plus, other=0)
        weight = plus.to(tl.int32) - minus.to(tl.int32)
        moment = tl.where(minus, tl.load(p_unit + row), value)
    return weight, moment


@triton.jit
def _columns(
    p_edge, p_value, p_plus, p_minus, p_counts, p_start, p_end, p_unit, p_weight, p_moment, p_t, p_x, p_w, p_m, p_key,
    times, events, chunk, n_rows, n_buckets, n_corners, budget,
    COUNT: tl.constexpr, SEGMENTS: tl.constexpr, BUCKET: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The first prefix that does not reach one bucket's first position; the first bucket has none: it starts all."""
    row, bucket = tl.program_id(0).to(tl.int64), tl.program_id(1)
    x = tl.where(bucket == 0, events, bucket * BUCKET)
    edge = tl.zeros([], tl.int64)
    if not COUNT:
        edge = tl.load(p_edge + row * events + tl.minimum(x, events - 1))
    prefix = tl.arange(0, ROWS)
    m_prefix = prefix < n_rows
    t = tl.minimum((prefix + 1) * chunk, times)
    low, high, room = _limits(
        p_counts, p_start, p_end, p_unit, row, t, m_prefix, times, budget, COUNT, SEGMENTS
    )  # fmt: skip
    # Nothing of this is used for the first bucket, whose column is the whole list.
    entry = (row * n_rows + prefix) * n_buckets + tl.maximum(bucket - 1, 0)
    weight = tl.load(p_weight + entry, mask=m_prefix, other=0)
    moment = tl.load(p_moment + entry, mask=m_prefix, other=0)
    reached = moment - weight.to(tl.int64) * edge
    within = m_prefix & (x < events) & ((x < low) | ((x < high) & (reached <= room)))
    done = tl.sum(within.to(tl.int32), 0)
    base_weight = tl.sum(tl.where(prefix == done - 1, weight, 0), 0)
    base_moment = tl.sum(tl.where(prefix == done - 1, moment, 0), 0)
    found = tl.minimum(done * chunk, times)
    going = done < n_rows
    last = tl.minimum((done + 1) * chunk, times)
    first = done * chunk
    while going:
        key = first + tl.arange(0, BLOCK)
        m_key = key < last
        w, m = _own(p_value, p_plus, p_minus, p_unit, row, key, m_key, x, times, COUNT)
        sum_weight = base_weight + tl.cumsum(w, 0)
        sum_moment = base_moment + tl.cumsum(m, 0)
        key_low, key_high, key_room = _limits(
            p_counts, p_start, p_end, p_unit, row, key + 1, m_key, times, budget, COUNT, SEGMENTS
        )  # fmt: skip
        key_reached = sum_moment - sum_weight.to(tl.int64) * edge
        reaches = m_key & (x < events) & ((x < key_low) | ((x < key_high) & (key_reached <= key_room)))
        inside = tl.sum(reaches.to(tl.int32), 0)
        found += inside
        # The prefix that fails takes its own key in as well.
        taken = tl.arange(0, BLOCK) <= inside
        base_weight += tl.sum(tl.where(taken, w, 0), 0)
        base_moment += tl.sum(tl.where(taken, m, 0), 0)
        first += BLOCK
        going = (inside == BLOCK) & (first < last)
    target = row * n_corners + n_rows + bucket
    tl.store(p_t + target, found + 1)
    tl.store(p_x + target, x)
    tl.store(p_w + target, base_weight)
    tl.store(p_m + target, base_moment)
    tl.store(p_key + target, ((found + 1).to(tl.int64) << 32) - x)


@triton.jit
def _walk(
    p_code, p_edge, p_value, p_plus, p_minus, p_counts, p_start, p_end, p_unit, p_order, p_t, p_x, p_w, p_m,
    p_count, p_sum_weight, p_sum_moment, times, events, n_corners, budget,
    COUNT: tl.constexpr, SEGMENTS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Each lane follows the staircase from its corner to the next, one time or one position a step."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.program_id(1) * LANES + tl.arange(0, LANES)
    corner = row * n_corners + tl.load(p_order + row * n_corners + lane, mask=lane < n_corners, other=0)
    following = tl.load(p_order + row * n_corners + lane + 1, mask=lane + 1 < n_corners, other=0)
    t = tl.load(p_t + corner, mask=lane < n_corners, other=times + 1)
    stop = tl.load(p_t + row * n_corners + following, mask=lane + 1 < n_corners, other=times + 1)
    stop = tl.minimum(stop, times + 1)
    active = t < stop
    x = tl.load(p_x + corner, mask=active, other=0)
    weight = tl.load(p_w + corner, mask=active, other=0)
    moment = tl.load(p_m + corner, mask=active, other=0)
    low, high, room = _limits(p_counts, p_start, p_end, p_unit, row, t, active, times, budget, COUNT, SEGMENTS)
    # Without +inf and segments nothing but t changes from prefix to prefix.
    changing = SEGMENTS
    if not COUNT:
        changing = changing | ((tl.load(p_counts + row * times + times - 1) >> 32) > 0)
    while tl.max(active.to(tl.int32), 0) > 0:
        last = x - 1
        time, w, m, edge = load_events(p_code, p_edge, row * events + last, active & (last >= 0), COUNT)
        w = tl.where(time < t, w, 0)
        m = tl.where(time < t, m, 0)
        reached = (moment - m) - (weight - w).to(tl.int64) * edge
        within = (last < low) | ((last < high) & (reached <= room))
        target = row * times + t - 1
        here = active & within
        tl.store(p_count + target, x, mask=here)
        tl.store(p_sum_weight + target, weight, mask=here)
        tl.store(p_sum_moment + target, moment, mask=here)
        back = active & ~within
        x = tl.where(back, last, x)
        weight = tl.where(back, weight - w, weight)
        moment = tl.where(back, moment - m, moment)
        # The next prefix takes the key at its end in.
        on = here & (t + 1 < stop)
        w, m = _own(p_value, p_plus, p_minus, p_unit, row, t, on, x, times, COUNT)
        weight = tl.where(on, weight + w, weight)
        moment = tl.where(on, moment + m, moment)
        t = tl.where(here, t + 1, t)
        on = on & changing
        new_low, new_high, new_room = _limits(
            p_counts, p_start, p_end, p_unit, row, t, on, times, budget, COUNT, SEGMENTS
        )  # fmt: skip
        low = tl.where(on, new_low, low)
        high = tl.where(on, new_high, high)
        room = tl.where(on, new_room, room)
        active = t < stop


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
    count = unit is None
    start, end = segments if segments is not None else (events.plus, events.plus)
    shared = (counts if counts is not None else events.plus, start, end, unit if unit is not None else events.edge)
    flags = {"COUNT": count, "SEGMENTS": segments is not None}
    # Many rows keep the device busy with few walkers each, and the table is what grows with their number.
    prefixes = _PREFIXES if rows < 64 else _PREFIXES // 8
    chunk = max(64, triton.next_power_of_2(triton.cdiv(times, prefixes)))
    bucket = min(chunk, 2048)
    n_rows, n_buckets = triton.cdiv(times, chunk), triton.cdiv(size, bucket)
    device = events.code.device

    def made(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(rows, *shape, dtype=dtype, device=device)

    weight, moment = made(torch.int32, n_rows, n_buckets), made(torch.int64, n_rows, n_buckets)
    _table[(rows, n_buckets)](
        events.code, events.edge, weight, moment, times, size, chunk, n_rows, n_buckets,
        COUNT=count, BUCKET=bucket, BLOCK=min(bucket, 256), ROWS=16 if n_rows <= 16 else 64,
    )  # fmt: skip
    sums = (weight.cumsum(2, dtype=torch.int32), moment.cumsum(2))
    corners = n_rows + n_buckets
    found = [made(d, corners) for d in (torch.int32, torch.int32, torch.int32, torch.int64, torch.int64)]
    sizes = (times, size, chunk, n_rows, n_buckets, corners, budget)
    _rows[(rows, n_rows)](
        events.code, events.edge, *shared, *sums, *found, *sizes,
        **flags, BUCKET=bucket, BUCKETS=triton.next_power_of_2(n_buckets),
    )  # fmt: skip
    _columns[(rows, n_buckets)](
        *events[1:], *shared, *sums, *found, *sizes,
        **flags, BUCKET=bucket, ROWS=triton.next_power_of_2(n_rows), BLOCK=min(chunk, 1024),
    )  # fmt: skip
    *corner, key = found
    order = key.sort(dim=1).indices
    result = Crossings(made(torch.int32, times), made(torch.int32, times), made(torch.int64, times))
    _walk[(rows, triton.cdiv(corners, _LANES))](
        *events, *shared, order, *corner, *result, times, size, corners, budget,
        **flags, LANES=_LANES, num_warps=1,
    )  # fmt: skip
    return result
