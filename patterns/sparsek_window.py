"""The paper's hybrid: SPARSEK over the keys that a causal sliding window has left, and the window itself.

Each query sees the ``window`` keys ending at itself (``0 <= q - kv < window``, exclusive) and the k best-scored
keys before them (``kv <= q - window``, inclusive): k + window distinct keys from position k + window - 1 on.
Source: Lou, Jia, Zheng, Tu, arXiv 2406.16747.
"""

from flexsparse.language import Index, Pattern, pattern, topk
from flexsparse.patterns.sliding_window import sliding_window


@pattern(examples=[{"k": 16, "window": 32}])
def sparsek_window(
    k: int | Index, window: int | Index, gate: str = "kv", scores: str = "scores", segments: str | None = None
) -> Pattern:
    return sliding_window(window) | topk(k, after=window, gate=gate, scores=scores, segments=segments)
