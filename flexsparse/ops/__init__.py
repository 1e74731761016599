"""The differentiable top-k: single rows, every causal prefix at once, and the lifetimes of selected keys.

**Alternatives to SPARSEK, and what they share.** Attention takes the hard top-k of query-independent scores over each
causal prefix, under a soft gate or with a straight-through gradient. All of these select the same keys, and for all of
them eviction is final: a key that leaves the top-k never returns, so ``causal_topk``'s lifetimes and slots serve each.

| alternative | forward | gradient to the scores | where |
|---|---|---|---|
| SPARSEK | gate clip(u - tau, 0, 1) | of gate and tau, inside the support | ``causal_sparsek``, ``gates``; patterns |
| capped softmax | gate min(1, exp(u - tau)) | the same, everywhere | ``causal_capped_softmax``, ``gates``; patterns |
| straight through | gate 1 | of SPARSEK's gate at 1 | patterns, ``gate="ste"`` |
| the same, identity | gate 1 | to each selected score as it is | patterns, ``gate="ste_identity"`` |
| the same, sigmoid | gate 1 | of sigmoid(u - tau) | patterns, ``gate="ste_sigmoid"`` |

The two with a tau have one signature, ``(u, k, after=0, segments=None, *, validate=True) -> CausalThresholds``, and
``gates(u, tau, query_index, key_index, form=...)``. Guarantees: the gates of a prefix of more than k candidates sum to
k, lie in [0, 1], rise with the score and fall as the prefix grows; tau is -inf where at most k are candidates; two runs
give the same bits; first derivatives only. In patterns it is ``gate="capped_softmax"``, on K and V.
"""

from flexsparse.ops.capped_softmax import causal_capped_softmax
from flexsparse.ops.causal import CausalSelection
from flexsparse.ops.gates import dense_gates, gates
from flexsparse.ops.projection import sparsek
from flexsparse.ops.selection import (
    CausalThresholds,
    causal_select,
    causal_sparsek,
    causal_topk,
    slot_table,
)

__all__ = [
    "CausalSelection",
    "CausalThresholds",
    "causal_capped_softmax",
    "causal_select",
    "causal_sparsek",
    "causal_topk",
    "dense_gates",
    "gates",
    "slot_table",
    "sparsek",
]
