"""Queries see every key of their own block and of the blocks before it: ``kv // block <= q // block``.

Causal between blocks and full inside one, as in block-wise diffusion and chunked video or speech models.
"""

from flexsparse.language import Mask, at_least, kv, pattern, q


@pattern(examples=[{"block": 48}])
def block_causal(block: int) -> Mask:
    at_least(1, block=block)
    return kv // block <= q // block
