"""Modules: SPARSEK attention as a layer, and what its selection does on an input."""

from flexsparse.nn.attention import SparseKAttention
from flexsparse.nn.diagnostics import SelectionDiagnostics
from flexsparse.nn.scorer import Scorer

__all__ = ["Scorer", "SelectionDiagnostics", "SparseKAttention"]
