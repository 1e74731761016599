"""Along a staircase through the cells of the finest lattice, one lane a cell, as a Triton kernel."""

from __future__ import annotations

import triton
import triton.language as tl

from flexsparse.codegen.kernels.lattice import events_of, halvings_of, is_within, limits, own_events


@triton.jit
def _event_before(p_code, p_edge, row, x, top, events, count, active, COUNT: tl.constexpr):
    """Code and value of the event before position x of each lane; at ``top``, or where there is none, -1."""
    m_event = active & (x > 0)
    code = tl.load(p_code + row * events + x - 1, mask=m_event & (x <= top), other=-1)
    edge = tl.zeros_like(row)
    if not COUNT:
        edge = tl.load(p_edge + row * events + x - 1, mask=m_event & (x <= count), other=0)
    return code, edge


@triton.jit
def _key_at(p_place, p_value, row, t, stop, times, active, COUNT: tl.constexpr):
    """Place and value of the key at time t of each lane, before ``stop``."""
    m_key = active & (t < stop)
    place = tl.load(p_place + row * times + t, mask=m_key, other=0)
    value = tl.zeros_like(row)
    if not COUNT:
        value = tl.load(p_value + row * times + t, mask=m_key, other=0)
    return place, value


@triton.jit
def _shifted(taken, first, second, third, fourth):
    """The next three of four, by one further where the first was taken."""
    return tl.where(taken, second, first), tl.where(taken, third, second), tl.where(taken, fourth, third)


@triton.jit
def walk(
    p_code, p_edge, p_value, p_place, p_length, p_counts, p_start, p_end, p_unit, p_column, p_corner_weight,
    p_corner_moment, p_result,
    times, events, budget, chunk, bucket, n_chunks, n_buckets, n_all,
    COUNT: tl.constexpr, SEGMENTS: tl.constexpr, HALVINGS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """From the top of a lane's cell and its first prefix: a step takes the next key in, or the event before x out.

    A lane begins one position beyond its cell. Prefixes that reach there belong to a cell above, and are passed without
    a record; the position itself brings nothing in or out.
    """
    n_cells = n_chunks + n_buckets - 1
    cell = tl.program_id(0) * LANES + tl.arange(0, LANES)
    column = tl.load(p_column + cell, mask=cell < n_all, other=-1)
    active = column >= 0
    # Lanes beyond the last cell are idle, but look up the unit of a row as all do.
    cell = tl.minimum(cell, n_all - 1)
    weight = tl.load(p_corner_weight + cell, mask=active, other=0)
    moment = tl.load(p_corner_moment + cell, mask=active, other=0)
    row, number = cell.to(tl.int64) // n_cells, column + n_buckets - 1 - (cell % n_cells)
    length, count = tl.load(p_length + row), events_of(p_length, row, COUNT)
    halvings = halvings_of(p_length, row, times, HALVINGS)
    chunk, bucket = chunk >> halvings, bucket >> halvings
    top = tl.minimum((number + 1) * bucket, count)
    bottom = tl.where(number == 0, -1, number * bucket)
    stop = tl.minimum((column + 1) * chunk, length)
    w, m = own_events(p_value, p_place, p_unit, row, column * chunk, active, top, times, COUNT)
    weight += w
    moment += m
    t = column * chunk + 1
    x = top + 1
    low, high, room = limits(p_counts, p_start, p_end, p_unit, row, t, active, times, length, budget, COUNT, SEGMENTS)
    # Without +inf and segments nothing but t changes from prefix to prefix.
    changing = tl.max(active.to(tl.int32), 0) > 0
    if not SEGMENTS:
        if COUNT:
            changing = changing & False
        else:
            infinite = tl.load(p_counts + row * times + length - 1, mask=active, other=0) >> 32
            changing = tl.max((infinite > 0).to(tl.int32), 0) > 0
    unit = tl.load(p_unit + row)
    while tl.max(active.to(tl.int32), 0) > 0:
        # Each step takes an event or a key, and it is not known before which. The next four of both are loaded
        # together, so that four steps wait for memory once.
        code, edge = _event_before(p_code, p_edge, row, x, top, events, count, active, COUNT)
        code_1, edge_1 = _event_before(p_code, p_edge, row, x - 1, top, events, count, active, COUNT)
        code_2, edge_2 = _event_before(p_code, p_edge, row, x - 2, top, events, count, active, COUNT)
        code_3, edge_3 = _event_before(p_code, p_edge, row, x - 3, top, events, count, active, COUNT)
        place, value = _key_at(p_place, p_value, row, t, stop, times, active, COUNT)
        place_1, value_1 = _key_at(p_place, p_value, row, t + 1, stop, times, active, COUNT)
        place_2, value_2 = _key_at(p_place, p_value, row, t + 2, stop, times, active, COUNT)
        place_3, value_3 = _key_at(p_place, p_value, row, t + 3, stop, times, active, COUNT)
        for _ in tl.static_range(4):
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
            code, code_1, code_2 = _shifted(back, code, code_1, code_2, code_3)
            place, place_1, place_2 = _shifted(here, place, place_1, place_2, place_3)
            if not COUNT:
                edge, edge_1, edge_2 = _shifted(back, edge, edge_1, edge_2, edge_3)
                value, value_1, value_2 = _shifted(here, value, value_1, value_2, value_3)
            if changing:
                new_low, new_high, new_room = limits(
                    p_counts, p_start, p_end, p_unit, row, t, active & here, times, length, budget, COUNT, SEGMENTS
                )  # fmt: skip
                low = tl.where(here, new_low, low)
                high = tl.where(here, new_high, high)
                room = tl.where(here, new_room, room)
