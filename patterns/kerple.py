"""A learned logarithmic penalty on distance for each head: ``-r1 log(1 + r2 |q - kv|)``: add it to a pattern.

``rates=`` is a float tensor [H, 2] with r1 and r2, kept positive by the caller, and receives gradients.
Chi et al., KERPLE, arXiv 2205.09921.
"""

from flexsparse.language import Value, captured, h, kv, log, pattern, q


@pattern(examples=[{}])
def kerple(rates: str = "rates") -> Value:
    table = captured(rates, dims=("h", "rate"), learnable=True)
    return -table[h, 0] * log(1 + table[h, 1] * abs(q - kv))
