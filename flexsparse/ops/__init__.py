"""The differentiable top-k: single rows, every causal prefix at once, and the lifetimes of selected keys."""

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
    "causal_select",
    "causal_sparsek",
    "causal_topk",
    "dense_gates",
    "gates",
    "slot_table",
    "sparsek",
]
