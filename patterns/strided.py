"""Causal: the last ``stride`` keys, and every key a multiple of ``stride`` back.

``0 <= q - kv`` and (``q - kv < stride`` or ``(q - kv) % stride == 0``); the first bound is exclusive. The strided
pattern of Sparse Transformers (Child et al., arXiv 1904.10509), both of its heads' sets in one.
"""

from flexsparse.language import Mask, at_least, kv, pattern, q


@pattern(examples=[{"stride": 1}, {"stride": 16}])
def strided(stride: int) -> Mask:
    at_least(1, stride=stride)
    return (kv <= q) & ((q - kv < stride) | ((q - kv) % stride == 0))
