"""Every query sees the first ``count`` keys: ``kv < count``, exclusive.

Attention sinks keep a windowed model stable (Xiao et al., StreamingLLM, arXiv 2309.17453). The mask is not
causal by itself: write ``causal() & (sliding_window(512) | sinks(4))``.
"""

from flexsparse.language import Mask, at_least, kv, pattern


@pattern(examples=[{"count": 4}, {"count": 130}])
def sinks(count: int) -> Mask:
    at_least(1, count=count)
    return kv < count
