"""What one tile adds to a kernel: to the softmax of its rows, or to the gradients of queries or keys.

Tiles are [BLOCK_M, BLOCK_N], queries by keys, and [BLOCK_N, BLOCK_Q] where gradients of keys are summed; ``q`` and
``kv`` are shaped to broadcast to them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

Lines = list[str]


def row_loads(shifted: Iterable[int], axis: str) -> Lines:
    """Thresholds of the queries in ``row`` and the least gates, along the other axis than ``axis``."""
    lines = []
    for n in shifted:
        at = f"(b * heads_{n} + h // group_{n}) * length + row"
        lines += [f"tau_{n} = tl.load(p_tau_{n} + {at}){axis}", f"least_{n} = tl.load(p_least_{n} + {at}){axis}"]
    return lines


def key_loads(gated: Iterable[int], axis: str) -> Lines:
    """Scores of the keys in ``column``; those that have none are not selected."""
    lines = []
    for n in gated:
        lines.append(f"u_{n} = tl.load(p_u_{n} + (b * heads_{n} + h // group_{n}) * length + column)")
        lines.append(f"u_{n} = tl.where(u_{n} == u_{n}, u_{n}, 0.0){axis}")
    return lines


def _gated(part: Any) -> list[int]:
    return sorted({gate.number for gate in part.gates})


def _scores(printer: Any, part: Any, kind: str, product: str, slopes: bool, scale: str = "scale") -> Lines:
    lines = [f"raw = tl.dot({product}, input_precision=PRECISION) * {scale}", *printer.loads(part, slopes)]
    lines += printer.score(part)
    conditions = [] if kind == "full" else ["seen"]
    text = printer.seen(part)
    conditions += [f"({text})"] if text else []
    if conditions:
        lines.append(f"visible = {' & '.join(conditions)}")
        lines.append('score = tl.where(visible, score, float("-inf"))')
    return lines


def _hides(printer: Any, part: Any, kind: str) -> bool:
    return kind != "full" or bool(printer.seen(part))


def _shown(printer: Any, part: Any, kind: str, text: str) -> str:
    """A product that is 0 where a key is hidden, even if a factor is not a number there."""
    return f"tl.where(visible, {text}, 0.0)" if _hides(printer, part, kind) else text


def attend(printer: Any, part: Any, kind: str) -> Lines:
    """One tile of keys joins the softmax of the rows; wants ``column``, ``kv``, and ``seen`` of all but full tiles."""
    gate, sure = printer.value_gate(part), printer.sure(part)
    product = f"p * ({gate})"
    return [
        "key = rows_of(p_key + key_at, column, stride_ks, feature, HEAD_DIM, BLOCK_D)",
        "value = rows_of(p_value + value_at, column, stride_vs, value_feature, VALUE_DIM, BLOCK_V)",
        *key_loads(_gated(part.forward()), "[None, :]"),
        *_scores(printer, part, kind, "query, tl.trans(key)", False, "scale" if sure is None else f"scale_{sure}"),
        "higher = tl.maximum(top, tl.max(score, 1))",
        "# Rows that have seen no key yet stay at -inf.",
        'level = tl.where(higher == float("-inf"), 0.0, higher)',
        "p = exp_above(score, level[:, None], PRECISION)",
        "shrink = tl.exp2((top - level) * LOG2E)",
        "total = total * shrink + tl.sum(p, 1)",
        *([f"p = {product if sure is not None else _shown(printer, part, kind, product)}"] if gate else []),
        "out = tl.dot(p.to(value.dtype), value, out * shrink[:, None], input_precision=PRECISION)",
        "top = higher",
    ]


def _flows(printer: Any, part: Any, kind: str, gate: str, delta: str) -> Lines:
    """From ``p`` and ``d_p`` to ``d_raw``, and to ``d_x_n`` of every gate."""
    kept = f"p * (d_p * ({gate}) - {delta})" if gate else f"p * (d_p - {delta})"
    lines = [f"d_score = {kept}", *printer.slopes(part)]
    if _hides(printer, part, kind):
        names = ["d_raw", *(f"d_x_{g.number}" for g in part.gates)]
        lines += [f"{name} = tl.where(visible, {name}, 0.0)" for name in names]
    return lines


def gradient_of_query(printer: Any, part: Any, kind: str) -> Lines:
    """What one tile of keys adds to the gradients of the rows' query and thresholds."""
    gate = printer.value_gate(part)
    return [
        "key = rows_of(p_key + key_at, column, stride_ks, feature, HEAD_DIM, BLOCK_D)",
        "value = rows_of(p_value + value_at, column, stride_vs, value_feature, VALUE_DIM, BLOCK_V)",
        *key_loads(_gated(part), "[None, :]"),
        *_scores(printer, part, kind, "query, tl.trans(key)", True),
        "p = exp_above(score, level[:, None], PRECISION) * share[:, None]",
        "d_p = tl.dot(d_out, tl.trans(value), input_precision=PRECISION)",
        "d_gate_v = p * d_p",
        *_flows(printer, part, kind, gate, "delta[:, None]"),
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
        *row_loads(sorted({g.number for g in part.gates if g.through != "ste_identity"}), "[None, :]"),
        "query = rows_of(p_query + b * stride_qb + h * stride_qh, row, stride_qs, feature, HEAD_DIM, BLOCK_D)",
        "d_out = rows_of(p_d_out + b * stride_ob + h * stride_oh, row, stride_os, value_feature, VALUE_DIM, BLOCK_V)",
        "level = tl.load(p_level + at)",
        "share = tl.load(p_share + at, mask=m_row, other=0.0)",
        "delta = tl.load(p_delta + at)",
        *_SEEN_BY_KEYS[kind],
        *_scores(printer, part, kind, "key, tl.trans(query)", True),
        "p = exp_above(score, level[None, :], PRECISION) * share[None, :]",
        "d_p = tl.dot(value, tl.trans(d_out), input_precision=PRECISION)",
        "d_gate_v = p * d_p",
        *_flows(printer, part, kind, gate, "delta[None, :]"),
        *(f"d_u_{g.number} += tl.sum(d_x_{g.number}, 1)" for g in part.gates),
        *([f"p = {_shown(printer, part, kind, f'p * ({gate})')}"] if gate else []),
        "d_value = tl.dot(p.to(d_out.dtype), d_out, d_value, input_precision=PRECISION)",
        "d_key = tl.dot(d_raw.to(query.dtype), query, d_key, input_precision=PRECISION)",
    ]


# Of selected keys, SEEN stands for what the kernel knows: whether they come from slots or are fresh.
_SEEN_BY_KEYS: dict[str, Lines] = {"full": [], "near": ["seen = m_column[:, None]"], "selected": ["seen = SEEN"]}
