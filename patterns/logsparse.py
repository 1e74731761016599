"""Causal: each query sees itself and the keys at distances 1, 2, 4, 8, ...

``q - kv`` is 0 or a power of two, up to 2^30. LogSparse attention (Li et al., arXiv 1907.00235).
"""

from flexsparse.language import Mask, kv, pattern, q


@pattern(examples=[{}])
def logsparse() -> Mask:
    mask = q == kv
    for power in range(31):
        mask = mask | (q - kv == 2**power)
    return mask
