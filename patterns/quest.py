"""Each query sees its own block of keys, causally, and the k past blocks that could hold the largest product with it.

Blocks are ``kv // block``; past blocks are those before the query's own and are seen whole, the own block as
``kv <= q``, inclusive; future blocks never. For each query and query head, past blocks are ranked by an upper bound of
the query's product with any of their keys, from the elementwise minimum and maximum of the block, on ties the earlier
first; k counts past blocks alone. The choice gets no gradient.
The selection depends on the query, so it never carries an eviction certificate: any block may be chosen again, and
generation must keep every key. It needs a call: block masks cannot be made before query and key are known.
After Tang et al., "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference", arXiv 2406.10774, which
selects in decoding; here every query of a sequence does.
"""

from flexsparse.language import Mask, block_topk, pattern


@pattern(examples=[{"block": 32, "k": 1}, {"block": 16, "k": 2}])
def quest(block: int, k: int) -> Mask:
    return block_topk(k, block=block, score="bounds")
