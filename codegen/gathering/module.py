"""The whole module: helpers, and the kernels with their parameters.

Indices beyond the ends are clamped, so that no look-up leaves its tensor, and hidden by masks.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

from flexsparse.codegen.gathering.helpers import HELPERS
from flexsparse.codegen.gathering.loops import key_loops, row_loops
from flexsparse.codegen.gathering.slots import INDICES, indented, join_spans, slot_gradient, taken_over
from flexsparse.codegen.gathering.tiles import Lines, key_loads, record_loads, record_puts, row_fields, row_loads

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

_PLACE = """
# The longest rows come first, so that a GPU is busy to the end.
chunk = n_chunks - 1 - tl.program_id(0)
# Heads times their strides can pass 32 bits.
h = tl.program_id(1).to(tl.int64)
b = tl.program_id(2).to(tl.int64)
"""

_ROWS = (
    """
# A tile of the block mask is cut into whole parts.
tl.static_assert(BLOCK_M % BLOCK_N == 0)
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


def module_text(
    title: str,
    blocks: Mapping[tuple[str, str], Lines],
    captured: Sequence[tuple[str, int]],
    numbers: Sequence[str],
    selections: int,
    all_gated: Sequence[int],
    gated: Mapping[int, Sequence[int]],
    shifted: Sequence[int],
    given: Sequence[str] = (),
) -> str:
    """The text of the module with all kernels.

    ``all_gated``: the selections whose gates are computed; ``gated``: for each selection, those of them that its
    gathered keys have; ``shifted``: those of all whose gates fall with tau; ``given``: numbers that may be others at
    each call, for none of which a kernel is built.
    """
    # Triton would build a kernel for 1, one for multiples of 16, and one for the rest.
    jit = f"@triton.jit(do_not_specialize={list(given)})" if given else "@triton.jit"
    every = range(selections)
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
    attended = ["chunk", "h", "b", *operands, *lists, "p_out", "p_lse", "p_level", "p_share", "p_again"]
    attends = [*constants, "THREADS"]

    def attend_chunk(held: str) -> str:
        listed = textwrap.fill(", ".join([*attended, *attends, held]), 106, initial_indent="    ")
        return f"attend_chunk(\n{listed.replace(chr(10), chr(10) + '    ')},\n)\n"

    forward = (
        _ROWS
        + by_row
        + known_thresholds
        + 'top = tl.full([BLOCK_M], float("-inf"), tl.float32)\n'
        + "total = tl.zeros([BLOCK_M, 4], tl.float32)\nout = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)\n"
        + "\n".join(row_loops(blocks, "forward", gated))
        + """
total = tl.sum(total, 1)
if HELD:
    # What overflowed, or all but vanished, wants levels that are raised.
    fits = (total > LEAST) & (total < MOST)
    tl.store(p_again + (b * heads + h) * n_chunks + chunk, 1 - tl.min(fits.to(tl.int32), 0))
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
    again = f"""
# Marks are by row, head and chunk; each program has every so many of them.
for begin in range(0, marks, tl.num_programs(0) * MARKS):
    place = begin + tl.program_id(0) + tl.arange(0, MARKS) * tl.num_programs(0)
    marked = tl.load(p_again + place, mask=place < marks, other=0)
    if tl.max(marked, 0) != 0:
        for i in range(MARKS):
            at = begin + tl.program_id(0) + i * tl.num_programs(0)
            if tl.sum(tl.where(place == at, marked, 0), 0) != 0:
                chunk = at % n_chunks
                h = (at // n_chunks % heads).to(tl.int64)
                b = (at // n_chunks // heads).to(tl.int64)
{textwrap.indent(attend_chunk("False"), " " * 16)}"""
    query = (
        _PLACE
        + _ROWS
        + "\n".join(record_loads(shifted, "BLOCK_M", "[:, None]"))
        + """
d_out = rows_of(p_d_out + b * stride_ob + h * stride_oh, row, stride_os, value_feature, VALUE_DIM, BLOCK_V, WIDE)
d_query = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
"""
        + "".join(f"d_tau_{n} = tl.zeros([BLOCK_M], tl.float32)\n" for n in shifted)
        + "\n".join(row_loops(blocks, "query", gated))
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
        + indented(key_loads(all_gated, "[:, None]") + key_loops(blocks))
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
            "attend_chunk",
            "Output and lse of one chunk of queries; HELD as near keys leave their levels, and marked if that fails.",
            attended,
            forward,
            ["THREADS", "HELD"],
        ),
        kernel(
            "forward",
            "Output and lse of every chunk of queries.",
            attended[3:],
            _PLACE + attend_chunk("HELD"),
            ["THREADS", "HELD"],
        ),
        kernel(
            "forward_again",
            "Output and lse once more of the chunks that are marked.",
            [*attended[3:], "marks"],
            again,
            ["THREADS"],
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
                ["SPANS", "THREADS"],
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
    return head + HELPERS + "".join(f"\n\n{text}" for text in kernels)
