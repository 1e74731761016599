"""Causal with a look at the next ``count`` keys: ``kv <= q + count``, inclusive; 0 is causal. For streaming speech."""

from flexsparse.language import Mask, at_least, kv, pattern, q


@pattern(examples=[{"count": 0}, {"count": 9}])
def lookahead(count: int) -> Mask:
    at_least(0, count=count)
    return kv <= q + count
