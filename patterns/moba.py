"""Each query sees its own block of keys, causally, and the k past blocks whose mean key it points to most.

Blocks are ``kv // block``; past blocks are those before the query's own and are seen whole, the own block as
``kv <= q``, inclusive; future blocks never. For each query and query head, past blocks are ranked by the product of
the query with the mean of the block's keys, on ties the earlier first; k counts past blocks alone. The choice gets no
gradient: query and key learn through the attention over what was chosen.
The selection depends on the query, so it never carries an eviction certificate: any block may be chosen again, and
generation must keep every key. It needs a call: block masks cannot be made before query and key are known.
After Lu et al., "MoBA: Mixture of Block Attention for Long-Context LLMs", arXiv 2502.13189.
"""

from flexsparse.language import Mask, block_topk, pattern


@pattern(examples=[{"block": 32, "k": 1}, {"block": 16, "k": 2}])
def moba(block: int, k: int) -> Mask:
    return block_topk(k, block=block, score="mean")
