"""A learned bias for each head and relative position, clipped at ``span``: add it to a pattern.

Adds ``bias[h, clip(q - kv, -span, span) + span]``; ``bias=`` is a float tensor [H, 2 span + 1] that receives
gradients, computed without atomics: two runs give the same bits. Distances of ``span`` and beyond share an
entry (inclusive). Clipped relative positions are from Shaw et al., arXiv 1803.02155, there as vectors.
"""

from flexsparse.language import Value, at_least, captured, h, kv, maximum, minimum, pattern, q


@pattern(examples=[{"span": 16}])
def relative_bias(span: int, bias: str = "bias") -> Value:
    at_least(1, span=span)
    table = captured(bias, dims=("h", "distance"), learnable=True)
    return table[h, minimum(maximum(q - kv, -span), span) + span]
