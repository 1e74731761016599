"""Chosen columns and chosen diagonals, causal: a key is seen if its column or its distance is marked.

``vertical=`` [H, S] booleans mark keys, ``slash=`` [H, S] booleans mark distances ``q - kv``. The pattern
that MInference (Jiang et al., arXiv 2407.02490) finds head by head; here the marks come with the call.
"""

from flexsparse.language import Mask, captured, h, kv, maximum, pattern, q


@pattern(examples=[{}])
def vertical_slash(vertical: str = "vertical", slash: str = "slash") -> Mask:
    columns = captured(vertical, dims=("h", "s"), dtype="bool")
    diagonals = captured(slash, dims=("h", "s"), dtype="bool")
    return (kv <= q) & (columns[h, kv] | diagonals[h, maximum(q - kv, 0)])
