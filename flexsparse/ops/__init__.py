"""The differentiable top-k: single rows, every causal prefix at once, and the lifetimes of selected keys."""

from flexsparse.ops.causal import CausalSelection, causal_sparsek, causal_topk
from flexsparse.ops.projection import sparsek

__all__ = ["CausalSelection", "causal_sparsek", "causal_topk", "sparsek"]
