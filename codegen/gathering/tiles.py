"""What one tile adds to a kernel: to the softmax of its rows, or to the gradients of queries or keys.

Tiles are [BLOCK_M, BLOCK_N], queries by keys; where gradients of keys are summed [BLOCK_N, BLOCK_Q], and of keys in
slots [BLOCK_Q, BLOCK_N]. ``q`` and ``kv`` are shaped to broadcast to them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from flexsparse.codegen.gathering.parts import Part
from flexsparse.codegen.gathering.printer import Printer

Lines = list[str]
# A key that enters selection 0 inside the chunk, as far as the query sees it.
ENTERS = "(kv + after_0 <= q) & (q < tl.where(kv + after_0 > start, gone, 0))"


def row_loads(shifted: Iterable[int], axis: str) -> Lines:
    """Thresholds of the queries in ``row`` and the least gates, along the other axis than ``axis``."""
    lines = []
    for n in shifted:
        at = f"(b * heads_{n} + h // group_{n}) * length + row"
        lines += [f"tau_{n} = tl.load(p_tau_{n} + {at}){axis}", f"least_{n} = tl.load(p_least_{n} + {at}){axis}"]
    return lines


def row_fields(shifted: Iterable[int]) -> list[str]:
    """What the backward pass reads of a query, in a record whose length is a power of two; "" fills it up."""
    names = ["level", "share", "delta", *(f"{what}_{n}" for n in shifted for what in ("tau", "least"))]
    return names + [""] * ((1 << (len(names) - 1).bit_length()) - len(names))


def record_loads(shifted: Sequence[int], size: str, axis: str) -> Lines:
    """``row_fields`` of the ``size`` queries at ``at``: [size] each, thresholds along the other axis than ``axis``.

    Together they are more numbers than a block has threads. Fewer, Triton loads anew in every thread that wants one.
    """
    fields = row_fields(shifted)
    width = len(fields)
    lines = [f"record = tl.load(p_rows + at[:, None] * {width} + tl.arange(0, {width})[None, :])"]
    lines += _taken_apart("record", fields, size)
    lines += [f"{name} = {name}{axis}" for name in fields if name.startswith(("tau", "least"))]
    return lines


def _taken_apart(name: str, fields: Sequence[str], size: str) -> Lines:
    """Lines that split [size, len(fields)] into its columns."""
    halves = (fields[0::2], fields[1::2])
    names = [half[0] or f"{name}_unused" if len(half) == 1 else f"{name}_{i}" for i, half in enumerate(halves)]
    shaped = name if len(fields) == 2 else f"tl.reshape({name}, [{size}, {len(fields) // 2}, 2])"
    lines = [f"{', '.join(names)} = tl.split({shaped})"]
    for half, inner in zip(halves, names, strict=True):
        lines += _taken_apart(inner, half, size) if len(half) > 1 and any(half) else []
    return lines


def record_puts(fields: Sequence[str], name: str = "record") -> Lines:
    """Lines that make the record [ROWS, len(fields)] of columns [ROWS]."""
    lines, halves = [], []
    for i, half in enumerate((fields[0::2], fields[1::2])):
        halves.append((half[0] or "nothing") if len(half) == 1 else f"{name}_{i}")
        lines += record_puts(half, halves[-1]) if len(half) > 1 else []
    joined = f"tl.join({', '.join(halves)})"
    return [*lines, f"{name} = " + (joined if len(fields) == 2 else f"tl.reshape({joined}, [ROWS, {len(fields)}])")]


def key_loads(gated: Iterable[int], axis: str) -> Lines:
    """Scores of the keys in ``column``; those that have none are not selected."""
    lines = []
    for n in gated:
        lines.append(f"u_{n} = tl.load(p_u_{n} + (b * heads_{n} + h // group_{n}) * length + column)")
        lines.append(f"u_{n} = tl.where(u_{n} == u_{n}, u_{n}, 0.0){axis}")
    return lines


def _gated(part: Part, kind: str) -> list[int]:
    """The selections whose scores a tile loads itself; the loops over a selection's keys bring that one's."""
    return sorted({gate.number for gate in part.gates} - {int(n) for n in kind.split()[1:]})


def _scores(printer: Printer, part: Part, kind: str, product: str, slopes: bool, scale: str = "scale") -> Lines:
    lines = [f"raw = tl.dot({product}, input_precision=PRECISION) * {scale}"]
    lines += [*printer.loads(part, slopes, kind == "joined"), *printer.score(part)]
    conditions = [] if kind == "full" else ["seen"]
    text = printer.seen(part)
    conditions += [f"({text})"] if text else []
    return [*lines, f"visible = {' & '.join(conditions)}"] if conditions else lines


def _hides(printer: Printer, part: Part, kind: str) -> bool:
    return kind != "full" or bool(printer.seen(part))


def _shown(hides: bool, text: str) -> str:
    """A product that is 0 where a key is hidden, if some are, even if a factor is not a number there."""
    return f"tl.where(visible, {text}, 0.0)" if hides else text


def _weights(hides: bool, axis: str) -> Lines:
    """``p``, 0 where a key is hidden. Behind the exponential a multiplication and an addition stay one operation."""
    return [f"p = exp_above(score, level{axis}, PRECISION)", f"p = {_shown(hides, f'p * share{axis}')}"]


def attend(printer: Printer, part: Part, kind: str) -> Lines:
    """One tile of keys joins the softmax of the rows; wants ``column``, ``kv``, and ``seen`` of all but full tiles.

    Where kernels hold the levels, only near tiles raise them: others measure against what near keys left.
    """
    gate, sure, hides = printer.value_gate(part), printer.sure(part), _hides(printer, part, kind)
    product, scale = f"p * ({gate})", "scale" if sure is None else f"scale_{sure}"
    power = held_power = "exp_above(score, level[:, None], PRECISION)"
    if kind != "near" and printer.is_scaled(part):
        # One multiplication less: scores come in units of the exponential.
        scale = f"({scale} * LOG2E if HELD else {scale})"
        held_power = "tl.exp2(score - (level * LOG2E)[:, None])"
    raised = [
        *(['score = tl.where(visible, score, float("-inf"))'] if hides else []),
        "higher = raised(top, tl.max(score, 1), PRECISION)",
        "# Rows that have seen no key yet stay at -inf.",
        'level = tl.where(higher == float("-inf"), 0.0, higher)',
        f"p = {power}",
        "shrink = tl.where(higher == top, 1.0, tl.exp2((top - level) * LOG2E))",
        "total = total * for_parts(shrink, p) + part_sums(p)",
        "out = scaled(out, shrink[:, None], THREADS)",
        "top = higher",
    ]
    # Behind the exponential a multiplication and an addition stay one operation, which hidden scores would part.
    held = [f"p = {held_power}", *(["p = tl.where(visible, p, 0.0)"] if hides else []), "total += part_sums(p)"]
    either = ["if HELD:", *(f"    {line}" for line in held), "else:", *(f"    {line}" for line in raised)]
    return [
        "key = rows_of(p_key + key_at, column, stride_ks, feature, HEAD_DIM, BLOCK_D, WIDE)",
        "value = rows_of(p_value + value_at, column, stride_vs, value_feature, VALUE_DIM, BLOCK_V, WIDE)",
        *key_loads(_gated(part.forward(), kind), "[None, :]"),
        *_scores(printer, part, kind, "query, tl.trans(key)", False, scale),
        *(raised if kind == "near" else either),
        *([f"p = {product if sure is not None else _shown(hides, product)}"] if gate else []),
        "out = tl.dot(p.to(value.dtype), value, out, input_precision=PRECISION)",
    ]


def _flows(printer: Printer, part: Part, hides: bool, gate: str, delta: str) -> Lines:
    """From ``p`` and ``d_p`` to ``d_raw``, and to ``d_x_n`` of every gate."""
    lines = [f"d_score = p * (d_p * ({gate}) - {delta})" if gate else f"d_score = p * (d_p - {delta})"]
    lines += ["d_score = tl.where(visible, d_score, 0.0)"] * hides
    lines += printer.slopes(part, "visible" if hides else "")
    return lines


def gradient_of_query(printer: Printer, part: Part, kind: str) -> Lines:
    """What one tile of keys adds to the gradients of the rows' query and thresholds."""
    gate, hides = printer.value_gate(part), _hides(printer, part, kind)
    return [
        "key = rows_of(p_key + key_at, column, stride_ks, feature, HEAD_DIM, BLOCK_D, WIDE)",
        "value = rows_of(p_value + value_at, column, stride_vs, value_feature, VALUE_DIM, BLOCK_V, WIDE)",
        *key_loads(_gated(part, kind), "[None, :]"),
        *_scores(printer, part, kind, "query, tl.trans(key)", True),
        *_weights(hides, "[:, None]"),
        "d_p = tl.dot(d_out, tl.trans(value), input_precision=PRECISION)",
        "d_gate_v = p * d_p",
        *_flows(printer, part, hides, gate, "delta[:, None]"),
        *(f"d_tau_{g.number} -= tl.sum(d_x_{g.number}, 1)" for g in part.gates if g.through != "ste_identity"),
        "d_query = tl.dot(d_raw.to(key.dtype), key, d_query, input_precision=PRECISION)",
    ]


def gradient_of_keys(printer: Printer, part: Part, kind: str) -> Lines:
    """What one chunk of queries of head ``h`` adds to the gradients of a tile's keys, values and scores."""
    return _of_keys(printer, part, kind, False)


def gradient_of_slots(printer: Printer, part: Part, kind: str) -> Lines:
    """The same for keys in slots, in tiles of queries by keys, whose gradients are summed as columns."""
    return _of_keys(printer, part, kind, True)


def _of_keys(printer: Printer, part: Part, kind: str, turned: bool) -> Lines:
    gate, sure, hides = printer.value_gate(part), printer.sure(part), _hides(printer, part, kind)
    asked: Lines = []
    if turned and hides and not printer.seen(part) and [g.number for g in part.gates] == [sure]:
        # Keys in slots seldom leave; where nothing else hides them, all that comes of a tile is asked for at once.
        made, hides = f"p, d_raw, d_x_{sure}", False
        asked = [f"{made} = staying_3({made}, q, gone, first_row + BLOCK_Q, THREADS)"]
    if turned:
        by_row, (first, second) = "[:, None]", ("query, tl.trans(key)", "d_out, tl.trans(value)")
        to_key, to_value = "tl.trans(query), d_raw.to(query.dtype)", "tl.trans(d_out), p.to(d_out.dtype)"
    else:
        by_row, (first, second) = "[None, :]", ("key, tl.trans(query)", "value, tl.trans(d_out)")
        to_key, to_value = "d_raw.to(query.dtype), query", "p.to(d_out.dtype), d_out"
    return [
        "row = first_row + tl.arange(0, BLOCK_Q)",
        "m_row = row < length",
        "row = tl.minimum(row, length - 1)",
        f"q = row{by_row}",
        "at = (b * heads + h) * length + row",
        "query = rows_of(p_query + b * stride_qb + h * stride_qh, row, stride_qs, feature, HEAD_DIM, BLOCK_D, WIDE)",
        "d_out_at = p_d_out + b * stride_ob + h * stride_oh",
        "d_out = rows_of(d_out_at, row, stride_os, value_feature, VALUE_DIM, BLOCK_V, WIDE)",
        *record_loads(printer.shifted, "BLOCK_Q", by_row),
        "share = tl.where(m_row, share, 0.0)",
        *_SEEN_BY_KEYS[kind.split()[0]],
        *_scores(printer, part, kind, first, True),
        *_weights(hides, by_row),
        f"d_p = tl.dot({second}, input_precision=PRECISION)",
        "d_gate_v = p * d_p",
        *_flows(printer, part, hides, gate, f"delta{by_row}"),
        *([f"p = {_shown(hides, f'p * ({gate})')}"] if gate else []),
        *asked,
        *(f"d_u_{g.number} += " + (f"d_x_{g.number}" if turned else f"tl.sum(d_x_{g.number}, 1)") for g in part.gates),
        f"d_value = tl.dot({to_value}, d_value, input_precision=PRECISION)",
        f"d_key = tl.dot({to_key}, d_key, input_precision=PRECISION)",
    ]


# Of selected keys, SEEN stands for what the kernel knows: whether they come from slots or are fresh.
_SEEN_BY_KEYS: dict[str, Lines] = {
    "full": [],
    "near": ["seen = m_column[:, None]"],
    "joined": ["seen = m_column[:, None]", f"selected_0 = {ENTERS}"],
    "selected": ["seen = SEEN"],
}
