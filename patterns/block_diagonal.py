"""Queries see the keys of their own block of ``block`` positions: ``q // block == kv // block``."""

from flexsparse.language import Mask, at_least, kv, pattern, q


@pattern(examples=[{"block": 1}, {"block": 48}])
def block_diagonal(block: int) -> Mask:
    at_least(1, block=block)
    return q // block == kv // block
