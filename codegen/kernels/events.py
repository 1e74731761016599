"""Sorted lists of events: every key's two, merged in falling order of value, or keys alone, as Triton kernels."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexsparse.codegen.kernels.arithmetic import cdiv
from flexsparse.codegen.kernels.launch import launch


class Events(NamedTuple):
    """The sorted list of each of R rows, N positions of S times. Events of weight 0 have the code -1.

    ``code``: 2 * time, plus 1 for an event of weight -1. In a count of keys N is S, every weight is 1, and there are
    no values.
    """

    code: Tensor  # [R, N] int32, by position
    edge: Tensor  # [R, N] int64, by position; the values
    value: Tensor  # [R, S] int64, by time: the value of the event of weight 1
    # [R, S] by time: its position, N for weight 0. int32 in a count of keys, else int64, with the position of the event
    # of weight -1 in the upper half.
    place: Tensor


@triton.jit
def load_events(p_code, p_edge, o_event, m_event, COUNT: tl.constexpr):
    """Time, weight and moment of events; time is beyond every prefix where there is none."""
    code = tl.load(p_code + o_event, mask=m_event, other=-1)
    none = code < 0
    time = tl.where(none, 2147483647, code >> 1)
    if COUNT:
        weight = code * 0
        moment = tl.where(none, 0, 1)
        edge = weight
    else:
        edge = tl.load(p_edge + o_event, mask=m_event, other=0)
        weight = tl.where(none, 0, 1 - 2 * (code & 1))
        moment = weight.to(tl.int64) * edge
    return time, weight, moment, edge


@triton.jit
def _merge(
    p_order, p_sorted, p_alive, p_start, p_end, p_unit, p_code, p_edge, p_place, times, steps,
    SEGMENTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Where each key's two events stand: after the same keys' events above them, found by binary search."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_at = at < times
    key = tl.load(p_order + row * times + at, mask=m_at, other=0).to(tl.int32)
    value = tl.load(p_sorted + row * times + at, mask=m_at, other=0)
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
        beyond = open_ & (tl.load(p_sorted + row * times + middle, mask=open_, other=0) - unit > value)
        above_low = tl.where(beyond, middle + 1, above_low)
        above_high = tl.where(open_ & ~beyond, middle, above_high)
        middle = (below_low + below_high) // 2
        open_ = m_at & (below_low < below_high)
        beyond = open_ & (tl.load(p_sorted + row * times + middle, mask=open_, other=0) >= value - unit)
        below_low = tl.where(beyond, middle + 1, below_low)
        below_high = tl.where(open_ & ~beyond, middle, below_high)
    plus, minus = at + above_low, at + below_low
    events = 2 * row * times
    tl.store(p_code + events + plus, tl.where(alive, 2 * key, -1), mask=m_at)
    tl.store(p_code + events + minus, tl.where(alive, 2 * key + 1, -1), mask=m_at)
    tl.store(p_edge + events + plus, value, mask=m_at)
    tl.store(p_edge + events + minus, value - unit, mask=m_at)
    plus, minus = tl.where(alive, plus, 2 * times), tl.where(alive, minus, 2 * times)
    tl.store(p_place + row * times + key, (minus.to(tl.int64) << 32) | plus.to(tl.int64), mask=m_at)


class Ranked(NamedTuple):
    """The keys by falling score, R rows of S: their values in that order; ``counted``, every key with weight 1."""

    order: Tensor  # [R, S] int64
    value: Tensor  # [R, S] int64, by place
    counted: Events


@triton.jit
def _rank(p_order, p_value, p_sorted, p_code, p_rank, times, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_at = at < times
    key = tl.load(p_order + row * times + at, mask=m_at, other=0).to(tl.int32)
    value = tl.load(p_value + row * times + key, mask=m_at, other=0)
    tl.store(p_sorted + row * times + at, value, mask=m_at)
    tl.store(p_code + row * times + at, 2 * key, mask=m_at)
    tl.store(p_rank + row * times + key, at, mask=m_at)


def ranked(order: Tensor, value: Tensor) -> Ranked:
    """From the keys in falling order, [R, S] int64, and their values [R, S] int64 by key."""
    rows, times = order.shape
    code, rank = (torch.empty(rows, times, dtype=torch.int32, device=order.device) for _ in range(2))
    by_place = torch.empty_like(value)
    launch(_rank, (rows, cdiv(times, 1024)), (order, value, by_place, code, rank), (times,), BLOCK=1024)
    return Ranked(order, by_place, Events(code, value, value, rank))


def merged_events(
    keys: Ranked, value: Tensor, alive: Tensor, unit: Tensor, segments: tuple[Tensor, Tensor] | None = None
) -> Events:
    """The events at ``value`` (weight 1) and ``value - unit`` (weight -1) of every key, merged in falling order.

    ``keys`` by falling value, later segments first; value [R, S] int64 by key, falling along their order inside a
    segment; alive [R, S] int8, 1 for weight 1 and any other for weight 0; unit [R] int64; segments as for
    ``crossings``.
    """
    rows, times = value.shape

    def made(count: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(rows, count, dtype=dtype, device=value.device)

    code, edge = made(2 * times, torch.int32), made(2 * times, torch.int64)
    place = made(times, torch.int64)
    start, end = segments if segments is not None else (keys.order, keys.order)
    block = 512
    launch(
        _merge, (rows, cdiv(times, block)),
        (keys.order, keys.value, alive, start, end, unit, code, edge, place), (times, times.bit_length()),
        SEGMENTS=segments is not None, BLOCK=block,
    )  # fmt: skip
    return Events(code, edge, value, place)
