"""A fixed penalty that falls like the sum of cosines of sinusoidal embeddings: add it to a pattern.

Adds ``sum over i < terms of cos((q - kv) / 10000^(i / terms)) - terms``, in units of the scaled score, times
``strength``: 0 on the diagonal and below it elsewhere. After Chi et al., Sandwich, arXiv 2212.10356.
"""

from flexsparse.language import Value, at_least, cos, kv, pattern, q


@pattern(examples=[{"terms": 4}])
def sandwich(terms: int, strength: float = 1.0) -> Value:
    at_least(1, terms=terms)
    total = cos((q - kv) / 1.0) - 1
    for term in range(1, terms):
        total = total + cos((q - kv) / 10000 ** (term / terms)) - 1
    return strength * total
