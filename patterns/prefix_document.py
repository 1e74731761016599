"""Packed documents, each with a prefix that all of it sees and a rest that is causal.

Keys are seen inside the query's document (``doc`` ids, [S] or [B, S]) where ``kv <= q`` or the key belongs to the
prefix: ``in_prefix`` is a boolean for each position, [S] or [B, S]. The prefix-LM mask of T5 (Raffel et al., arXiv
1910.10683) for packed sequences.
"""

from flexsparse.language import Mask, b, captured, kv, pattern, q
from flexsparse.patterns.document import document


@pattern(examples=[{}])
def prefix_document(ids: str = "doc", in_prefix: str = "in_prefix") -> Mask:
    return document(ids) & ((kv <= q) | captured(in_prefix, dims=("b", "s"), dtype="bool")[b, kv])
