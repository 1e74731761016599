"""Each query sees itself and the window - 1 keys before it: ``0 <= q - kv < window``.

With ``causal=False`` it sees the window - 1 keys on either side: ``|q - kv| < window``. The bound is
exclusive: ``window=1`` is the diagonal. ``window`` is in keys and at least 1; ``per_head`` gives each head its own.
"""

from flexsparse.language import Mask, Value, at_least, kv, pattern, q


@pattern(examples=[{"window": 1}, {"window": 100}, {"window": 50, "causal": False}])
def sliding_window(window: int | Value, causal: bool = True) -> Mask:
    at_least(1, window=window)
    if causal:
        return (kv <= q) & (q - kv < window)
    return abs(q - kv) < window
