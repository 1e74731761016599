"""A score that falls linearly with distance, with a slope for each head: add it to a pattern.

Head h of n = 2^m heads has slope ``2^(-8 (h + 1) / n)``, times ``-|q - kv|``. For other head counts the first
2^m heads take the slopes of 2^m heads and the rest every other slope of 2^(m + 1), as in the authors' code.
Source: Press, Smith, Lewis, "Train Short, Test Long", arXiv 2108.12409.
"""

from flexsparse.language import Value, exp2, floor, h, heads, kv, log2, pattern, q, where


@pattern(examples=[{}])
def alibi() -> Value:
    power = exp2(floor(log2(heads)))
    exponent = where(h < power, 8 * (h + 1) / power, 4 * (2 * (h - power) + 1) / power)
    return -exp2(-exponent) * abs(q - kv)
