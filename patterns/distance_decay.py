"""Scores shrink with distance: ``score * exp(-|q - kv| / reach)``: write ``pattern.score(distance_decay(64))``.

A multiplicative form: far keys tend to weight ``exp(0)`` whatever their content. ``reach`` is in positions, at least 1.
"""

from flexsparse.language import Value, at_least, exp, kv, pattern, q, score


@pattern(examples=[{"reach": 32}])
def distance_decay(reach: int) -> Value:
    at_least(1, reach=reach)
    return score * exp(-abs(q - kv) / reach)
