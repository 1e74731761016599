"""Keys past the length of their batch row are not seen: ``kv < lengths[b]``, exclusive.

``lengths=`` [B] integers at the call. Queries past the length still see the keys before it. Beside a selection this
is all that rows padded at their end need: a causal prefix holds no padding. Rows padded at their start need scores of
-inf there as well, which keeps the padding out of the selection: ``(kv >= starts[b]) & sparsek_window(k, window)``.
"""

from flexsparse.language import Mask, b, captured, kv, pattern


@pattern(examples=[{}])
def padding(lengths: str = "lengths") -> Mask:
    return kv < captured(lengths, dims=("b",))[b]
