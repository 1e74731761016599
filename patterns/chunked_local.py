"""Causal inside chunks of ``chunk`` positions, nothing between them: the chunked attention of Llama 4's local layers.

``kv <= q`` and ``q // chunk == kv // chunk``.
"""

from flexsparse.language import Mask, pattern
from flexsparse.patterns.block_diagonal import block_diagonal
from flexsparse.patterns.causal import causal


@pattern(examples=[{"chunk": 40}])
def chunked_local(chunk: int) -> Mask:
    return causal() & block_diagonal(chunk)
