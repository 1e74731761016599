"""Lifetimes of the causal top-k, the slot of every key, and the slots as chunks of queries find them, in Triton.

A key that enters a full set takes the slot of the one that leaves it, at the same query. So slots follow links from
key to key, which are followed by doubling: inside blocks first, then across them.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexsparse.codegen.kernels.arithmetic import cdiv, next_power_of_2
from flexsparse.codegen.kernels.grid import Quantized
from flexsparse.codegen.kernels.launch import launch
from flexsparse.codegen.kernels.pruning import Kept

_BLOCK = 1024
# A row of up to so many keys is one program's.
_ONE_PROGRAM = 4096
# So few keys take small blocks, as nothing else would fill a device.
_FEW = 1 << 18
# About how many programs fill a device; of rows shorter than their room most would have nothing to do.
_PROGRAMS = 1 << 11
_NONE = -(2**31)
# So many keys are read rather than handed from chunk to chunk: by every chunk those before it.
_READ_AT_ONCE, _TOGETHER = 1 << 23, 4


@triton.jit
def _link_of(
    p_counts, p_start, p_leaving, row, key, m_key, birth, death, times, k, none,
    SEGMENTS: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    """The key whose slot each key takes, or -1 less its slot where it takes a fresh one."""
    if KEPT:
        # None is left out before k are there.
        before = key
    else:
        counts = tl.load(p_counts + row * times + key, mask=m_key, other=0)
        if SEGMENTS:
            start = tl.load(p_start + row * times + key, mask=m_key, other=0).to(tl.int32)
            counts -= tl.load(p_counts + row * times + start - 1, mask=m_key & (start > 0), other=0)
        before = ((counts >> 32) + (counts & 4294967295)).to(tl.int32) - 1
    held = m_key & (death > birth)
    # Whoever enters a full set pushes a key out at the same query.
    leaver = tl.load(p_leaving + row * times + key, mask=held & (before >= k), other=0)
    return tl.where(held, tl.where(before < k, -1 - before, leaver), none)


@triton.jit
def _follow_inside(p_link, row, first, key, m_key, link, times):
    """Links of one block, doubled until they leave it or end; each program reads what it has written itself."""
    tl.store(p_link + row * times + key, link, mask=m_key)
    inside = m_key & (link >= first)
    while tl.max(inside.to(tl.int32), 0) > 0:
        # Everyone has written before anyone reads, and the other way round.
        tl.debug_barrier()
        link = tl.where(inside, tl.load(p_link + row * times + link, mask=inside, other=0), link)
        tl.debug_barrier()
        tl.store(p_link + row * times + key, link, mask=m_key)
        inside = m_key & (link >= first)
    return link


@triton.jit
def _times_of(p_time, row, key, m_key, times, KEPT: tl.constexpr):
    """Where keys stand in their row."""
    time = key
    if KEPT:
        time = tl.load(p_time + row * times + key, mask=m_key, other=0)
    return time


@triton.jit
def _put(p_slot, p_time, row, key, m_key, link, times, none, KEPT: tl.constexpr, LAST: tl.constexpr):
    """What links end at is -1 less the slot."""
    if LAST:
        link = tl.where(link == none, -1, -1 - link)
        key = _times_of(p_time, row, key, m_key, times, KEPT)
    tl.store(p_slot + row * times + key, link, mask=m_key)


@triton.jit
def _deaths(
    p_count, p_rank, p_alive, p_length, p_time, p_start, p_end, p_birth, p_death, p_leaving, times, k, after, steps,
    SEGMENTS: tl.constexpr, KEPT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The first query at which each key is no longer among the k best, by binary search over the prefixes."""
    row = tl.program_id(0).to(tl.int64)
    length = tl.load(p_length + row)
    if tl.program_id(1) * BLOCK < length:
        key = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        m_key = key < length
        start, end = tl.zeros_like(key), tl.zeros_like(key) + times
        if SEGMENTS:
            start = tl.load(p_start + row * times + key, mask=m_key, other=0).to(tl.int32)
            end = tl.load(p_end + row * times + key, mask=m_key, other=0).to(tl.int32)
        rank = tl.load(p_rank + row * times + key, mask=m_key, other=0)
        time = _times_of(p_time, row, key, m_key, times, KEPT)
        birth = tl.minimum(time + after, end)
        # The prefix of t keys serves the query of its last one's time + after. Fewer than k keys push nobody out.
        low = tl.maximum(key + 1, tl.minimum(start + k, length))
        high = low * 0 + length + 1 if KEPT else tl.maximum(end - after + 1, low)
        stop = high
        for _ in range(steps):
            middle = (low + high) // 2
            open_ = m_key & (low < high)
            out = tl.load(p_count + row * times + middle - 1, mask=open_, other=0) <= rank
            high = tl.where(open_ & out, middle, high)
            low = tl.where(open_ & ~out, middle + 1, low)
        last = _times_of(p_time, row, low - 1, m_key & (low < stop), times, KEPT)
        death = tl.where(low < stop, tl.minimum(last + after, end), end)
        if not KEPT:
            alive = tl.load(p_alive + row * times + key, mask=m_key, other=0) != 0
            death = tl.where(alive, death, birth)
        death = tl.maximum(death, birth)
        tl.store(p_birth + row * times + time, birth, mask=m_key)
        tl.store(p_death + row * times + time, death, mask=m_key)
        # One key at most leaves with another that enters; a key that lives to the segment's end does not leave.
        tl.store(p_leaving + row * times + low - 1, key, mask=m_key & (death > birth) & (death < end))


@triton.jit
def _links(
    p_counts, p_length, p_time, p_start, p_birth, p_death, p_leaving, p_link, p_slot, times, k, none,
    SEGMENTS: tl.constexpr, KEPT: tl.constexpr, BLOCK: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Links of one block's keys, followed as far as they stay inside it."""
    row = tl.program_id(0).to(tl.int64)
    first, length = tl.program_id(1) * BLOCK, tl.load(p_length + row)
    if first < length:
        key = first + tl.arange(0, BLOCK)
        m_key = key < length
        time = _times_of(p_time, row, key, m_key, times, KEPT)
        birth = tl.load(p_birth + row * times + time, mask=m_key, other=0)
        death = tl.load(p_death + row * times + time, mask=m_key, other=0)
        link = _link_of(p_counts, p_start, p_leaving, row, key, m_key, birth, death, times, k, none, SEGMENTS, KEPT)
        link = _follow_inside(p_link, row, first, key, m_key, link, times)
        if LAST:
            _put(p_slot, p_time, row, key, m_key, link, times, none, KEPT, LAST)


@triton.jit
def _follow(
    p_link, p_length, p_time, p_next, times, none, KEPT: tl.constexpr, BLOCK: tl.constexpr, LAST: tl.constexpr
):  # fmt: skip
    """Every link doubled once, block by block."""
    row = tl.program_id(0).to(tl.int64)
    length = tl.load(p_length + row)
    for first in range(tl.program_id(1) * BLOCK, length, tl.num_programs(1) * BLOCK):
        key = first + tl.arange(0, BLOCK)
        m_key = key < length
        link = tl.load(p_link + row * times + key, mask=m_key, other=-1)
        link = tl.where(link >= 0, tl.load(p_link + row * times + link, mask=m_key & (link >= 0), other=0), link)
        _put(p_next, p_time, row, key, m_key, link, times, none, KEPT, LAST)


def lifetimes(
    count: Tensor,
    rank: Tensor,
    grid: Quantized,
    k: int,
    after: int,
    segments: tuple[Tensor, Tensor] | None,
    kept: Kept | None,
    out: tuple[Tensor, Tensor, Tensor],
) -> None:
    """birth, death and slot of every key, [R, S] int32 each, into ``out``; the slot of one never selected is -1.

    ``count`` [R, S] int32: the crossing, in the order of rank, of k - 1 keys for every prefix; ``rank`` [R, S] int32
    by key. Where only some keys are ``kept``, these and ``grid`` are of them, and the others' are there.
    """
    rows, times = rank.shape
    birth, death, slot = out
    link, leaving = torch.empty_like(rank), torch.empty_like(rank)
    start, end = segments if segments is not None else (rank, rank)
    time = rank if kept is None else kept.time
    flags = {"KEPT": kept is not None}
    segmented = segments is not None
    few = 1024 if rows * times > _FEW else 128
    launch(
        _deaths, (rows, cdiv(times, few)),
        (count, rank, grid.alive, grid.length, time, start, end, birth, death, leaving),
        (times, k, after, times.bit_length()), SEGMENTS=segmented, BLOCK=few, **flags,
    )  # fmt: skip
    # A chain enters every block once at most.
    block = next_power_of_2(times) if times <= _ONE_PROGRAM else _BLOCK
    shape = rows, cdiv(times, block)
    doublings = (shape[1] - 1).bit_length()
    launch(
        _links, shape, (grid.counts, grid.length, time, start, birth, death, leaving, link, slot), (times, k, _NONE),
        SEGMENTS=segmented, BLOCK=block, LAST=doublings == 0, num_warps=max(4, min(16, block // 128)), **flags,
    )  # fmt: skip
    following = leaving
    programs = rows, min(shape[1], cdiv(_PROGRAMS, rows))
    for left in reversed(range(doublings)):
        target = slot if left == 0 else following
        launch(
            _follow, programs, (link, grid.length, time, target), (times, _NONE), BLOCK=block, LAST=left == 0, **flags
        )  # fmt: skip
        link, following = target, link


@triton.jit
def _clear(p_table, size, BLOCK: tl.constexpr):
    """No key in any slot yet."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(p_table + at, tl.full([BLOCK], -1, tl.int32), mask=at < size)


@triton.jit
def _place(p_birth, p_death, p_slot, p_table, times, chunk, n_chunks, k, BLOCK: tl.constexpr):
    """Each key at the first chunk that finds it in its slot."""
    row = tl.program_id(0).to(tl.int64)
    key = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_key = key < times
    birth = tl.load(p_birth + row * times + key, mask=m_key, other=0)
    death = tl.load(p_death + row * times + key, mask=m_key, other=0)
    slot = tl.load(p_slot + row * times + key, mask=m_key, other=-1)
    part = (birth + chunk - 1) // chunk
    found = m_key & (slot >= 0) & (part < n_chunks) & (death > part * chunk)
    tl.store(p_table + (row * n_chunks + part) * k + slot, key, mask=found)


@triton.jit
def _newest(p_table, p_newest, n_chunks, n_groups, k, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """The newest key that each slot got in one group of chunks."""
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    part = group * GROUP + tl.arange(0, GROUP)
    m_entry = (part < n_chunks)[:, None] & (slot < k)[None, :]  # [GROUP, BLOCK]
    entry = (row * n_chunks + part)[:, None] * k + slot[None, :]
    newest = tl.max(tl.load(p_table + entry, mask=m_entry, other=-1), 0)
    tl.store(p_newest + (row * n_groups + group) * k + slot, newest, mask=slot < k)


@triton.jit
def _alive_at(p_death, row, times, query, key, m_slot):
    """The keys that are selected for a query, -1 for others."""
    death = tl.load(p_death + row * times + key, mask=m_slot & (key >= 0), other=0)
    return tl.where(death > query, key, -1)


@triton.jit
def _fill(p_death, p_table, p_newest, times, chunk, n_chunks, n_groups, k, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """From chunk to chunk a slot keeps its key, until another takes it or the key dies."""
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    m_slot = slot < k
    latest = tl.full([BLOCK], -1, tl.int32)
    for other in range(group):
        newest = tl.load(p_newest + (row * n_groups + other) * k + slot, mask=m_slot, other=-1)
        latest = tl.maximum(latest, newest)
    # Four chunks at a time: what they load does not wait for one another.
    part = group * GROUP
    stop = tl.minimum(part + GROUP, n_chunks)
    stops = tl.zeros_like(slot) + stop
    while part < stop:
        entry = p_table + (row * n_chunks + part) * k + slot
        first = tl.maximum(latest, tl.load(entry, mask=m_slot, other=-1))
        second = tl.maximum(first, tl.load(entry + k, mask=m_slot & (part + 1 < stops), other=-1))
        third = tl.maximum(second, tl.load(entry + 2 * k, mask=m_slot & (part + 2 < stops), other=-1))
        latest = tl.maximum(third, tl.load(entry + 3 * k, mask=m_slot & (part + 3 < stops), other=-1))
        first = _alive_at(p_death, row, times, part * chunk, first, m_slot)
        second = _alive_at(p_death, row, times, (part + 1) * chunk, second, m_slot)
        third = _alive_at(p_death, row, times, (part + 2) * chunk, third, m_slot)
        fourth = _alive_at(p_death, row, times, (part + 3) * chunk, latest, m_slot)
        tl.store(entry, first, mask=m_slot)
        tl.store(entry + k, second, mask=m_slot & (part + 1 < stops))
        tl.store(entry + 2 * k, third, mask=m_slot & (part + 2 < stops))
        tl.store(entry + 3 * k, fourth, mask=m_slot & (part + 3 < stops))
        part += 4


@triton.jit
def _tables_at_once(
    p_birth, p_death, p_slot, p_table, times, chunk, n_chunks, k, GROUP: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The slots of a group of chunks, from all keys before their first queries."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1) * GROUP
    end = tl.minimum(part + GROUP, n_chunks)
    target = p_table + row * n_chunks * k
    for first in range(part * k, end * k, BLOCK):
        entry = first + tl.arange(0, BLOCK)
        tl.store(target + entry, tl.full([BLOCK], -1, tl.int32), mask=entry < end * k)
    # Everyone has written before anyone writes again.
    tl.debug_barrier()
    last = (end - 1) * chunk
    for first in range(0, last + 1, BLOCK):
        key = first + tl.arange(0, BLOCK)
        m_key = key <= last
        birth = tl.load(p_birth + row * times + key, mask=m_key, other=0)
        death = tl.load(p_death + row * times + key, mask=m_key, other=0)
        slot = tl.load(p_slot + row * times + key, mask=m_key, other=0)
        for step in tl.static_range(GROUP):
            query = tl.zeros_like(key) + (part + step) * chunk
            found = (birth <= query) & (death > query) & (query <= last)
            tl.store(target + (part + step) * k + slot, key, mask=found)


def slot_table(birth: Tensor, death: Tensor, slot: Tensor, table: Tensor, chunk: int) -> None:
    """The key in each slot as query ``c * chunk`` finds it, -1 for none, into table [R, ceil(S / chunk), k] int32."""
    rows, times = birth.shape
    n_chunks, k = table.shape[1:]
    if rows * n_chunks * times <= _READ_AT_ONCE:
        launch(
            _tables_at_once, (rows, cdiv(n_chunks, _TOGETHER)), (birth, death, slot, table),
            (times, chunk, n_chunks, k), GROUP=_TOGETHER,
            BLOCK=max(1024, min(4096, next_power_of_2(times))), num_warps=16,
        )  # fmt: skip
        return
    # Keys come in order, so the newest in a slot is the largest number that was placed in it.
    launch(_clear, (cdiv(table.numel(), _BLOCK),), (table,), (table.numel(),), BLOCK=_BLOCK)
    launch(
        _place, (rows, cdiv(times, _BLOCK)), (birth, death, slot, table), (times, chunk, n_chunks, k),
        BLOCK=_BLOCK,
    )  # fmt: skip
    # Where rows have slots enough for all programs, chunks need not be cut in groups.
    whole = rows * cdiv(k, 64) >= _PROGRAMS
    group = next_power_of_2(n_chunks) if whole else max(16, next_power_of_2(math.isqrt(n_chunks)))
    n_groups = cdiv(n_chunks, group)
    newest = torch.empty(rows, n_groups, k, dtype=torch.int32, device=birth.device)
    size = (rows, n_groups, cdiv(k, 64))
    flags = {"GROUP": group, "BLOCK": 64, "num_warps": 2}
    if not whole:
        launch(_newest, size, (table, newest), (n_chunks, n_groups, k), **flags)
    launch(_fill, size, (death, table, newest), (times, chunk, n_chunks, n_groups, k), **flags)
