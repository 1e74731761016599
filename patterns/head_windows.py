"""A causal window of its own for each head, or group of heads: ``0 <= q - kv < windows[h * n // heads]``, exclusive.

``windows`` is a list whose length divides the number of query heads.
"""

from flexsparse.language import Mask, pattern, per_head
from flexsparse.patterns.sliding_window import sliding_window


@pattern(examples=[{"windows": [10, 60]}])
def head_windows(windows: list | tuple) -> Mask:  # type: ignore[type-arg]
    return sliding_window(per_head(windows))
