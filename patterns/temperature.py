"""Scores divided by a temperature: write ``pattern.score(temperature(2.0))``. ``value`` is above 0; 1 changes nothing.

With unit-length queries and keys and scale 1 this is cosine attention.
"""

from flexsparse.language import Value, above, pattern, score


@pattern(examples=[{"value": 2.0}])
def temperature(value: float | Value) -> Value:
    above(0, value=value)
    return score / value
