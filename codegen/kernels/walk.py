"""Along a staircase through the cells of the finest lattice, one lane a cell, as a Triton kernel."""

from __future__ import annotations

import triton
import triton.language as tl

from flexsparse.codegen.kernels.lattice import is_within, limits, own_events


@triton.jit
def walk(
    p_code, p_edge, p_value, p_place, p_counts, p_start, p_end, p_unit, p_column, p_corner_weight,
    p_corner_moment, p_result,
    times, events, budget, chunk, bucket, n_chunks, n_buckets, n_all,
    COUNT: tl.constexpr, SEGMENTS: tl.constexpr, LANES: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """From a cell's top and its first prefix: a step takes the next key in, or the event before x out.

    A lane begins one position beyond its cell. Prefixes that reach there belong to a cell above, and are passed without
    a record; the position itself brings nothing in or out.
    """
    n_cells = n_chunks + n_buckets - 1
    cell = tl.program_id(0) * LANES + tl.arange(0, LANES)
    column = tl.load(p_column + cell, mask=cell < n_all, other=-1)
    active = column >= 0
    # Lanes beyond the last cell are idle, but look up the unit of a row as all do.
    cell = tl.minimum(cell, n_all - 1)
    row = cell.to(tl.int64) // n_cells
    number = column + n_buckets - 1 - (cell % n_cells)
    top = tl.minimum((number + 1) * bucket, events)
    bottom = tl.where(number == 0, -1, number * bucket)
    stop = tl.minimum((column + 1) * chunk, times)
    weight = tl.load(p_corner_weight + cell, mask=active, other=0)
    moment = tl.load(p_corner_moment + cell, mask=active, other=0)
    w, m = own_events(p_value, p_place, p_unit, row, column * chunk, active, top, times, COUNT)
    weight += w
    moment += m
    t = column * chunk + 1
    x = top + 1
    low, high, room = limits(p_counts, p_start, p_end, p_unit, row, t, active, times, budget, COUNT, SEGMENTS)
    # Without +inf and segments nothing but t changes from prefix to prefix.
    changing = tl.max(active.to(tl.int32), 0) > 0
    if not SEGMENTS:
        if COUNT:
            changing = changing & False
        else:
            infinite = tl.load(p_counts + row * times + times - 1, mask=active, other=0) >> 32
            changing = tl.max((infinite > 0).to(tl.int32), 0) > 0
    # The event before x and the key after t are at hand before it is known which of them the step takes. So a step
    # waits for memory once, for what the last one made necessary.
    code = tl.full([LANES], -1, tl.int32)
    edge = tl.zeros([LANES], tl.int64)
    value = edge
    m_key = active & (t < stop)
    place = tl.load(p_place + row * times + t, mask=m_key, other=0)
    if not COUNT:
        edge = tl.load(p_edge + row * events + top, mask=active & (top < events), other=0)
        value = tl.load(p_value + row * times + t, mask=m_key, other=0)
        unit = tl.load(p_unit + row, mask=active, other=0)
    while tl.max(active.to(tl.int32), 0) > 0:
        for _ in tl.static_range(STEPS):
            last = x - 1
            earlier = (code >= 0) & ((code >> 1) < t)
            if COUNT:
                w = tl.zeros_like(weight)
                m = tl.where(earlier, 1, 0)
            else:
                w = tl.where(earlier, 1 - 2 * (code & 1), 0)
                m = w.to(tl.int64) * edge
            within = is_within(last, weight - w, moment - m, edge, low, high, room, COUNT)
            here = active & within
            target = row * times + t - 1
            m_target = here & (last < top)
            if COUNT:
                tl.store(p_result + target, x, mask=m_target)
            else:
                # One store of 16 bytes: each lane writes a line of its own.
                both = tl.join((weight.to(tl.int64) << 32) | x.to(tl.int64), moment)
                pair = 2 * target[:, None] + tl.arange(0, 2)[None, :]
                tl.store(p_result + pair, both, mask=m_target[:, None])
            back = active & ~within
            x = tl.where(back, last, x)
            weight = tl.where(back, weight - w, weight)
            moment = tl.where(back, moment - m, moment)
            # The next prefix takes the key at its end in.
            on = here & (t < stop)
            inside = tl.minimum(x, top)
            plus_in = place.to(tl.int32) < inside
            if COUNT:
                moment += (on & plus_in).to(tl.int64)
            else:
                minus_in = (place >> 32).to(tl.int32) < inside
                weight = tl.where(on, weight + plus_in.to(tl.int32) - minus_in.to(tl.int32), weight)
                moment += tl.where(on, tl.where(minus_in, unit, tl.where(plus_in, value, 0)), 0)
            t = tl.where(here, t + 1, t)
            active = active & (t <= stop) & (x > bottom)
            m_event = active & back & (x > 0)
            m_key = active & here & (t < stop)
            o_event = row * events + x - 1
            code = tl.load(p_code + o_event, mask=m_event, other=code)
            place = tl.load(p_place + row * times + t, mask=m_key, other=place)
            if not COUNT:
                edge = tl.load(p_edge + o_event, mask=m_event, other=edge)
                value = tl.load(p_value + row * times + t, mask=m_key, other=value)
            if changing:
                new_low, new_high, new_room = limits(
                    p_counts, p_start, p_end, p_unit, row, t, active & here, times, budget, COUNT, SEGMENTS
                )  # fmt: skip
                low = tl.where(here, new_low, low)
                high = tl.where(here, new_high, high)
                room = tl.where(here, new_room, room)
