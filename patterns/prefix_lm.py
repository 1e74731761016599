"""The first ``prefix`` keys are seen by all, later keys causally: ``(kv < prefix) | (kv <= q)``.

``prefix`` is exclusive: key ``prefix`` is the first causal one, and ``prefix=0`` is causal attention.
"""

from flexsparse.language import Mask, at_least, kv, pattern, q


@pattern(examples=[{"prefix": 0}, {"prefix": 100}])
def prefix_lm(prefix: int) -> Mask:
    at_least(0, prefix=prefix)
    return (kv < prefix) | (kv <= q)
