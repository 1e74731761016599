"""Scores grow with the log of the position, so that attention stays sharp: ``pattern.score(log_length(512))``.

The score is multiplied by ``max(1, log(q + 1) / log(trained))``: positions up to ``trained`` are unchanged. The log-n
scaling that several long-context models use at lengths beyond their training.
"""

from flexsparse.language import Value, at_least, log, maximum, pattern, q, score


@pattern(examples=[{"trained": 64}])
def log_length(trained: int) -> Value:
    at_least(2, trained=trained)
    return score * maximum(log(q + 1) / log(trained), 1.0)
