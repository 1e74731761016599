"""Each query sees itself and every key before it: ``kv <= q``, the diagonal included."""

from flexsparse.language import Mask, kv, pattern, q


@pattern(examples=[{}])
def causal() -> Mask:
    return kv <= q
