"""The text of the gathering kernels around what a pattern prints into them.

Shapes in the text: BLOCK_M queries of a chunk, BLOCK_N keys, BLOCK_D and BLOCK_V features. Where gradients of keys are
summed, tiles are [BLOCK_N, BLOCK_M], elsewhere [BLOCK_M, BLOCK_N]; ``q`` and ``kv`` are shaped to broadcast to them.
Indices beyond the ends are clamped, so that no look-up leaves its tensor, and hidden by masks.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

Lines = list[str]


def _scores(printer: Any, part: Any, kind: str, product: str, slopes: bool) -> Lines:
    lines = [f"raw = tl.dot({product}, input_precision=PRECISION) * scale", *printer.loads(part, slopes)]
    lines += printer.score(part)
    conditions = [] if kind == "full" else ["seen"]
    text = printer.seen(part)
    conditions += [f"({text})"] if text else []
    if conditions:
        lines.append(f'score = tl.where({" & ".join(conditions)}, score, float("-inf"))')
    return lines


def attend(printer: Any, part: Any, kind: str) -> Lines:
    """One tile of keys joins the softmax of the rows; wants ``column``, ``kv``, and ``seen`` of all but full tiles."""
    gate = printer.value_gate(part)
    return [
        "key = rows_of(p_key + key_at, column, stride_ks, feature, HEAD_DIM, BLOCK_D)",
        "value = rows_of(p_value + value_at, column, stride_vs, value_feature, VALUE_DIM, BLOCK_V)",
        *_scores(printer, part, kind, "query, tl.trans(key)", False),
        "higher = tl.maximum(top, tl.max(score, 1))",
        "# Rows that have seen no key yet stay at -inf.",
        'level = tl.where(higher == float("-inf"), 0.0, higher)',
        "p = tl.exp2((score - level[:, None]) * LOG2E)",
        "shrink = tl.exp2((top - level) * LOG2E)",
        "total = total * shrink + tl.sum(p, 1)",
        *([f"p = p * ({gate})"] if gate else []),
        "out = tl.dot(p.to(value.dtype), value, out * shrink[:, None], input_precision=PRECISION)",
        "top = higher",
    ]


def gradient_of_query(printer: Any, part: Any, kind: str) -> Lines:
    """What one tile of keys adds to the gradients of the rows' query and thresholds."""
    gate = printer.value_gate(part)
    return [
        "key = rows_of(p_key + key_at, column, stride_ks, feature, HEAD_DIM, BLOCK_D)",
        "value = rows_of(p_value + value_at, column, stride_vs, value_feature, VALUE_DIM, BLOCK_V)",
        *_scores(printer, part, kind, "query, tl.trans(key)", True),
        "p = tl.exp2((score - level[:, None]) * LOG2E) * share[:, None]",
        "d_p = tl.dot(d_out, tl.trans(value), input_precision=PRECISION)",
        "d_gate_v = p * d_p",
        f"d_score = p * (d_p * ({gate}) - delta[:, None])" if gate else "d_score = p * (d_p - delta[:, None])",
        *printer.slopes(part),
        *(f"d_tau_{g.number} -= tl.sum(d_x_{g.number}, 1)" for g in part.gates if g.through != "ste_identity"),
        "d_query = tl.dot(d_raw.to(key.dtype), key, d_query, input_precision=PRECISION)",
    ]


def gradient_of_keys(printer: Any, part: Any, kind: str) -> Lines:
    """What one chunk of queries of head ``h`` adds to the gradients of a tile's keys, values and scores."""
    gate = printer.value_gate(part)
    return [
        "row = first_row + tl.arange(0, BLOCK_Q)",
        "m_row = row < length",
        "row = tl.minimum(row, length - 1)",
        "q = row[None, :]",
        "at = (b * heads + h) * length + row",
        "query = rows_of(p_query + b * stride_qb + h * stride_qh, row, stride_qs, feature, HEAD_DIM, BLOCK_D)",
        "d_out = rows_of(p_d_out + b * stride_ob + h * stride_oh, row, stride_os, value_feature, VALUE_DIM, BLOCK_V)",
        "level = tl.load(p_level + at)",
        "share = tl.load(p_share + at, mask=m_row, other=0.0)",
        "delta = tl.load(p_delta + at)",
        *_SEEN_BY_KEYS[kind],
        *_scores(printer, part, kind, "key, tl.trans(query)", True),
        "p = tl.exp2((score - level[None, :]) * LOG2E) * share[None, :]",
        "d_p = tl.dot(value, tl.trans(d_out), input_precision=PRECISION)",
        "d_gate_v = p * d_p",
        f"d_score = p * (d_p * ({gate}) - delta[None, :])" if gate else "d_score = p * (d_p - delta[None, :])",
        *printer.slopes(part),
        *(f"d_u_{g.number} += tl.sum(d_x_{g.number}, 1)" for g in part.gates),
        f"d_value = tl.dot((p{f' * ({gate})' if gate else ''}).to(d_out.dtype), d_out, d_value, "
        "input_precision=PRECISION)",
        "d_key = tl.dot(d_raw.to(query.dtype), query, d_key, input_precision=PRECISION)",
    ]


# Of selected keys, SEEN stands for what the kernel knows: whether they come from slots or are fresh.
_SEEN_BY_KEYS: dict[str, Lines] = {"full": [], "near": ["seen = m_column[:, None]"], "selected": ["seen = SEEN"]}

_HELPERS = '''
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def floordiv(a, b):
    """Division that rounds down, as Python's."""
    whole = a // b
    return tl.where((a % b != 0) & ((a < 0) != (b < 0)), whole - 1, whole)


@triton.jit
def floormod(a, b):
    return a - floordiv(a, b) * b


@triton.jit
def tanh(x):
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0


@triton.jit
def clipped(x, least):
    """x in [least, 1], NaN where it is NaN."""
    return tl.maximum(tl.minimum(x, 1.0, tl.PropagateNan.ALL), least, tl.PropagateNan.ALL)


@triton.jit
def rows_of(p_base, index, stride, feature, SIZE: tl.constexpr, PADDED: tl.constexpr):
    """Rows by index, [len(index), PADDED]."""
    at = p_base + index.to(tl.int64)[:, None] * stride + feature[None, :]
    if SIZE == PADDED:
        found = tl.load(at)
    else:
        found = tl.load(at, mask=feature[None, :] < SIZE, other=0.0)
    return found


@triton.jit
def row_products(
    p_out, p_d_out, stride_ob, stride_oh, stride_os, p_d_lse, p_delta, length, heads,
    VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """What every key's gradient is measured against: the product of each row of out with its gradient, less d_lse."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    h = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    m_row = row < length
    at = (b * heads + h) * length + row
    row = tl.minimum(row, length - 1)
    feature = tl.arange(0, BLOCK_V)
    out = rows_of(p_out + (b * heads + h) * length * VALUE_DIM, row, VALUE_DIM, feature, VALUE_DIM, BLOCK_V)
    d_out = rows_of(p_d_out + b * stride_ob + h * stride_oh, row, stride_os, feature, VALUE_DIM, BLOCK_V)
    delta = tl.sum(out.to(tl.float32) * d_out.to(tl.float32), 1) - tl.load(p_d_lse + at, mask=m_row, other=0.0)
    tl.store(p_delta + at, delta, mask=m_row)


@triton.jit
def put_rows(p_base, index, stride, feature, x, m_row, SIZE: tl.constexpr):
    at = p_base + index.to(tl.int64)[:, None] * stride + feature[None, :]
    tl.store(at, x.to(p_base.dtype.element_ty), mask=m_row[:, None] & (feature[None, :] < SIZE))
'''

_INDICES = """
q_len = length
kv_len = length
feature = tl.arange(0, BLOCK_D)
value_feature = tl.arange(0, BLOCK_V)
"""

_ROWS = (
    """
chunk = tl.program_id(0)
h = tl.program_id(1)
b = tl.program_id(2).to(tl.int64)
kv_head = h // group
start = chunk * BLOCK_M
"""
    + _INDICES
    + """
row = tl.minimum(start + tl.arange(0, BLOCK_M), length - 1)
m_row = start + tl.arange(0, BLOCK_M) < length
q = row[:, None]
at = (b * heads + h) * length + row
key_at = b * stride_kb + kv_head * stride_kh
value_at = b * stride_vb + kv_head * stride_vh
query = rows_of(p_query + b * stride_qb + h * stride_qh, row, stride_qs, feature, HEAD_DIM, BLOCK_D)
"""
)


def _indented(lines: Sequence[str], by: int = 4) -> str:
    return textwrap.indent("\n".join(lines).strip("\n"), " " * by)


def _near_loop(name: str, body: Lines) -> Lines:
    """All tiles of one list of a chunk; a tile of the block mask is BLOCK_M keys wide."""
    edge = ["seen = (column < length)[None, :]", "column = tl.minimum(column, length - 1)"] if name == "near" else []
    return [
        f"# {'Tiles whose every pair' if name == 'full' else 'Tiles of which some pairs'} the pattern allows anyway.",
        f"for step in range(tl.load(p_{name}_count + b * count_b + h * count_h + chunk) * (BLOCK_M // BLOCK_N)):",
        f"    tile = tl.load(p_{name}_index + b * index_b + h * index_h + chunk * index_row + "
        "step // (BLOCK_M // BLOCK_N))",
        "    column = tile * BLOCK_M + step % (BLOCK_M // BLOCK_N) * BLOCK_N + tl.arange(0, BLOCK_N)",
        *(f"    {line}" for line in edge),
        "    kv = column[None, :]",
        *(f"    {line}" for line in body),
    ]


def _selected_loops(n: str, body: Lines) -> Lines:
    head = f"(b * heads_{n} + h // group_{n})"
    inner = [f"    {line}" for line in body]
    return [
        f"# Selection {n}: the keys in its slots as the chunk starts; no more slots are in use than keys came before.",
        f"for first in range(0, tl.minimum(k_{n}, start + 1), BLOCK_N):",
        "    slot = first + tl.arange(0, BLOCK_N)",
        f"    column = tl.load(p_slots_{n} + ({head} * n_chunks + chunk) * k_{n} + slot, mask=slot < k_{n}, other=-1)",
        "    m_key = column >= 0",
        "    column = tl.maximum(column, 0)",
        "    kv = column[None, :]",
        f"    gone = tl.where(m_key[None, :], tl.load(p_death_{n} + {head} * length + kv), 0)",
        "    seen = q < gone",
        *inner,
        f"# Selection {n}: the keys that enter inside the chunk.",
        f"for first in range(start + 1 - after_{n}, start + BLOCK_M - after_{n}, BLOCK_N):",
        "    column = first + tl.arange(0, BLOCK_N)",
        "    m_key = (column >= 0) & (column < length)",
        "    column = tl.minimum(tl.maximum(column, 0), length - 1)",
        "    kv = column[None, :]",
        f"    gone = tl.where(m_key[None, :], tl.load(p_death_{n} + {head} * length + kv), 0)",
        f"    seen = (kv + after_{n} <= q) & (q < gone)",
        *inner,
    ]


def _row_loops(blocks: Mapping[tuple[str, str], Lines], way: str) -> Lines:
    lines: Lines = []
    for (of, name), body in blocks.items():
        if of != way:
            continue
        kind, _, number = name.partition(" ")
        lines += _selected_loops(number, body) if kind == "selected" else _near_loop(kind, body)
    return lines


def _key_loops(blocks: Mapping[tuple[str, str], Lines]) -> Lines:
    """For a tile of keys and a head: the chunks that see it near, and those inside which its keys enter."""
    lines: Lines = []
    for (of, name), body in blocks.items():
        if of != "keys":
            continue
        kind, _, n = name.partition(" ")
        inner = [f"    {line}" for line in body]
        if kind == "selected":
            lines += [
                f"# Selection {n}: the chunks inside which these keys enter it.",
                f"begin = tl.maximum(first + after_{n}, 0) // BLOCK_M",
                f"end = tl.minimum((first + BLOCK_N - 1 + after_{n}) // BLOCK_M + 1, n_chunks)",
                f"gone = tl.load(p_death_{n} + (b * heads_{n} + h // group_{n}) * length + kv)",
                "gone = tl.where(m_column[:, None], gone, 0)",
                "for step in range(begin * (BLOCK_M // BLOCK_Q), end * (BLOCK_M // BLOCK_Q)):",
                "    first_row = step * BLOCK_Q",
                "    start = step // (BLOCK_M // BLOCK_Q) * BLOCK_M",
                *(_known(inner, f"(kv + after_{n} <= q) & (q < gone) & (kv + after_{n} > start)")),
            ]
        else:
            lines += [
                f"count = tl.load(p_{kind}_count + b * count_b + h * count_h + first // BLOCK_M)",
                f"tiles = p_{kind}_index + b * index_b + h * index_h + first // BLOCK_M * index_row",
                "for step in range(count * (BLOCK_M // BLOCK_Q)):",
                "    first_row = tl.load(tiles + step // (BLOCK_M // BLOCK_Q)) * BLOCK_M",
                "    first_row += step % (BLOCK_M // BLOCK_Q) * BLOCK_Q",
                *inner,
            ]
    return lines


def _known(lines: Lines, seen: str) -> Lines:
    return [line.replace("SEEN", seen) for line in lines]


def MODULE(  # noqa: N802
    title: str,
    blocks: Mapping[tuple[str, str], Lines],
    captured: Sequence[tuple[str, int]],
    numbers: Sequence[str],
    selections: int,
    gated: Mapping[int, Sequence[int]],
    shifted: Sequence[int],
) -> str:
    """The text of the module with all kernels.

    ``gated``: for each selection, the selections whose gates its gathered keys have; ``shifted``: those of all whose
    gates fall with tau.
    """
    every = range(selections)
    all_gated = sorted({m for own in gated.values() for m in own})
    pattern = ["scale", "length", "heads", "group", "n_chunks"]
    for n in every:
        pattern += [f"p_birth_{n}", f"p_death_{n}", f"p_slots_{n}", f"p_next_{n}"]
        pattern += [f"heads_{n}", f"group_{n}", f"k_{n}", f"after_{n}"]
        pattern += [f"p_u_{n}"] * (n in all_gated) + [f"p_tau_{n}", f"p_least_{n}"] * (n in shifted)
    for name, dims in captured:
        pattern += [f"p_{name}", *(f"{name}_stride_{d}" for d in range(dims))]
    pattern += numbers
    strides = [f"stride_{of}{dim}" for of in "qkv" for dim in "bhs"]
    lists = ["p_near_count", "p_near_index", "p_full_count", "p_full_index", "count_b", "count_h"]
    lists += ["index_b", "index_h", "index_row"]
    operands = ["p_query", "p_key", "p_value", *strides, *pattern]
    gradients = ["p_d_out", "stride_ob", "stride_oh", "stride_os", "p_level", "p_share", "p_delta"]
    constants = ["HEAD_DIM", "VALUE_DIM", "BLOCK_D", "BLOCK_V", "BLOCK_M", "BLOCK_Q", "BLOCK_N", "PRECISION"]

    def kernel(name: str, about: str, parameters: Sequence[str], body: str, more: Sequence[str] = ()) -> str:
        listed = ", ".join([*parameters, *(f"{c}: tl.constexpr" for c in (*constants, *more))])
        signature = textwrap.fill(listed, 110, initial_indent="    ", subsequent_indent="    ")
        return f'@triton.jit\ndef {name}(\n{signature},\n):\n    """{about}"""\n{_indented(body.splitlines())}\n'

    forward = (
        _ROWS
        + 'top = tl.full([BLOCK_M], float("-inf"), tl.float32)\n'
        + "total = tl.zeros([BLOCK_M], tl.float32)\nout = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)\n"
        + "\n".join(_row_loops(blocks, "forward"))
        + """
some = total > 0.0
out = tl.where(some[:, None], out / tl.where(some, total, 1.0)[:, None], 0.0)
lse = tl.where(some, top + tl.log(tl.where(some, total, 1.0)), float("-inf"))
# The backward pass has p = exp(score - level) * share from these, without the rounding of lse.
tl.store(p_level + at, tl.where(some, top, 0.0), mask=m_row)
tl.store(p_share + at, tl.where(some, 1.0 / tl.where(some, total, 1.0), 0.0), mask=m_row)
put_rows(p_out + (b * heads + h) * length * VALUE_DIM, row, VALUE_DIM, value_feature, out, m_row, VALUE_DIM)
tl.store(p_lse + at, lse, mask=m_row)
"""
    )
    query = (
        _ROWS
        + """
d_out = rows_of(p_d_out + b * stride_ob + h * stride_oh, row, stride_os, value_feature, VALUE_DIM, BLOCK_V)
level = tl.load(p_level + at)
share = tl.load(p_share + at)
delta = tl.load(p_delta + at)
d_query = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
"""
        + "".join(f"d_tau_{n} = tl.zeros([BLOCK_M], tl.float32)\n" for n in shifted)
        + "\n".join(_row_loops(blocks, "query"))
        + "\nbase = (b * heads + h) * length * HEAD_DIM\n"
        + "put_rows(p_d_query + base, row, HEAD_DIM, feature, d_query * scale, m_row, HEAD_DIM)\n"
        + "".join(f"tl.store(p_d_tau_{n} + at, d_tau_{n}, mask=m_row)\n" for n in shifted)
    )
    keys = (
        """
first = tl.program_id(0) * BLOCK_N
kv_head = tl.program_id(1)
b = tl.program_id(2).to(tl.int64)
"""
        + _INDICES
        + """
column = tl.minimum(first + tl.arange(0, BLOCK_N), length - 1)
m_column = first + tl.arange(0, BLOCK_N) < length
kv = column[:, None]
key = rows_of(p_key + b * stride_kb + kv_head * stride_kh, column, stride_ks, feature, HEAD_DIM, BLOCK_D)
value = rows_of(p_value + b * stride_vb + kv_head * stride_vh, column, stride_vs, value_feature, VALUE_DIM, BLOCK_V)
d_key = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
d_value = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
"""
        + "".join(f"d_u_{n} = tl.zeros([BLOCK_N], tl.float32)\n" for n in all_gated)
        + "for member in range(group):\n    h = kv_head * group + member\n"
        + _indented(_key_loops(blocks))
        + "\nd_key = d_key * scale\npair = (b * (heads // group) + kv_head) * length\n"
        + "".join(_taken_over(n, gated[n]) for n in every)
        + "put_rows(p_d_key + pair * HEAD_DIM, column, HEAD_DIM, feature, d_key, m_column, HEAD_DIM)\n"
        + "put_rows(p_d_value + pair * VALUE_DIM, column, VALUE_DIM, value_feature, d_value, m_column, VALUE_DIM)\n"
        + "".join(f"tl.store(p_d_u_{n} + pair + column, d_u_{n}, mask=m_column)\n" for n in all_gated)
    )
    parts = [f"p_part_key_{n}" for n in every] + [f"p_part_value_{n}" for n in every]
    parts += [f"p_part_u_{n}_{m}" for n in every for m in gated[n]]
    d_u = [f"p_d_u_{n}" for n in all_gated]
    kernels = [
        kernel(
            "forward",
            "Output and lse of one chunk of queries.",
            [*operands, *lists, "p_out", "p_lse", "p_level", "p_share"],
            forward,
        ),
        kernel(
            "query_gradient",
            "Gradients of one chunk's queries, and of their thresholds.",
            [*operands, *lists, *gradients, "p_d_query", *(f"p_d_tau_{n}" for n in shifted)],
            query,
        ),
        kernel(
            "key_gradient",
            "Gradients of one tile of keys: from near queries, and what the slots gathered is added.",
            [*operands, *lists, *gradients, *parts, "p_d_key", "p_d_value", *d_u],
            keys,
        ),
    ]
    for n in every:
        own = [f"p_part_u_{n}_{m}" for m in gated[n]]
        kernels.append(
            kernel(
                f"slot_gradient_{n}",
                "Gradients of the keys in a block of slots, along a span of chunks; a key's are written as it leaves.",
                [*operands, *gradients, "kv_heads", "span", f"p_part_key_{n}", f"p_part_value_{n}", "p_ends", *own],
                _slot_gradient(n, blocks["keys", f"selected {n}"], gated[n]),
                ["SPANS"],
            )
        )
        kernels.append(
            kernel(
                f"join_spans_{n}",
                "Adds up the gradients of keys that stay in their slot from span to span.",
                [*operands, "kv_heads", "span", f"p_part_key_{n}", f"p_part_value_{n}", "p_ends", *own],
                _join_spans(n, gated[n]),
                ["SPANS"],
            )
        )
    about = f'"""{title}: kernels that gather, as flexsparse generated them."""'
    head = f"{about}\n\nimport triton\nimport triton.language as tl\n"
    return head + _HELPERS + "".join(f"\n\n{text}" for text in kernels)


def _taken_over(n: int, gated: Sequence[int]) -> str:
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
kv_head = (pair % kv_heads).to(tl.int32)
{_INDICES}
slot = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
m_slot = slot < k_{n}
table = p_slots_{n} + (b * heads_{n} + kv_head * heads_{n} // kv_heads) * n_chunks * k_{n} + slot
width: tl.constexpr = HEAD_DIM + VALUE_DIM + {len(gated)}
"""


def _slot_gradient(n: int, body: Lines, gated: Sequence[int]) -> str:
    zero = "".join(f"    d_u_{m} = tl.where(changed, 0.0, d_u_{m})\n" for m in gated)

    def put(mask: str, by: str) -> str:
        lines = [
            f"put_rows(p_part_key_{n} + pair * length * HEAD_DIM, holder, HEAD_DIM, feature, d_key * scale, {mask}, "
            "HEAD_DIM)",
            f"put_rows(p_part_value_{n} + pair * length * VALUE_DIM, holder, VALUE_DIM, value_feature, d_value, {mask},"
            " VALUE_DIM)",
        ]
        lines += [f"tl.store(p_part_u_{n}_{m} + pair * length + holder, d_u_{m}, mask={mask})" for m in gated]
        return "".join(f"{by}{line}\n" for line in lines)

    def put_end(which: int, mask: str, by: str) -> str:
        lines = [
            f"end = ((pair * SPANS + tl.program_id(1)) * 2 + {which}) * k_{n} * width",
            f"put_rows(p_ends + end, slot, width, feature, d_key * scale, {mask}, HEAD_DIM)",
            f"put_rows(p_ends + end + HEAD_DIM, slot, width, value_feature, d_value, {mask}, VALUE_DIM)",
        ]
        for place, m in enumerate(gated):
            at = f"p_ends + end + slot * width + HEAD_DIM + VALUE_DIM + {place}"
            lines.append(f"tl.store({at}, d_u_{m}, mask={mask})")
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
        + "d_key = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)\nd_value = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)\n"
        + "".join(f"d_u_{m} = tl.zeros([BLOCK_N], tl.float32)\n" for m in gated)
        + "chunk = begin\nwhile chunk < stop:\n"
        + "    # No slot of the block changes before this chunk.\n"
        + "    until = tl.minimum(tl.load(next_change + chunk), stop)\n"
        + "    column = tl.maximum(holder, 0)\n    kv = column[:, None]\n"
        + "    key = rows_of(p_key + b * stride_kb + kv_head * stride_kh, column, stride_ks, feature, HEAD_DIM, "
        "BLOCK_D)\n"
        + "    value = rows_of(p_value + b * stride_vb + kv_head * stride_vh, column, stride_vs, value_feature, "
        "VALUE_DIM, BLOCK_V)\n"
        + f"    gone = tl.load(p_death_{n} + (b * heads_{n} + kv_head * heads_{n} // kv_heads) * length + kv)\n"
        + "    gone = tl.where((holder >= 0)[:, None], gone, 0)\n"
        + "    steps = tl.where(tl.max(holder, 0) >= 0, (until - chunk) * group * (BLOCK_M // BLOCK_Q), 0)\n"
        + "    for step in range(0, steps):\n"
        + "        h = kv_head * group + step % group\n"
        + "        first_row = chunk * BLOCK_M + step // group * BLOCK_Q\n"
        + _indented(_known(body, "q < gone"), 8)
        + f"\n    now = tl.load(table + tl.minimum(until, n_chunks - 1) * k_{n}, mask=m_slot, other=-1)\n"
        + "    now = tl.where(until < stop, now, holder)\n"
        + "    changed = now != holder\n    left = changed & (holder >= 0)\n"
        + "    if SPANS == 1:\n"
        + put("left", " " * 8)
        + "    else:\n"
        + put("left & ~initial", " " * 8)
        + put_end(0, "left & initial", " " * 8)
        + "    d_key = tl.where(changed[:, None], 0.0, d_key)\n"
        + "    d_value = tl.where(changed[:, None], 0.0, d_value)\n"
        + zero
        + "    initial = initial & ~changed\n    holder = now\n    chunk = until\n"
        + "if SPANS == 1:\n"
        + put("holder >= 0", " " * 4)
        + "else:\n"
        + put_end(1, "holder >= 0", " " * 4)
    )


def _join_spans(n: int, gated: Sequence[int]) -> str:
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
