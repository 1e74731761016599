"""The dense oracle: any pattern evaluated element by element in float64, straight from its expression.

It shares nothing with the lowering beyond the expression nodes: it walks the pattern itself, solves every
prefix by sorting, and materialises every score. Use it at small sizes, to judge everything else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, overload

import torch
from torch import Tensor

from flexsparse.dense_evaluator import DenseSizes, Evaluator
from flexsparse.errors import CapturedError, nearest
from flexsparse.expression import Pattern
from flexsparse.ir.names import names_of
from flexsparse.ir.nodes import Node
from flexsparse.parser import parse
from flexsparse.row_lengths import LENGTHS, check_lengths, names_lengths, padding_of, within_lengths


@overload
def reference(
    pattern: Pattern | str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None = ...,
    return_lse: Literal[False] = ...,
    q_offset: int = ...,
    **captured: Tensor | int | float,
) -> Tensor: ...
@overload
def reference(
    pattern: Pattern | str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None = ...,
    return_lse: bool,
    q_offset: int = ...,
    **captured: Tensor | int | float,
) -> Any: ...
def reference(
    pattern: Pattern | str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    q_offset: int = 0,
    **captured: Tensor | int | float,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention under ``pattern``, dense, computed in float64 and returned in query's dtype.

    query [B, H, S_q, D], key and value [B, H_kv, S_kv, D]; captured tensors, scores and numbers of the call by
    keyword, and ``lengths``, as for the compiled pattern. Returns out [B, H, S_q, D_v], and lse [B, H, S_q] in float32
    (float64 for float64) if asked for. Differentiable, to any order, in every floating-point input. A row that sees no
    key gives out 0 and lse -inf, or the logit of the sink. Needs O(B H S_q S_kv) memory, times 2 S_kv / D for a
    selection. Raises CapturedError for a tensor that is missing and for a name that the pattern does not take.
    """
    expression = parse(pattern) if isinstance(pattern, str) else pattern
    _refuse_unknown(expression.node, captured, (LENGTHS,))
    if captured.get(LENGTHS) is not None and not names_lengths(expression.node):
        return _within(expression, (query, key, value), captured, (scale, return_lse, q_offset))
    groups = query.shape[1] // key.shape[1]
    wide_query, wide_key, wide_value = query.double(), key.double(), value.double()
    wide_key, wide_value = (x.repeat_interleave(groups, 1) for x in (wide_key, wide_value))
    sizes = DenseSizes(query.shape[0], query.shape[1], query.shape[2], key.shape[2], q_offset, query.device)
    dense = Evaluator(sizes, captured, (query, key)).pattern(expression.node)
    scores = wide_query @ wide_key.transpose(-1, -2) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    # An expression may leave the running score out, and be an integer or one number for all.
    scores = dense.score(scores * dense.gate_k).double().expand_as(scores)
    # The logarithm is taken where it counts, so that a gate of 0 elsewhere gives no NaN gradient.
    seen = dense.mask.expand_as(scores)
    scores = scores + torch.where(seen, dense.gate_logit, 1.0).log()
    # Hidden scores never reach the exponential, so they cannot turn into NaN there; an empty row has weight 0.
    visible = torch.where(seen, scores, -torch.inf)
    top = visible.detach().amax(-1, keepdim=True)
    sink = torch.full_like(top, -torch.inf) if dense.sink is None else dense.sink.to(top).expand_as(top)
    top = torch.maximum(top, sink.detach())
    top = torch.where(torch.isneginf(top), 0.0, top)
    exponential = torch.where(seen, torch.exp(torch.where(seen, scores - top, 0.0)), 0.0)
    total = exponential.sum(-1, keepdim=True) + torch.exp(sink - top)
    empty = ~seen.any(-1, keepdim=True) & torch.isneginf(sink)
    weights = exponential / torch.where(empty, 1.0, total) * dense.gate_v
    out = (weights @ wide_value).to(query.dtype)
    if not return_lse:
        return out
    lse = torch.where(empty, -torch.inf, torch.where(empty, 1.0, total).log() + top).squeeze(-1)
    return out, lse.to(torch.float64 if query.dtype is torch.float64 else torch.float32)


def _within(
    pattern: Any, operands: tuple[Tensor, Tensor, Tensor], captured: Mapping[str, Any], options: tuple[Any, ...]
) -> Any:
    """``reference`` of rows that end at their lengths."""
    (query, key, _), (scale, return_lse, q_offset) = operands, options
    ends = check_lengths(captured[LENGTHS], len(query), key.shape[2], query.device, validate=True)
    padding = padding_of(ends, query.shape[2], key.shape[2], q_offset)
    given = padding.given(dict(captured), pattern.node) | {LENGTHS: ends}
    operands = padding.operands(*operands)
    out, lse = reference(within_lengths(pattern), *operands, scale=scale, return_lse=True, q_offset=q_offset, **given)
    out, lse = padding.of_queries(out), padding.of_queries(lse, -torch.inf)
    return (out, lse) if return_lse else out


def dense_mask(
    pattern: Pattern | str,
    q_len: int,
    kv_len: int | None = None,
    *,
    batch: int = 1,
    heads: int = 1,
    q_offset: int = 0,
    device: torch.device | str = "cpu",
    query: Tensor | None = None,
    key: Tensor | None = None,
    **captured: Tensor | int | float,
) -> Tensor:
    """Which keys each query sees, as booleans [B, H, S_q, S_kv].

    A selection that depends on ``query`` [B, H, S_q, D] and ``key`` [B, H_kv, S_kv, D] needs both; other patterns
    ignore them. Raises CapturedError for a tensor that is missing, these two included, and for a name that the pattern
    does not take.
    """
    expression = parse(pattern) if isinstance(pattern, str) else pattern
    _refuse_unknown(expression.node, captured)
    kv_len = q_len if kv_len is None else kv_len
    sizes = DenseSizes(batch, heads, q_len, kv_len, q_offset, torch.device(device))
    operands = None if query is None or key is None else (query, key)
    return Evaluator(sizes, captured, operands).pattern(expression.node).mask.expand(batch, heads, q_len, kv_len)


def _refuse_unknown(pattern: Node, captured: Mapping[str, Any], besides: tuple[str, ...] = ()) -> None:
    known = {*besides, *names_of(pattern)}
    for name, value in captured.items():
        if value is not None and name not in known:
            expected = f"only {', '.join(sorted(known))}" if known else "none, as the pattern takes none"
            mend = nearest(name, known - set(captured))
            raise CapturedError(name, got="a name that the pattern does not use", expected=expected, mend=mend)
