"""Gradients of the keys in slots: along spans of chunks, joined afterwards, and taken over by the keys' own tiles."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from flexsparse.codegen.gathering.tiles import Lines, key_loads

INDICES = """
q_len = length
kv_len = length
feature = tl.arange(0, BLOCK_D)
value_feature = tl.arange(0, BLOCK_V)
"""


def indented(lines: Sequence[str], by: int = 4) -> str:
    return textwrap.indent("\n".join(lines).strip("\n"), " " * by)


def known(lines: Lines, seen: str) -> Lines:
    """A tile's lines with what the kernel knows of its pairs."""
    return [line.replace("SEEN", seen) for line in lines]


def taken_over(n: int, gated: Sequence[int]) -> str:
    """The slots' share of a tile of keys: a key has one if it was in its slot as some chunk started."""
    score = "".join(f"d_u_{m} += tl.load(p_part_u_{n}_{m} + pair + column, mask=in_slot, other=0.0)\n" for m in gated)
    return f"""
own_{n} = (b * heads_{n} + kv_head * heads_{n} // (heads // group)) * length + column
waits = (column + after_{n} + BLOCK_M - 1) // BLOCK_M * BLOCK_M
in_slot = m_column & (waits < length) & (waits < tl.load(p_death_{n} + own_{n}))
m_slot = in_slot[:, None] & (feature[None, :] < HEAD_DIM)
at_key = (pair + column)[:, None] * HEAD_DIM + feature[None, :]
d_key += tl.load(p_part_key_{n} + at_key, mask=m_slot, other=0.0)
m_slot = in_slot[:, None] & (value_feature[None, :] < VALUE_DIM)
at_value = (pair + column)[:, None] * VALUE_DIM + value_feature[None, :]
d_value += tl.load(p_part_value_{n} + at_value, mask=m_slot, other=0.0)
{score}"""


def _slot_head(n: int, gated: Sequence[int]) -> str:
    return f"""
pair = tl.program_id({{pair}}).to(tl.int64)
b = pair // kv_heads
kv_head = pair % kv_heads
{INDICES}
slot = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
m_slot = slot < k_{n}
table = p_slots_{n} + (b * heads_{n} + kv_head * heads_{n} // kv_heads) * n_chunks * k_{n} + slot
width: tl.constexpr = HEAD_DIM + VALUE_DIM + {len(gated)}
"""


def slot_gradient(n: int, body: Lines, gated: Sequence[int]) -> str:
    zero = "".join(f"    d_u_{m} = tl.where(changed[None, :], 0.0, d_u_{m})\n" for m in gated)

    def put(mask: str, by: str) -> str:
        at = "+ pair * length"
        lines = [
            f"put_rows(p_part_key_{n} {at} * HEAD_DIM, holder, HEAD_DIM, feature, tl.trans(d_key) * scale, {mask}, "
            "HEAD_DIM)",
            f"put_rows(p_part_value_{n} {at} * VALUE_DIM, holder, VALUE_DIM, value_feature, tl.trans(d_value), {mask}, "
            "VALUE_DIM)",
        ]
        lines += [f"tl.store(p_part_u_{n}_{m} {at} + holder, tl.sum(d_u_{m}, 0), mask={mask})" for m in gated]
        return "".join(f"{by}{line}\n" for line in lines)

    def put_end(which: int, mask: str, by: str) -> str:
        lines = [
            f"end = ((pair * SPANS + tl.program_id(1)) * 2 + {which}) * k_{n} * width",
            f"put_rows(p_ends + end, slot, width, feature, tl.trans(d_key) * scale, {mask}, HEAD_DIM)",
            f"put_rows(p_ends + end + HEAD_DIM, slot, width, value_feature, tl.trans(d_value), {mask}, VALUE_DIM)",
        ]
        for place, m in enumerate(gated):
            at = f"p_ends + end + slot * width + HEAD_DIM + VALUE_DIM + {place}"
            lines.append(f"tl.store({at}, tl.sum(d_u_{m}, 0), mask={mask})")
        return "".join(f"{by}{line}\n" for line in lines)

    return (
        _slot_head(n, gated).format(pair=2)
        + """
begin = tl.program_id(1) * span
stop = tl.minimum(begin + span, n_chunks)
"""
        + "blocks = tl.num_programs(0)\n"
        + f"next_change = p_next_{n} + ((b * heads_{n} + kv_head * heads_{n} // kv_heads) * blocks + tl.program_id(0)) "
        "* n_chunks\n"
        + f"holder = tl.load(table + begin * k_{n}, mask=m_slot, other=-1)\n"
        + "# Whether the slot still has the key with which the span began.\n"
        + "initial = holder >= -1\n"
        + "# Keys are columns: so few of them would not fill the rows of a product.\n"
        + "d_key = tl.zeros([BLOCK_D, BLOCK_N], tl.float32)\nd_value = tl.zeros([BLOCK_V, BLOCK_N], tl.float32)\n"
        + "".join(f"d_u_{m} = tl.zeros([BLOCK_Q, BLOCK_N], tl.float32)\n" for m in gated)
        + "chunk = begin\nwhile chunk < stop:\n"
        + "    # No slot of the block changes before this chunk.\n"
        + "    until = tl.minimum(tl.load(next_change + chunk), stop)\n"
        + f"    now = tl.load(table + tl.minimum(until, n_chunks - 1) * k_{n}, mask=m_slot, other=-1)\n"
        + "    now = tl.where(until < stop, now, holder)\n"
        + "    column = tl.maximum(holder, 0)\n    kv = column[None, :]\n"
        + "    key = rows_of(p_key + b * stride_kb + kv_head * stride_kh, column, stride_ks, feature, HEAD_DIM, "
        "BLOCK_D, WIDE)\n"
        + "    value = rows_of(p_value + b * stride_vb + kv_head * stride_vh, column, stride_vs, value_feature, "
        "VALUE_DIM, BLOCK_V, WIDE)\n"
        + f"    gone = tl.load(p_death_{n} + (b * heads_{n} + kv_head * heads_{n} // kv_heads) * length + column)\n"
        + "    gone = tl.where(holder >= 0, gone, 0)[None, :]\n"
        + "    h = kv_head * group\n"
        + indented(key_loads(gated, "[None, :]"), 4)
        + "\n"
        + "    steps = tl.where(tl.max(holder, 0) >= 0, (until - chunk) * group * (BLOCK_M // BLOCK_Q), 0)\n"
        + "    for step in range(0, steps):\n"
        + "        h = kv_head * group + step % group\n"
        + "        first_row = chunk * BLOCK_M + step // group * BLOCK_Q\n"
        + indented(known(body, "q < gone"), 8)
        + "\n    changed = now != holder\n    left = changed & (holder >= 0)\n"
        + "    first_here = initial & (SPANS > 1)\n"
        + "    # Few slots change at a time, and their keys seldom are of both kinds.\n"
        + "    if tl.max((left & ~first_here).to(tl.int32), 0) > 0:\n"
        + put("left & ~first_here", " " * 8)
        + "    if tl.max((left & first_here).to(tl.int32), 0) > 0:\n"
        + put_end(0, "left & first_here", " " * 8)
        + "    d_key = tl.where(changed[None, :], 0.0, d_key)\n"
        + "    d_value = tl.where(changed[None, :], 0.0, d_value)\n"
        + zero
        + "    initial = initial & ~changed\n    holder = now\n    chunk = until\n"
        + "if SPANS == 1:\n"
        + put("holder >= 0", " " * 4)
        + "else:\n"
        + put_end(1, "holder >= 0", " " * 4)
    )


def join_spans(n: int, gated: Sequence[int]) -> str:
    """Per slot: the sum of a key that was there as a span began is in the first of its two ends where it left."""
    sums = [
        ("key", "HEAD_DIM", "BLOCK_D", "feature", "0"),
        ("value", "VALUE_DIM", "BLOCK_V", "value_feature", "HEAD_DIM"),
    ]

    def put(mask: str) -> str:
        lines = [
            f"put_rows(p_part_{name}_{n} + pair * length * {size}, {{key}}, {size}, {feature}, sum_{name}, {mask}, "
            f"{size})"
            for name, size, _, feature, _ in sums
        ]
        lines += [f"tl.store(p_part_u_{n}_{m} + pair * length + {{key}}, sum_u_{m}, mask={mask})" for m in gated]
        return "".join(f"    {line}\n" for line in lines)

    def load(where: str, mask: str, into: str) -> str:
        lines = []
        for name, size, _, feature, offset in sums:
            at = f"{where} + {offset} + slot[:, None] * width + {feature}[None, :]"
            keep = f"{mask}[:, None] & ({feature}[None, :] < {size})"
            lines.append(f"{into}_{name} = tl.load(p_ends + {at}, mask={keep}, other=0.0)")
        for place, m in enumerate(gated):
            at = f"p_ends + {where} + slot * width + HEAD_DIM + VALUE_DIM + {place}"
            lines.append(f"{into}_u_{m} = tl.load({at}, mask={mask}, other=0.0)")
        return "".join(f"    {line}\n" for line in lines)

    names = [*(name for name, *_ in sums), *(f"u_{m}" for m in gated)]
    shaped = {name: "[:, None]" if name in ("key", "value") else "" for name in names}
    text = _slot_head(n, gated).format(pair=1)
    text += "running = tl.full([BLOCK_N], -1, tl.int32)\n"
    text += "".join(f"sum_{name} = tl.zeros([BLOCK_N, {block}], tl.float32)\n" for name, _, block, _, _ in sums)
    text += "".join(f"sum_u_{m} = tl.zeros([BLOCK_N], tl.float32)\n" for m in gated)
    text += "for number in range(SPANS):\n"
    text += f"    begin = table + number * span * k_{n}\n"
    text += f"    stop = table + (tl.minimum((number + 1) * span, n_chunks) - 1) * k_{n}\n"
    text += "    first = tl.load(begin, mask=m_slot, other=-1)\n    last = tl.load(stop, mask=m_slot, other=-1)\n"
    text += "    going = running == first\n    ended = (running >= 0) & ~going\n"
    text += put("ended").format(key="tl.maximum(running, 0)")
    text += "    stays = first == last\n    end = (pair * SPANS + number) * 2\n"
    text += f"    at_first = end * k_{n} * width\n    at_last = (end + 1) * k_{n} * width\n"
    text += load("at_last", "(last >= 0)", "last")
    text += load("at_first", "((first >= 0) & ~stays)", "first")
    for name in names:
        dims = shaped[name]
        text += f"    sum_{name} = tl.where(going{dims}, sum_{name}, 0.0)\n"
        text += f"    sum_{name} += tl.where(stays{dims}, last_{name}, first_{name})\n"
    text += "    left = (first >= 0) & ~stays\n"
    text += put("left").format(key="tl.maximum(first, 0)")
    for name in names:
        text += f"    sum_{name} = tl.where(stays{shaped[name]}, sum_{name}, last_{name})\n"
    text += "    running = last\n"
    closing = put("(running >= 0)").format(key="tl.maximum(running, 0)")
    return text + textwrap.dedent(closing)
