"""A causal window and the first ``count`` keys as sinks: StreamingLLM (Xiao et al., arXiv 2309.17453).

``kv <= q`` and (``q - kv < window`` or ``kv < count``), both exclusive. The paper also counts positions inside the
cache; here they stay those of the sequence.
"""

from flexsparse.language import Mask, pattern
from flexsparse.patterns.causal import causal
from flexsparse.patterns.sinks import sinks
from flexsparse.patterns.sliding_window import sliding_window


@pattern(examples=[{"window": 30}, {"window": 30, "count": 2}])
def streaming_llm(window: int, count: int = 4) -> Mask:
    return causal() & (sliding_window(window) | sinks(count))
