"""Text is causal, images see themselves in both directions: ``kv <= q``, or both positions lie in one image.

``image=`` [S] or [B, S] integers name the image of each position and are negative for text. The mask of Transfusion
(Zhou et al., arXiv 2408.11039).
"""

from flexsparse.language import Mask, b, captured, kv, pattern, q


@pattern(examples=[{}])
def mixed_modal(image: str = "image") -> Mask:
    part = captured(image, dims=("b", "s"))
    return (kv <= q) | ((part[b, q] == part[b, kv]) & (part[b, q] >= 0))
