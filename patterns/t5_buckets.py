"""T5's learned bias for each head and bucket of relative positions, causal form: add it to a pattern.

Distances 0 to ``buckets // 2 - 1`` have a bucket each; longer ones share buckets that grow logarithmically up to
``furthest`` and beyond. ``bias=`` is a float tensor [H, buckets] and receives gradients; later keys have distance 0.
Raffel et al., arXiv 1910.10683.
"""

from flexsparse.language import Value, at_least, captured, floor, h, kv, log, maximum, minimum, pattern, q, where


@pattern(examples=[{"buckets": 16, "furthest": 64}])
def t5_buckets(buckets: int = 32, furthest: int = 128, bias: str = "bias") -> Value:
    at_least(2, buckets=buckets)
    exact = buckets // 2
    at_least(exact + 1, furthest=furthest)
    distance = maximum(q - kv, 0)
    growth = log(maximum(distance, exact) / exact) / log(furthest / exact) * (buckets - exact)
    far = minimum(exact + maximum(floor(growth), 0), buckets - 1)
    table = captured(bias, dims=("h", "bucket"), learnable=True)
    return table[h, where(distance < exact, minimum(distance, exact), far)]
