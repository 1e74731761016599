"""Calls of the kernels that gather, compared with the oracle under the tolerance policy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import flexsparse as fs
from flexsparse.tolerance import Call, evaluate, judge
from tests.helpers import DIFFERENTIABLE, make_inputs, tensors_of
from tests.runtime import compositions

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
COMPOSITIONS: dict[str, Any] = {
    name: pattern
    for name, pattern in compositions.COMPOSITIONS.items()
    if fs.compile(pattern).ir.selections and not fs.compile(pattern).ir.chosen
}


def call_of(pattern: Any, size: int, dtype: torch.dtype = torch.float32, **shape: Any) -> Call:
    """Operands in ``dtype`` and scores in float32; four query heads over two KV heads unless ``shape`` says other."""
    inputs = make_inputs(tensors_of(pattern), size=size, **{"head_dim": 16, **shape}).to(dtype, torch.float32)
    captured = {name: tensor.detach().to(DEVICE) for name, tensor in inputs.captured.items()}
    learned = tuple(name for name in captured if name in DIFFERENTIABLE)
    query, key, value = (x.detach().to(DEVICE) for x in (inputs.query, inputs.key, inputs.value))
    generator = torch.Generator().manual_seed(5)

    def flow(*of: int) -> Tensor:
        return torch.randn(*of, generator=generator).to(DEVICE)

    lead = query.shape[:3]
    return Call(query, key, value, captured, learned, flow(*lead, value.shape[3]), flow(*lead)).cast(dtype)


def failures(pattern: Any, call: Call, **settings: Any) -> list[str]:
    """What is outside the policy: out, lse and every gradient against the float64 oracle."""
    got = evaluate(fs.compile(pattern, backend="gather", **settings), call)
    return [f"{c.name}: {c.error:.3g} > {c.allowed:.3g}" for c in judge(pattern, got, call) if not c.holds]
