"""A window on either side, and ``count`` global tokens at the start that see and are seen by all.

``|q - kv| < window``, exclusive, or ``q < count`` or ``kv < count``. Beltagy et al., Longformer, arXiv 2004.05150.
"""

from flexsparse.language import Mask, pattern
from flexsparse.patterns.global_tokens import global_tokens
from flexsparse.patterns.sliding_window import sliding_window


@pattern(examples=[{"window": 20, "count": 3}])
def longformer(window: int, count: int) -> Mask:
    return sliding_window(window, causal=False) | global_tokens(count)
