"""Queries see keys of their own document only, in both directions; combine with ``causal()``.

Packed sequences are given as ids, one for each position (``doc=`` [S] or [B, S], any integers), or, with
``document(cu_seqlens="cu_seqlens")``, as cumulative lengths [N + 1] from 0 to S, the first position of each
document inclusive and its end exclusive. ``ids`` and ``cu_seqlens`` name the keyword of the call.
"""

from flexsparse.language import Mask, b, captured, kv, pattern, q


@pattern(examples=[{}, {"cu_seqlens": "cu_seqlens"}])
def document(ids: str = "doc", cu_seqlens: str | None = None) -> Mask:
    if cu_seqlens is not None:
        boundaries = captured(cu_seqlens, dims=("s",), encoding="boundaries")
        return boundaries[q] == boundaries[kv]
    doc = captured(ids, dims=("b", "s"))
    return doc[b, q] == doc[b, kv]
