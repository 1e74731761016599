"""Derivatives of expressions against torch's autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flexsparse.codegen.emitter import Emitter
from flexsparse.ir.derivative import derivative
from flexsparse.ir.nodes import Symbol
from flexsparse.language import (
    cos,
    exp,
    exp2,
    kv,
    log,
    log2,
    maximum,
    minimum,
    q,
    score,
    sigmoid,
    sqrt,
    tanh,
    where,
)

CASES: dict[str, Any] = {
    "identity": score,
    "sums and products": 3.0 - 2.0 * score * score + score * (q - kv),
    "quotients": (score + 1.0) / (2.0 + score * score),
    "softcap": 5.0 * tanh(score / 5.0),
    "exponentials": exp(-score) + exp2(score * 0.5) + sigmoid(score),
    "logarithms": log(3.0 + score) + log2(4.0 + score) + sqrt(5.0 + score),
    "a wave": cos(2.0 * score),
    "branches": where(kv < q, score * 2.0, abs(score)) + maximum(score, 0.3) - minimum(2.0 * score, 0.7),
    "no score": (q - kv) * 0.5,
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_what_autograd_finds(name: str) -> None:
    node = CASES[name].node
    at = torch.linspace(-2.5, 2.5, 41, dtype=torch.float64, requires_grad=True)
    place = {"q": torch.tensor(7), "kv": torch.arange(41) % 11, "b": torch.tensor(0), "h": torch.tensor(0)}

    def value(of: Any) -> Any:
        text = Emitter("score.dtype", None).emit(of)
        return eval(text, {"torch": torch, "score": at, **place}) + 0.0 * at

    (wanted,) = torch.autograd.grad(value(node).sum(), at)
    got = value(derivative(node, Symbol("score"))).detach()
    # Some fifty roundings of the largest derivative.
    assert float((got - wanted).abs().max()) <= 50 * 2.0**-53 * max(1.0, float(wanted.abs().max()))
