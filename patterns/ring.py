"""A window on a circle: distance is counted around the end, ``min(d, n - d) < window`` with d = |q - kv|, exclusive.

For periodic signals and ring-shaped layouts; n is the key length.
"""

from flexsparse.language import Mask, at_least, kv, kv_len, minimum, pattern, q


@pattern(examples=[{"window": 20}])
def ring(window: int) -> Mask:
    at_least(1, window=window)
    return minimum(abs(q - kv), kv_len - abs(q - kv)) < window
