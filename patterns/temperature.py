"""Scores divided by a temperature: write ``pattern.score(temperature(2.0))``. ``value`` is above 0; 1 changes nothing.

With unit-length queries and keys and scale 1 this is cosine attention.
"""

from flexsparse.errors import PatternArgumentError
from flexsparse.language import Value, pattern, score


@pattern(examples=[{"value": 2.0}])
def temperature(value: float) -> Value:
    if not value > 0:
        raise PatternArgumentError("temperature(value)", got=repr(value), expected="a number above 0")
    return score / value
