"""Tokens of a speculative-decoding tree see their ancestors and themselves.

``parents=`` [S] integers give each token's parent, an earlier token, or -1 for a root. A key is an ancestor of the
query where its interval of a depth-first walk holds the query's. As in SpecInfer (Miao et al., arXiv 2305.09781).
"""

from flexsparse.language import Mask, captured, kv, pattern, q


@pattern(examples=[{}])
def tree(parents: str = "parents") -> Mask:
    walk = captured(parents, dims=("side", "s"), encoding="parents")
    return (walk[0, kv] <= walk[0, q]) & (walk[0, q] < walk[1, kv])
