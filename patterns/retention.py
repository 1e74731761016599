"""A fixed exponential decay of weights for each head: add it to a pattern.

Head h decays by ``gamma = 1 - 2^(-5 - h)`` a position: the bias is ``|q - kv| log(gamma)``. The decay of RetNet (Sun et
al., arXiv 2307.08621) on softmax weights.
"""

from flexsparse.language import Value, exp2, h, kv, log, pattern, q


@pattern(examples=[{}])
def retention() -> Value:
    return abs(q - kv) * log(1 - exp2(-5 - h))
