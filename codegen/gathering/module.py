"""The whole module: helpers, loops over the parts of a chunk's keys, and the kernels with their parameters.

Indices beyond the ends are clamped, so that no look-up leaves its tensor, and hidden by masks.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

from flexsparse.codegen.gathering.slots import INDICES, indented, join_spans, known, slot_gradient, taken_over
from flexsparse.codegen.gathering.tiles import (
    ENTERS,
    Lines,
    key_loads,
    record_loads,
    record_puts,
    row_fields,
    row_loads,
)
from flexsparse.codegen.kernels.record_layout import KEY_BITS

_HELPERS = f"""
LOG2E = tl.constexpr(1.4426950408889634)
# A slot's record has its key in so many bits, and above them for how many queries of the chunk it stays.
KEY_BITS = tl.constexpr({KEY_BITS})
KEY_MASK = tl.constexpr({(1 << KEY_BITS) - 1})
# A row is measured against its highest score so far, or one that is less by no more than this; float32 has no slack.
SLACK = tl.constexpr(5.0)
"""
_HELPERS += '''

def multiplies(count):
    """PTX that multiplies ``count`` numbers of each thread in place, unless all factors of a warp are 1."""
    least = [f"${2 * count + i}" for i in range(count)]
    lines = [".reg .pred differs;", f".reg .f32 least<{count}>;"]
    while len(least) > 1:
        half = [f"least{len(least) // 2 + i}" for i in range(len(least) // 2)]
        lines += [f"min.f32 {x}, {a}, {b};" for x, a, b in zip(half, least[::2], least[1::2])]
        least = half
    lines += [f"setp.neu.f32 differs, {least[0]}, 0f3F800000;", "vote.sync.any.pred differs, differs, 0xffffffff;"]
    lines += ["@!differs bra.uni done;", *(f"mul.f32 ${i}, ${i}, ${2 * count + i};" for i in range(count)), "done:"]
    return "{ " + " ".join(lines) + " }"


def operands(count):
    return ",".join(["=f"] * count + [str(i) for i in range(count)] + ["f"] * count)


MULTIPLIES_32, OPERANDS_32 = tl.constexpr(multiplies(32)), tl.constexpr(operands(32))
MULTIPLIES_64, OPERANDS_64 = tl.constexpr(multiplies(64)), tl.constexpr(operands(64))


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
def saturated(x, least):
    """x in [least, 1], a number even where it is none. What is between 0 and 1 costs a sum nothing."""
    return tl.maximum(tl.minimum(tl.maximum(x, 0.0), 1.0), least)


@triton.jit
def exp_above(score, level, PRECISION: tl.constexpr):
    """exp(score - level)"""
    if PRECISION == "ieee":
        # A product with level is rounded: the larger the scores, the more each row would be off, in float32 visibly.
        x = (score - level) * LOG2E
    else:
        # One operation a pair.
        x = score * LOG2E - level * LOG2E
    return tl.exp2(x)


@triton.jit
def raised(top, highest, PRECISION: tl.constexpr):
    """What rows are measured against once their highest new score is known."""
    if PRECISION == "ieee":
        # The less a score is below the level, the more exact is its exponential.
        higher = tl.maximum(top, highest)
    else:
        higher = tl.where(highest > top + SLACK, highest, top)
    return higher


@triton.jit
def scaled(x, by, PACKED: tl.constexpr):
    """x * by for factors that mostly are 1; PACKED numbers of a thread at a time are passed by where all are."""
    if PACKED == 64:
        x, by = tl.broadcast(x, by)
        x = tl.inline_asm_elementwise(MULTIPLIES_64, OPERANDS_64, [x, by], dtype=tl.float32, is_pure=True, pack=64)
    elif PACKED == 32:
        x, by = tl.broadcast(x, by)
        x = tl.inline_asm_elementwise(MULTIPLIES_32, OPERANDS_32, [x, by], dtype=tl.float32, is_pure=True, pack=32)
    else:
        x = x * by
    return x


@triton.jit
def rows_of(p_base, index, stride, feature, SIZE: tl.constexpr, PADDED: tl.constexpr, WIDE: tl.constexpr):
    """Rows by index, [len(index), PADDED]; WIDE where they lie more than 2^31 numbers apart."""
    if WIDE:
        index = index.to(tl.int64)
    at = p_base + index[:, None] * stride + feature[None, :]
    if SIZE == PADDED:
        found = tl.load(at)
    else:
        found = tl.load(at, mask=feature[None, :] < SIZE, other=0.0)
    return found


@triton.jit
def put_rows(p_base, index, stride, feature, x, m_row, SIZE: tl.constexpr):
    at = p_base + index.to(tl.int64)[:, None] * stride + feature[None, :]
    tl.store(at, x.to(p_base.dtype.element_ty), mask=m_row[:, None] & (feature[None, :] < SIZE))
'''

_ROW_PRODUCTS = """
row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
h = tl.program_id(1).to(tl.int64)
b = tl.program_id(2).to(tl.int64)
m_row = row < length
row = tl.minimum(row, length - 1)
at = (b * heads + h) * length + row
feature = tl.arange(0, BLOCK_V)
out = rows_of(p_out + (b * heads + h) * length * VALUE_DIM, row, VALUE_DIM, feature, VALUE_DIM, BLOCK_V, WIDE)
d_out = rows_of(p_d_out + b * stride_ob + h * stride_oh, row, stride_os, feature, VALUE_DIM, BLOCK_V, WIDE)
level = tl.load(p_level + at)
share = tl.load(p_share + at)
delta = tl.sum(out.to(tl.float32) * d_out.to(tl.float32), 1) - tl.load(p_d_lse + at)
# Into rows that see no key nothing flows, whatever the loss makes of their lse.
delta = tl.where(share == 0.0, 0.0, delta)
"""

_ROWS = (
    """
# A tile of the block mask is cut into whole parts.
tl.static_assert(BLOCK_M % BLOCK_N == 0)
# The longest rows come first, so that a GPU is busy to the end.
chunk = n_chunks - 1 - tl.program_id(0)
# Heads times their strides can pass 32 bits.
h = tl.program_id(1).to(tl.int64)
b = tl.program_id(2).to(tl.int64)
kv_head = h // group
start = chunk * BLOCK_M
"""
    + INDICES
    + """
row = tl.minimum(start + tl.arange(0, BLOCK_M), length - 1)
m_row = start + tl.arange(0, BLOCK_M) < length
q = row[:, None]
at = (b * heads + h) * length + row
key_at = b * stride_kb + kv_head * stride_kh
value_at = b * stride_vb + kv_head * stride_vh
query = rows_of(p_query + b * stride_qb + h * stride_qh, row, stride_qs, feature, HEAD_DIM, BLOCK_D, WIDE)
"""
)


def _near_loop(name: str, body: Lines) -> Lines:
    """All tiles of one list of a chunk; a tile of the block mask is BLOCK_M keys wide."""
    edge = ["seen = (column < length)[None, :]", "column = tl.minimum(column, length - 1)"] if name == "near" else []
    return [
        f"# {'Tiles whose every pair' if name == 'full' else 'Tiles of which some pairs'} the pattern allows anyway.",
        f"count = tl.load(p_{name}_count + b * count_b + h * count_h + chunk) * (BLOCK_M // BLOCK_N)",
        f"tiles = p_{name}_index + b * index_b + h * index_h + chunk * index_row",
        *_for_each_tile("BLOCK_N"),
        "    column = tile * BLOCK_M + step % (BLOCK_M // BLOCK_N) * BLOCK_N + tl.arange(0, BLOCK_N)",
        *(f"    {line}" for line in edge),
        "    kv = column[None, :]",
        *(f"    {line}" for line in body),
    ]


def _for_each_tile(part: str) -> Lines:
    """The head of a loop over ``count`` parts of the ``tiles`` of a list; the next tile is known before its turn."""
    return [
        "following = tl.load(tiles, mask=count > 0, other=0)",
        "for step in range(count):",
        "    tile = following",
        f"    following = tl.load(tiles + (step + 1) // (BLOCK_M // {part}), mask=step + 1 < count, other=0)",
    ]


def _slots_loop(n: str, body: Lines, scored: bool) -> Lines:
    head = f"(b * heads_{n} + h // group_{n})"
    load = f"tl.load(records + slot[:, None] * 2 + twice[None, :], mask=(slot < k_{n})[:, None], other=0)"
    return [
        f"# Selection {n}: the keys in its slots as the chunk starts; no more slots are in use than keys came before.",
        "slot = tl.arange(0, BLOCK_N)",
        "# Read twice: of fewer numbers than it has threads, a block loads each wherever it is wanted.",
        "twice = tl.arange(0, 4) % 2",
        f"records = p_records_{n} + ({head} * n_chunks + chunk) * k_{n} * 2",
        f"following = {load}",
        f"for first in range(0, tl.minimum(k_{n}, start + 1), BLOCK_N):",
        "    # The keys of the next tile are known before this one's are used.",
        "    holders, scores = tl.split(tl.reshape(following, [BLOCK_N, 2, 2]))",
        "    holder, again = tl.split(holders)",
        *(["    bits, again = tl.split(scores)", f"    u_{n} = bits.to(tl.float32, bitcast=True)[None, :]"] * scored),
        "    slot += BLOCK_N",
        f"    following = {load}",
        "    column = holder & KEY_MASK",
        "    kv = column[None, :]",
        "    gone = (start + (holder >> KEY_BITS))[None, :]",
        "    seen = q < gone",
        *(f"    {line}" for line in body),
    ]


def _fresh_loop(n: str, body: Lines, scored: bool) -> Lines:
    return [
        f"# Selection {n}: the keys that enter inside the chunk.",
        f"for first in range(start + 1 - after_{n}, start + BLOCK_M - after_{n}, BLOCK_N):",
        "    column = first + tl.arange(0, BLOCK_N)",
        "    m_key = (column >= 0) & (column < length)",
        "    column = tl.minimum(tl.maximum(column, 0), length - 1)",
        "    kv = column[None, :]",
        f"    gone = tl.where(m_key, tl.load(p_death_{n} + (b * heads_{n} + h // group_{n}) * length + column), 0)"
        "[None, :]",
        f"    seen = (kv + after_{n} <= q) & (q < gone)",
        *(f"    {line}" for line in (key_loads([int(n)], "[None, :]") if scored else [])),
        *(f"    {line}" for line in body),
    ]


def _joined_loop(body: Lines) -> Lines:
    """The tiles with the keys that enter selection 0 inside the chunk, whole."""
    return [
        "# Tiles inside which keys enter selection 0: those that do, and what the pattern allows anyway.",
        "begin = tl.maximum(start + 1 - after_0, 0) // BLOCK_M * BLOCK_M",
        "end = tl.cdiv(tl.maximum(start + BLOCK_M - after_0, 0), BLOCK_M) * BLOCK_M",
        "for first in range(begin, end, BLOCK_N):",
        "    column = first + tl.arange(0, BLOCK_N)",
        "    seen = (column < length)[None, :]",
        "    column = tl.minimum(column, length - 1)",
        "    kv = column[None, :]",
        "    gone = tl.load(p_death_0 + (b * heads_0 + h // group_0) * length + column)[None, :]",
        f"    selected_0 = {ENTERS}",
        *(f"    {line}" for line in body),
    ]


def _row_loops(blocks: Mapping[tuple[str, str], Lines], way: str, gated: Mapping[int, Sequence[int]]) -> Lines:
    lines: Lines = []
    for (of, name), body in blocks.items():
        if of != way:
            continue
        kind, _, number = name.partition(" ")
        if kind == "selected":
            scored = int(number) in gated[int(number)]
            lines += _slots_loop(number, body, scored)
            lines += [] if (way, "joined") in blocks else _fresh_loop(number, body, scored)
        else:
            lines += _joined_loop(body) if kind == "joined" else _near_loop(kind, body)
    return lines


def _key_loops(blocks: Mapping[tuple[str, str], Lines]) -> Lines:
    """For a tile of keys and a head: the chunks that see it near, and those inside which its keys enter."""
    lines: Lines = []
    for (of, name), body in blocks.items():
        if of != "keys":
            continue
        kind, _, n = name.partition(" ")
        inner = [f"    {line}" for line in body]
        if kind == "joined":
            lines += [
                "# Chunks inside which keys of this tile's block enter selection 0.",
                "begin = (first // BLOCK_M * BLOCK_M + after_0) // BLOCK_M",
                "end = tl.minimum((first // BLOCK_M * BLOCK_M + BLOCK_M - 2 + after_0) // BLOCK_M + 1, n_chunks)",
                *_entry_steps("0"),
                *inner,
            ]
        elif kind == "selected" and ("keys", "joined") not in blocks:
            lines += [
                f"# Selection {n}: the chunks inside which these keys enter it.",
                f"begin = tl.maximum(first + after_{n}, 0) // BLOCK_M",
                f"end = tl.minimum((first + BLOCK_N - 1 + after_{n}) // BLOCK_M + 1, n_chunks)",
                *_entry_steps(n),
                *known(inner, f"(kv + after_{n} <= q) & (q < gone) & (kv + after_{n} > start)"),
            ]
        elif kind != "selected":
            lines += [
                f"count = tl.load(p_{kind}_count + b * count_b + h * count_h + first // BLOCK_M)",
                "count *= BLOCK_M // BLOCK_Q",
                f"tiles = p_{kind}_index + b * index_b + h * index_h + first // BLOCK_M * index_row",
                *_for_each_tile("BLOCK_Q"),
                "    first_row = tile * BLOCK_M + step % (BLOCK_M // BLOCK_Q) * BLOCK_Q",
                *inner,
            ]
    return lines


def _entry_steps(n: str) -> Lines:
    """The head of a loop over the queries of the chunks from ``begin`` to ``end``."""
    return [
        f"gone = tl.load(p_death_{n} + (b * heads_{n} + h // group_{n}) * length + column)",
        "gone = tl.where(m_column, gone, 0)[:, None]",
        "for step in range(begin * (BLOCK_M // BLOCK_Q), end * (BLOCK_M // BLOCK_Q)):",
        "    first_row = step * BLOCK_Q",
        "    start = step // (BLOCK_M // BLOCK_Q) * BLOCK_M",
    ]


def module_text(
    title: str,
    blocks: Mapping[tuple[str, str], Lines],
    captured: Sequence[tuple[str, int]],
    numbers: Sequence[str],
    selections: int,
    gated: Mapping[int, Sequence[int]],
    shifted: Sequence[int],
    given: Sequence[str] = (),
) -> str:
    """The text of the module with all kernels.

    ``gated``: for each selection, the selections whose gates its gathered keys have; ``shifted``: those of all whose
    gates fall with tau; ``given``: numbers that may be others at each call, for none of which a kernel is built.
    """
    # Triton would build a kernel for 1, one for multiples of 16, and one for the rest.
    jit = f"@triton.jit(do_not_specialize={list(given)})" if given else "@triton.jit"
    every = range(selections)
    all_gated = sorted({m for own in gated.values() for m in own})
    pattern = ["scale", "length", "heads", "group", "n_chunks"]
    for n in every:
        pattern += [f"p_birth_{n}", f"p_death_{n}", f"p_slots_{n}", f"p_records_{n}", f"p_next_{n}"]
        pattern += [f"heads_{n}", f"group_{n}", f"k_{n}", f"after_{n}"]
        pattern += [f"p_u_{n}"] * (n in all_gated) + [f"p_tau_{n}", f"p_least_{n}"] * (n in shifted)
    for name, dims in captured:
        pattern += [f"p_of_{name}", *(f"of_{name}_stride_{d}" for d in range(dims))]
    pattern += numbers
    strides = [f"stride_{of}{dim}" for of in "qkv" for dim in "bhs"]
    lists = ["p_near_count", "p_near_index", "p_full_count", "p_full_index", "count_b", "count_h"]
    lists += ["index_b", "index_h", "index_row"]
    operands = ["p_query", "p_key", "p_value", *strides, *pattern]
    gradients = ["p_d_out", "stride_ob", "stride_oh", "stride_os", "p_rows"]
    constants = ["HEAD_DIM", "VALUE_DIM", "BLOCK_D", "BLOCK_V", "BLOCK_M", "BLOCK_Q", "BLOCK_N", "PRECISION", "WIDE"]

    def kernel(
        name: str, about: str, parameters: Sequence[str], body: str, more: Sequence[str] = (), of: Sequence[str] = ()
    ) -> str:
        listed = ", ".join([*parameters, *(f"{c}: tl.constexpr" for c in (*(of or constants), *more))])
        signature = textwrap.fill(listed, 110, initial_indent="    ", subsequent_indent="    ")
        return f'{jit}\ndef {name}(\n{signature},\n):\n    """{about}"""\n{indented(body.splitlines())}\n'

    by_row = "\n".join(row_loads(shifted, "[:, None]")) + "\n"
    known_thresholds = "".join(
        f"known_tau_{n} = tl.where(tau_{n} == tau_{n}, tau_{n}, 0.0)\n"
        f"scale_{n} = tl.where(tau_{n} == tau_{n}, scale, float('nan'))\n"
        f"least_{n} = tl.where(tau_{n} == tau_{n}, least_{n}, 1.0)\n"
        for n in shifted
    )
    forward = (
        _ROWS
        + by_row
        + known_thresholds
        + 'top = tl.full([BLOCK_M], float("-inf"), tl.float32)\n'
        + "total = tl.zeros([BLOCK_M], tl.float32)\nout = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)\n"
        + "\n".join(_row_loops(blocks, "forward", gated))
        + """
# NaN is not nothing, and must come out.
some = total != 0.0
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
        + "\n".join(record_loads(shifted, "BLOCK_M", "[:, None]"))
        + """
d_out = rows_of(p_d_out + b * stride_ob + h * stride_oh, row, stride_os, value_feature, VALUE_DIM, BLOCK_V, WIDE)
d_query = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
"""
        + "".join(f"d_tau_{n} = tl.zeros([BLOCK_M], tl.float32)\n" for n in shifted)
        + "\n".join(_row_loops(blocks, "query", gated))
        + "\nbase = (b * heads + h) * length * HEAD_DIM\n"
        + "put_rows(p_d_query + base, row, HEAD_DIM, feature, d_query * scale, m_row, HEAD_DIM)\n"
        + "".join(f"tl.store(p_d_tau_{n} + at, d_tau_{n}, mask=m_row)\n" for n in shifted)
    )
    keys = (
        """
tl.static_assert((BLOCK_M % BLOCK_N == 0) & (BLOCK_M % BLOCK_Q == 0))
first = tl.program_id(0) * BLOCK_N
kv_head = tl.program_id(1).to(tl.int64)
b = tl.program_id(2).to(tl.int64)
"""
        + INDICES
        + """
column = tl.minimum(first + tl.arange(0, BLOCK_N), length - 1)
m_column = first + tl.arange(0, BLOCK_N) < length
kv = column[:, None]
key = rows_of(p_key + b * stride_kb + kv_head * stride_kh, column, stride_ks, feature, HEAD_DIM, BLOCK_D, WIDE)
value_at = p_value + b * stride_vb + kv_head * stride_vh
value = rows_of(value_at, column, stride_vs, value_feature, VALUE_DIM, BLOCK_V, WIDE)
d_key = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
d_value = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
"""
        + "".join(f"d_u_{n} = tl.zeros([BLOCK_N], tl.float32)\n" for n in all_gated)
        + "for member in range(group):\n    h = kv_head * group + member\n"
        + indented(key_loads(all_gated, "[:, None]") + _key_loops(blocks))
        + "\nd_key = d_key * scale\npair = (b * (heads // group) + kv_head) * length\n"
        + "".join(taken_over(n, gated[n]) for n in every)
        + "put_rows(p_d_key + pair * HEAD_DIM, column, HEAD_DIM, feature, d_key, m_column, HEAD_DIM)\n"
        + "put_rows(p_d_value + pair * VALUE_DIM, column, VALUE_DIM, value_feature, d_value, m_column, VALUE_DIM)\n"
        + "".join(f"tl.store(p_d_u_{n} + pair + column, d_u_{n}, mask=m_column)\n" for n in all_gated)
    )
    parts = [f"p_part_key_{n}" for n in every] + [f"p_part_value_{n}" for n in every]
    parts += [f"p_part_u_{n}_{m}" for n in every for m in gated[n]]
    d_u = [f"p_d_u_{n}" for n in all_gated]
    fields = row_fields(shifted)
    products = (
        _ROW_PRODUCTS
        + "\n".join([*row_loads(shifted, ""), "nothing = tl.zeros([ROWS], tl.float32)", *record_puts(fields)])
        + f"""
at_field = at[:, None] * {len(fields)} + tl.arange(0, {len(fields)})[None, :]
tl.store(p_rows + at_field, record, mask=m_row[:, None])
"""
    )
    kernels = [
        kernel(
            "row_products",
            "What every key's gradient is measured against: the product of each row of out with its gradient, less "
            "d_lse.",
            ["p_out", *gradients[:-1], "p_d_lse", "p_level", "p_share", "p_rows", "length", "heads"]
            + [f"{what}_{n}" for n in shifted for what in ("p_tau", "p_least", "heads", "group")],
            products,
            of=["VALUE_DIM", "BLOCK_V", "ROWS", "WIDE"],
        ),
        kernel(
            "forward",
            "Output and lse of one chunk of queries.",
            [*operands, *lists, "p_out", "p_lse", "p_level", "p_share"],
            forward,
            ["PACKED"],
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
                slot_gradient(n, blocks["slots", f"selected {n}"], gated[n]),
                ["SPANS"],
            )
        )
        kernels.append(
            kernel(
                f"join_spans_{n}",
                "Adds up the gradients of keys that stay in their slot from span to span.",
                [*operands, "kv_heads", "span", f"p_part_key_{n}", f"p_part_value_{n}", "p_ends", *own],
                join_spans(n, gated[n]),
                ["SPANS"],
            )
        )
    lines = textwrap.wrap(f'"""{title}: kernels that gather, as flexsparse generated them.', 118)
    about = "\n".join(lines) + '\n"""'
    head = f"{about}\n\nimport triton\nimport triton.language as tl\n"
    return head + _HELPERS + "".join(f"\n\n{text}" for text in kernels)
