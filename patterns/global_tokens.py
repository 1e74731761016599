"""The first ``count`` tokens see everything and are seen by everything: ``(q < count) | (kv < count)``, exclusive.

The global attention of Longformer (Beltagy et al., arXiv 2004.05150) and BigBird, with the global tokens first.
"""

from flexsparse.language import Mask, at_least, kv, pattern, q


@pattern(examples=[{"count": 1}, {"count": 40}])
def global_tokens(count: int) -> Mask:
    at_least(1, count=count)
    return (q < count) | (kv < count)
