"""All prefixes at once: how far down a sorted list each prefix of time gets within its budget, as Triton kernels.

Events stand in falling order of value; each has a time (the key it comes from). For every prefix of time, t = 1 .. S,
wanted is the number of leading positions x at which

    g(x) = sum over the events before x with time < t of w * (value - value at x)

is within a budget. As t grows the answer never rises: prefixes against positions it is a staircase. So once the
answers for some prefixes are known, those in between lie between them, and the stretches of list that two neighbours
enclose do not overlap. Each level looks once at every event, for a few prefixes each:

1. ``_table``: the sums of every bucket of positions for about 64 prefixes;
2. ``_boundaries``: their answers, from a scan over the buckets and one inside the bucket;
3. ``_refine``, level by level: 16 prefixes between two known ones, at last all of them.

That is O(S log S) work at most for any input, with O(S) memory. One chunk's stretch can be the whole list, where a
program walks it alone: a long step, not more work. All sums are of int64, hence exact, and no atomics are used.
Packed segments need nothing more than an order in which later segments stand first: a prefix that ends in a segment
has no event of a later one, and its limit is the end of its own segment's stretch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_BOUNDARIES = 64
_BRANCHES = 16
_LEAF = 64


class Events(NamedTuple):
    """The sorted list of each of R rows, N positions of S times. Events of weight 0 have the code -1.

    ``code``: 2 * time, plus 1 for an event of weight -1. In a count of keys N is S, every weight is 1, and there are
    no values.
    """

    code: Tensor  # [R, N] int32, by position
    edge: Tensor  # [R, N] int64, by position; the values
    value: Tensor  # [R, S] int64, by time: the value of the event of weight 1
    plus: Tensor  # [R, S] int32, by time: its position, N for weight 0
    minus: Tensor  # [R, S] int32, by time: that of the event of weight -1


class Crossings(NamedTuple):
    """For the prefix of t times, at [r, t - 1]: the number of positions, and the sums over the events before."""

    count: Tensor  # [R, S] int32
    weight: Tensor  # [R, S] int32
    moment: Tensor  # [R, S] int64


@triton.jit
def _load_events(p_code, p_edge, o_event, m_event, COUNT: tl.constexpr):
    """Time, weight and moment of events; time is beyond every prefix where there is none."""
    code = tl.load(p_code + o_event, mask=m_event, other=-1)
    none = code < 0
    time = tl.where(none, 2147483647, code >> 1)
    if COUNT:
        weight = tl.zeros_like(code)
        moment = tl.where(none, 0, 1).to(tl.int64)
        edge = tl.zeros_like(moment)
    else:
        edge = tl.load(p_edge + o_event, mask=m_event, other=0)
        weight = tl.where(none, 0, 1 - 2 * (code & 1))
        moment = weight.to(tl.int64) * edge
    return time, weight, moment, edge


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
    p_code, p_edge, p_weight, p_moment, times, events, chunk, n_bounds, n_buckets,
    COUNT: tl.constexpr, BUCKET: tl.constexpr, BOUNDS: tl.constexpr,
):  # fmt: skip
    """Sums of one bucket of events, for each boundary over the events of earlier time."""
    row, bucket = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_event = bucket * BUCKET + tl.arange(0, BUCKET)
    time, weight, moment, _ = _load_events(p_code, p_edge, row * events + o_event, o_event < events, COUNT)
    for first in range(0, n_bounds, BOUNDS):
        bound = first + tl.arange(0, BOUNDS)
        earlier = time[None, :] < ((bound + 1) * chunk)[:, None]  # [BOUNDS, BUCKET]
        sum_weight = tl.sum(tl.where(earlier, weight[None, :], 0), 1)
        sum_moment = tl.sum(tl.where(earlier, moment[None, :], 0), 1)
        target = (row * n_bounds + bound) * n_buckets + bucket
        tl.store(p_weight + target, sum_weight, mask=bound < n_bounds)
        tl.store(p_moment + target, sum_moment, mask=bound < n_bounds)


@triton.jit
def _boundaries(
    p_code, p_edge, p_counts, p_start, p_end, p_unit, p_weight, p_moment,
    p_count, p_sum_weight, p_sum_moment, times, events, chunk, n_bounds, n_buckets, budget,
    COUNT: tl.constexpr, SEGMENTS: tl.constexpr, BUCKET: tl.constexpr, BUCKETS: tl.constexpr,
):  # fmt: skip
    """The crossing of one boundary: its bucket first, then its position in the bucket."""
    row, bound = tl.program_id(0).to(tl.int64), tl.program_id(1)
    t = tl.minimum((bound + 1) * chunk, times)
    low, high, room = _limits(
        p_counts, p_start, p_end, p_unit, row, t + tl.arange(0, 1), tl.full([1], 1, tl.int1), times, budget,
        COUNT, SEGMENTS,
    )  # fmt: skip
    o_bucket = tl.arange(0, BUCKETS)
    m_bucket = o_bucket < n_buckets
    entry = (row * n_bounds + bound) * n_buckets + o_bucket
    weight = tl.load(p_weight + entry, mask=m_bucket, other=0)
    moment = tl.load(p_moment + entry, mask=m_bucket, other=0)
    weight = tl.cumsum(weight, 0) - weight
    moment = tl.cumsum(moment, 0) - moment
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
    time, w, m, edge = _load_events(p_code, p_edge, row * events + o_event, o_event < events, COUNT)
    w = tl.where(time < t, w, 0)
    m = tl.where(time < t, m, 0)
    before_weight = base_weight + tl.cumsum(w, 0) - w
    before_moment = base_moment + tl.cumsum(m, 0) - m
    reached = before_moment - before_weight.to(tl.int64) * edge
    within = (o_event < events) & ((o_event < low) | ((o_event < high) & (reached <= room)))
    target = row * n_bounds + bound
    tl.store(p_count + target, here * BUCKET + tl.sum(within.to(tl.int32), 0))
    tl.store(p_sum_weight + target, base_weight + tl.sum(tl.where(within, w, 0), 0))
    tl.store(p_sum_moment + target, base_moment + tl.sum(tl.where(within, m, 0), 0))


@triton.jit
def _refine(
    p_code, p_edge, p_value, p_plus, p_minus, p_counts, p_start, p_end, p_unit, p_known, p_known_weight, p_known_moment,
    p_count, p_sum_weight, p_sum_moment, times, events, chunk, step, n_chunks, n_steps, budget,
    COUNT: tl.constexpr, SEGMENTS: tl.constexpr, BRANCHES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The crossings of BRANCHES prefixes that end inside one chunk of time, from those of its two ends."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    known = row * n_chunks + part
    low = tl.load(p_known + known)
    high = tl.load(p_known + known - 1, mask=part > 0, other=events)
    index = part * BRANCHES + tl.arange(0, BRANCHES)
    m_t = index < n_steps
    t = tl.minimum((index + 1) * step, times)
    segment_low, segment_high, room = _limits(
        p_counts, p_start, p_end, p_unit, row, t, m_t, times, budget, COUNT, SEGMENTS
    )  # fmt: skip
    # At the chunk's end all events before `low` are summed; those of the chunk that come after t are taken away.
    sum_weight = tl.zeros([BRANCHES], tl.int32) + tl.load(p_known_weight + known)
    sum_moment = tl.zeros([BRANCHES], tl.int64) + tl.load(p_known_moment + known)
    last = tl.minimum((part + 1) * chunk, times)
    for first in range(part * chunk, last, BLOCK):
        time = first + tl.arange(0, BLOCK)
        m_time = time < last
        plus = tl.load(p_plus + row * times + time, mask=m_time, other=events)
        is_plus = plus < low
        if COUNT:
            weight = tl.zeros([BLOCK], tl.int32)
            moment = is_plus.to(tl.int64)
        else:
            is_minus = tl.load(p_minus + row * times + time, mask=m_time, other=events) < low
            value = tl.load(p_value + row * times + time, mask=is_plus, other=0)
            weight = is_plus.to(tl.int32) - is_minus.to(tl.int32)
            moment = tl.where(is_minus, tl.load(p_unit + row), value)
        later = time[None, :] >= t[:, None]  # [BRANCHES, BLOCK]
        sum_weight -= tl.sum(tl.where(later, weight[None, :], 0), 1)
        sum_moment -= tl.sum(tl.where(later, moment[None, :], 0), 1)
    count = tl.zeros([BRANCHES], tl.int32) + low
    going = tl.full([BRANCHES], 1, tl.int1)
    for first in range(low, high, BLOCK):
        o_event = first + tl.arange(0, BLOCK)
        m_event = o_event < high
        time, w, m, edge = _load_events(p_code, p_edge, row * events + o_event, m_event, COUNT)
        earlier = time[None, :] < t[:, None]
        m = tl.where(earlier, m[None, :], 0)
        reached = sum_moment[:, None] + tl.cumsum(m, 1) - m
        if not COUNT:
            w = tl.where(earlier, w[None, :], 0)
            reached -= (sum_weight[:, None] + tl.cumsum(w, 1) - w).to(tl.int64) * edge[None, :]
        own = (o_event[None, :] < segment_high[:, None]) & (reached <= room[:, None])
        within = m_event[None, :] & ((o_event[None, :] < segment_low[:, None]) | own) & going[:, None]
        found = tl.sum(within.to(tl.int32), 1)
        count += found
        sum_moment += tl.sum(tl.where(within, m, 0), 1)
        if not COUNT:
            sum_weight += tl.sum(tl.where(within, w, 0), 1)
        going = going & (found == BLOCK)
    target = row * n_steps + index
    tl.store(p_count + target, count, mask=m_t)
    tl.store(p_sum_weight + target, sum_weight, mask=m_t)
    tl.store(p_sum_moment + target, sum_moment, mask=m_t)


@triton.jit
def _merge(
    p_order, p_value, p_alive, p_start, p_end, p_unit, p_code, p_edge, p_plus, p_minus, times, steps,
    SEGMENTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Where each key's two events stand: after the same keys' events above them, found by binary search."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_at = at < times
    key = tl.load(p_order + row * times + at, mask=m_at, other=0).to(tl.int32)
    value = tl.load(p_value + row * times + key, mask=m_at, other=0)
    alive = tl.load(p_alive + row * times + key, mask=m_at, other=0) == 1
    unit = tl.load(p_unit + row)
    low = tl.zeros_like(at)
    high = low + times
    if SEGMENTS:
        low = times - tl.load(p_end + row * times + key, mask=m_at, other=0).to(tl.int32)
        high = times - tl.load(p_start + row * times + key, mask=m_at, other=0).to(tl.int32)
    # How many keys have an event of weight -1 above this value, and of weight 1 at or above this value less a unit.
    above_low, above_high = low, high
    below_low, below_high = low, high
    for _ in range(steps):
        middle = (above_low + above_high) // 2
        open_ = m_at & (above_low < above_high)
        other = tl.load(p_order + row * times + middle, mask=open_, other=0)
        beyond = open_ & (tl.load(p_value + row * times + other, mask=open_, other=0) - unit > value)
        above_low = tl.where(beyond, middle + 1, above_low)
        above_high = tl.where(open_ & ~beyond, middle, above_high)
        middle = (below_low + below_high) // 2
        open_ = m_at & (below_low < below_high)
        other = tl.load(p_order + row * times + middle, mask=open_, other=0)
        beyond = open_ & (tl.load(p_value + row * times + other, mask=open_, other=0) >= value - unit)
        below_low = tl.where(beyond, middle + 1, below_low)
        below_high = tl.where(open_ & ~beyond, middle, below_high)
    plus, minus = at + above_low, at + below_low
    events = 2 * row * times
    tl.store(p_code + events + plus, tl.where(alive, 2 * key, -1), mask=m_at)
    tl.store(p_code + events + minus, tl.where(alive, 2 * key + 1, -1), mask=m_at)
    tl.store(p_edge + events + plus, value, mask=m_at)
    tl.store(p_edge + events + minus, value - unit, mask=m_at)
    tl.store(p_plus + row * times + key, tl.where(alive, plus, 2 * times), mask=m_at)
    tl.store(p_minus + row * times + key, tl.where(alive, minus, 2 * times), mask=m_at)


def merged_events(
    order: Tensor, value: Tensor, alive: Tensor, unit: Tensor, segments: tuple[Tensor, Tensor] | None = None
) -> Events:
    """The events at ``value`` (weight 1) and ``value - unit`` (weight -1) of every key, merged in falling order.

    order [R, S] int64: the keys by falling value, later segments first; value [R, S] int64 by key, falling along
    ``order`` inside a segment; alive [R, S] int8, 1 for weight 1 and any other for weight 0; unit [R] int64; segments as for ``crossings``.
    """
    rows, times = order.shape

    def made(count: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(rows, count, dtype=dtype, device=order.device)

    code, edge = made(2 * times, torch.int32), made(2 * times, torch.int64)
    plus, minus = made(times, torch.int32), made(times, torch.int32)
    start, end = segments if segments is not None else (order, order)
    block = 512
    _merge[(rows, triton.cdiv(times, block))](
        order, value, alive, start, end, unit, code, edge, plus, minus, times, times.bit_length(),
        SEGMENTS=segments is not None, BLOCK=block,
    )  # fmt: skip
    return Events(code, edge, value, plus, minus)


@triton.jit
def _rank(p_order, p_code, p_rank, times, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_at = at < times
    key = tl.load(p_order + row * times + at, mask=m_at, other=0).to(tl.int32)
    tl.store(p_code + row * times + at, 2 * key, mask=m_at)
    tl.store(p_rank + row * times + key, at, mask=m_at)


def counted_events(order: Tensor) -> Events:
    """Keys in falling order, counted alike: order [R, S] int64."""
    rows, times = order.shape
    code, rank = (torch.empty(rows, times, dtype=torch.int32, device=order.device) for _ in range(2))
    _rank[(rows, triton.cdiv(times, 1024))](order, code, rank, times, BLOCK=1024)
    return Events(code, order, order, rank, rank)


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
    step = _first_step(times)
    n_bounds = triton.cdiv(times, step)
    bucket = max(256, triton.next_power_of_2(triton.cdiv(size, 1024)))
    n_buckets = triton.cdiv(size, bucket)
    device = events.code.device
    weight = torch.empty(rows, n_bounds, n_buckets, dtype=torch.int32, device=device)
    moment = torch.empty(rows, n_bounds, n_buckets, dtype=torch.int64, device=device)
    _table[(rows, n_buckets)](
        events.code, events.edge, weight, moment, times, size, step, n_bounds, n_buckets,
        COUNT=count, BUCKET=bucket, BOUNDS=max(1, 8192 // bucket),
    )  # fmt: skip
    known = _empty(rows, n_bounds, device)
    _boundaries[(rows, n_bounds)](
        events.code, events.edge, *shared, weight, moment, *known, times, size, step, n_bounds, n_buckets, budget,
        **flags, BUCKET=bucket, BUCKETS=triton.next_power_of_2(n_buckets),
    )  # fmt: skip
    while step > 1:
        branches = _LEAF if step == _LEAF else min(_BRANCHES, step // _LEAF)
        chunk, step = step, step // branches
        n_chunks, n_steps = triton.cdiv(times, chunk), triton.cdiv(times, step)
        finer = _empty(rows, n_steps, device)
        _refine[(rows, n_chunks)](
            *events, *shared, *known, *finer,
            times, size, chunk, step, n_chunks, n_steps, budget, **flags, BRANCHES=branches, BLOCK=_block(branches),
        )  # fmt: skip
        known = finer
    return known


def _first_step(times: int) -> int:
    """A power of two of times between the first boundaries, at least a leaf."""
    return max(_LEAF, triton.next_power_of_2(triton.cdiv(times, _BOUNDARIES)))


def _block(branches: int) -> int:
    return 4096 // branches


def _empty(rows: int, count: int, device: torch.device) -> Crossings:
    def made(dtype: torch.dtype) -> Tensor:
        return torch.empty(rows, count, dtype=dtype, device=device)

    return Crossings(made(torch.int32), made(torch.int32), made(torch.int64))
