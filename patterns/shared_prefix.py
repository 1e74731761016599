"""Several continuations of one prompt in a row: each sees the prompt and itself, causally, and no other.

The first ``prefix`` positions are the prompt, then continuations of ``length`` positions each. ``kv <= q`` and
(``kv < prefix`` or both lie in one continuation). For best-of-n sampling and GRPO-style training on one row.
"""

from flexsparse.language import Mask, at_least, kv, pattern, q


@pattern(examples=[{"prefix": 50, "length": 30}])
def shared_prefix(prefix: int, length: int) -> Mask:
    at_least(0, prefix=prefix)
    at_least(1, length=length)
    return (kv <= q) & ((kv < prefix) | ((q - prefix) // length == (kv - prefix) // length))
