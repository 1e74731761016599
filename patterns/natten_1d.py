"""Neighbourhood attention on a line: exactly ``kernel`` keys for each query, shifted inward at the ends.

The neighbourhood of q starts at ``clip(q - kernel // 2, 0, kv_len - kernel)``; with fewer keys than ``kernel`` all are
seen. Hassani et al., Neighborhood Attention Transformer, arXiv 2204.07143.
"""

from flexsparse.language import Mask, at_least, kv, kv_len, maximum, minimum, pattern, q


@pattern(examples=[{"kernel": 7}])
def natten_1d(kernel: int) -> Mask:
    at_least(1, kernel=kernel)
    start = maximum(minimum(q - kernel // 2, kv_len - kernel), 0)
    return (kv >= start) & (kv < start + kernel)
