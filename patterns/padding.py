"""Keys past the length of their batch row are not seen: ``kv < lengths[b]``, exclusive.

``lengths=`` [B] integers at the call. Queries past the length still see the keys before it.
"""

from flexsparse.language import Mask, b, captured, kv, pattern


@pattern(examples=[{}])
def padding(lengths: str = "lengths") -> Mask:
    return kv < captured(lengths, dims=("b",))[b]
