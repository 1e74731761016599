"""Sorted lists of events: every key's two, merged in falling order of value, or keys alone, as Triton kernels."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexsparse.codegen.kernels.arithmetic import cdiv
from flexsparse.codegen.kernels.grid import Quantized, grid_values
from flexsparse.codegen.kernels.launch import launch

# Positions of a row that a block of the merge looks at first, and so few keys that it takes small blocks.
_SAMPLES, _FEW = 256, 1 << 18
_BLOCK = 512


class Events(NamedTuple):
    """The sorted list of each of R rows, N positions of S times. Events of weight 0 have the code -1.

    A row has ``length`` keys; what stands behind these, and behind their events, is not set.

    ``code``: 2 * time, plus 1 for an event of weight -1. In a count of keys N is S, every weight is 1, and there are
    no values.
    """

    code: Tensor  # [R, N] int32, by position
    edge: Tensor  # [R, N] int64, by position; the values
    value: Tensor  # [R, S] int64, by time: the value of the event of weight 1
    # [R, S] by time: its position, N for weight 0. int32 in a count of keys, else int64, with the position of the event
    # of weight -1 in the upper half.
    place: Tensor
    length: Tensor  # [R] int32


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
def _bounds_around(samples, m_samples, stride, times, first, last):
    """Between which two samples the number of values above ``first`` ends, at least, and that above ``last``, at most.

    The samples are the values at every ``stride``-th position, falling; ``first`` is not below ``last``.
    """
    low = tl.sum((m_samples & (samples > first)).to(tl.int32), 0)
    high = tl.sum((m_samples & (samples > last)).to(tl.int32), 0)
    return tl.maximum((low - 1) * stride + 1, 0), tl.minimum(high * stride, times)


@triton.jit
def _merge(
    p_ranked, p_sorted, p_alive, p_length, p_counts, p_start, p_end, p_unit, p_code, p_edge, p_place, times,
    SEGMENTS: tl.constexpr, BLOCK: tl.constexpr, SAMPLES: tl.constexpr,
):  # fmt: skip
    """Where each key's two events stand: after the same keys' events above them, found by binary search.

    A block's keys follow one another, and so do the ends of their searches, between samples of the whole row.
    """
    row = tl.program_id(0).to(tl.int64)
    start, length = tl.program_id(1) * BLOCK, tl.load(p_length + row)
    if start < length:
        at = start + tl.arange(0, BLOCK)
        m_at = at < length
        key = tl.load(p_ranked + row * times + at, mask=m_at, other=0) >> 1
        value = tl.load(p_sorted + row * times + at, mask=m_at, other=0)
        unit = tl.load(p_unit + row)
        # How many keys have an event of weight -1 above this value, and of weight 1 at or above this value less a unit.
        above_low = tl.zeros_like(at)
        above_high = above_low + length
        below_low, below_high = above_low, above_high
        if SEGMENTS:
            alive = tl.load(p_alive + row * times + key, mask=m_at, other=0) == 1
            above_low = times - tl.load(p_end + row * times + key, mask=m_at, other=0).to(tl.int32)
            above_high = times - tl.load(p_start + row * times + key, mask=m_at, other=0).to(tl.int32)
            below_low, below_high = above_low, above_high
            span = times
        else:
            # First what is +inf, last what is -inf and NaN.
            counts = tl.load(p_counts + row * times + length - 1)
            infinite = (counts >> 32).to(tl.int32)
            alive = (at >= infinite) & (at < infinite + (counts & 4294967295).to(tl.int32))
            sample, stride = tl.arange(0, SAMPLES), (length + SAMPLES - 1) // SAMPLES
            m_sample = sample * stride < length
            samples = tl.load(p_sorted + row * times + sample * stride, mask=m_sample, other=0)
            first = tl.load(p_sorted + row * times + start)
            final = tl.minimum(start + BLOCK, length) - 1
            last = tl.load(p_sorted + row * times + final)
            low, high = _bounds_around(samples, m_sample, stride, length, first + unit, last + unit)
            span = high - low
            above_low, above_high = tl.zeros_like(at) + low, tl.zeros_like(at) + high
            low, high = _bounds_around(samples, m_sample, stride, length, first - unit - 1, last - unit - 1)
            span = tl.maximum(span, high - low)
            below_low, below_high = tl.zeros_like(at) + low, tl.zeros_like(at) + high
        while span > 0:
            middle = (above_low + above_high) // 2
            open_ = m_at & (above_low < above_high)
            beyond = open_ & (tl.load(p_sorted + row * times + middle, mask=open_, other=0) > value + unit)
            above_low = tl.where(beyond, middle + 1, above_low)
            above_high = tl.where(open_ & ~beyond, middle, above_high)
            middle = (below_low + below_high) // 2
            open_ = m_at & (below_low < below_high)
            beyond = open_ & (tl.load(p_sorted + row * times + middle, mask=open_, other=0) >= value - unit)
            below_low = tl.where(beyond, middle + 1, below_low)
            below_high = tl.where(open_ & ~beyond, middle, below_high)
            span //= 2
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

    value: Tensor  # [R, S] int64, by place
    counted: Events


@triton.jit
def _rank(
    p_order, p_score, p_step, p_center, p_top, p_bottom, p_sorted, p_code, p_rank, times, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_at = at < times
    key = tl.load(p_order + row * times + at, mask=m_at, other=0).to(tl.int32)
    # Once more from the score: its value by key would have to be looked up.
    score = tl.load(p_score + row * times + at, mask=m_at, other=0.0)
    step, center, top, bottom = (
        tl.load(p_step + row), tl.load(p_center + row), tl.load(p_top + row), tl.load(p_bottom + row)
    )  # fmt: skip
    value, _, _ = grid_values(score, step, center, top, bottom)
    tl.store(p_sorted + row * times + at, value, mask=m_at)
    tl.store(p_code + row * times + at, 2 * key, mask=m_at)
    tl.store(p_rank + row * times + key, at, mask=m_at)


def empty_ranks(grid: Quantized) -> Ranked:
    """Room for the order of keys."""
    value = grid.value
    code, rank = (torch.empty_like(value, dtype=torch.int32) for _ in range(2))
    return Ranked(torch.empty_like(value), Events(code, value, value, rank, grid.length))


def ranked(order: Tensor, score: Tensor, grid: Quantized) -> Ranked:
    """From the keys in falling order, [R, S] int64, and their scores in that order, [R, S]."""
    rows, times = order.shape
    found = empty_ranks(grid)
    launch(
        _rank, (rows, cdiv(times, _BLOCK)),
        (order, score, grid.step, grid.center, grid.top, grid.bottom, found.value, found.counted.code,
         found.counted.place), (times,), BLOCK=_BLOCK,
    )  # fmt: skip
    return found


def merged_events(keys: Ranked, grid: Quantized, segments: tuple[Tensor, Tensor] | None = None) -> Events:
    """The events at ``grid.value`` (weight 1) and a unit below (weight -1) of every key, merged in falling order.

    ``keys`` by falling score, later segments first; segments as for ``crossings``. Keys that are not finite get events
    of weight 0.
    """
    value = grid.value
    rows, times = value.shape

    def made(count: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(rows, count, dtype=dtype, device=value.device)

    code, edge = made(2 * times, torch.int32), made(2 * times, torch.int64)
    place = made(times, torch.int64)
    start, end = segments if segments is not None else (keys.counted.code, keys.counted.code)
    block = 512 if rows * times > _FEW else 128
    launch(
        _merge, (rows, cdiv(times, block)),
        (keys.counted.code, keys.value, grid.alive, grid.length, grid.counts, start, end, grid.unit, code, edge, place),
        (times,), SEGMENTS=segments is not None, BLOCK=block, SAMPLES=_SAMPLES,
    )  # fmt: skip
    return Events(code, edge, value, place, grid.length)
