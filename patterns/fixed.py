"""Causal: the query's own block, and the last ``summary`` keys of every block.

``kv <= q`` and (``q // block == kv // block`` or ``kv % block >= block - summary``). The fixed pattern of Sparse
Transformers (Child et al., arXiv 1904.10509), both of its heads' sets in one. ``summary`` is at most ``block``.
"""

from flexsparse.errors import PatternArgumentError
from flexsparse.language import Mask, at_least, kv, pattern, q


@pattern(examples=[{"block": 16, "summary": 2}])
def fixed(block: int, summary: int) -> Mask:
    at_least(1, block=block, summary=summary)
    if summary > block:
        raise PatternArgumentError("summary", got=str(summary), expected=f"at most block, {block}")
    return (kv <= q) & ((q // block == kv // block) | (kv % block >= block - summary))
