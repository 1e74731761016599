"""flexsparse: attention patterns as Python expressions, lowered to fused kernels.

Importing this package imports neither torch nor sympy; names are loaded when first used.
"""

from __future__ import annotations

import importlib
import pathlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flexsparse.analysis.proofs import depends_on, equivalent, implies, is_causal, simplify
    from flexsparse.block_masks import block_mask
    from flexsparse.checks import check
    from flexsparse.compiler import CompiledAttention, compile
    from flexsparse.dense import dense_mask, reference
    from flexsparse.errors import BackendNotice, FlexsparseError
    from flexsparse.inspection import BoundAttention
    from flexsparse.language import block_topk, captured, pattern, per_head, scalar, topk
    from flexsparse.parser import parse
    from flexsparse.trace import from_flex

__version__ = "0.1.0"

_HOME = {
    "depends_on": "analysis.proofs",
    "equivalent": "analysis.proofs",
    "implies": "analysis.proofs",
    "is_causal": "analysis.proofs",
    "simplify": "analysis.proofs",
    "BackendNotice": "errors",
    "BoundAttention": "inspection",
    "CompiledAttention": "compiler",
    "FlexsparseError": "errors",
    "block_mask": "block_masks",
    "block_topk": "language",
    "captured": "language",
    "check": "checks",
    "compile": "compiler",
    "dense_mask": "dense",
    "from_flex": "trace",
    "parse": "parser",
    "pattern": "language",
    "per_head": "language",
    "reference": "dense",
    "scalar": "language",
    "topk": "language",
}
_SUBMODULES = ("codegen", "errors", "language", "nn", "ops", "patterns")

__all__ = [
    "BackendNotice",
    "BoundAttention",
    "CompiledAttention",
    "FlexsparseError",
    "block_mask",
    "block_topk",
    "captured",
    "check",
    "compile",
    "dense_mask",
    "depends_on",
    "equivalent",
    "from_flex",
    "implies",
    "is_causal",
    "parse",
    "pattern",
    "per_head",
    "reference",
    "scalar",
    "simplify",
    "topk",
]

# In a checkout, patterns/ and codegen/ stand beside this folder, and symbolic links inside it lead to them.
# Where links could not be checked out (Windows, some archives) the search path leads there instead.
_root = pathlib.Path(__file__).resolve().parent.parent
if not (pathlib.Path(__file__).parent / "patterns" / "__init__.py").exists() and (_root / "patterns").is_dir():
    __path__.append(str(_root))


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"flexsparse.{_HOME[name]}"), name)
    if name in _SUBMODULES:
        return importlib.import_module(f"flexsparse.{name}")
    raise AttributeError(f"module 'flexsparse' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME, *_SUBMODULES})
