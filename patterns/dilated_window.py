"""Each query sees ``window`` keys, ``dilation`` apart, ending at itself.

Key kv is seen where ``0 <= q - kv < window * dilation`` (exclusive) and ``(q - kv) % dilation == 0``;
``dilation=1`` is ``sliding_window``. The dilated window of Longformer (Beltagy et al., arXiv 2004.05150).
"""

from flexsparse.language import Mask, at_least, kv, pattern, q


@pattern(examples=[{"window": 8, "dilation": 1}, {"window": 30, "dilation": 4}])
def dilated_window(window: int, dilation: int) -> Mask:
    at_least(1, window=window, dilation=dilation)
    return (kv <= q) & (q - kv < window * dilation) & ((q - kv) % dilation == 0)
