"""The mass of attention that each key receives, against the oracle's dense probabilities."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import flexsparse as fs
from flexsparse.errors import BackendError, ShapeError
from flexsparse.ir.nodes import Constant
from flexsparse.runtime import chunked
from tests.helpers import assert_close, make_inputs, tensors_of
from tests.runtime.compositions import CAUSAL, COMPOSITIONS, P


def probabilities(pattern: Any, inputs: Any, **options: Any) -> Tensor:
    """[B, H, S_q, S_kv] of the oracle: what it returns for values that name their keys."""
    size = inputs.key.shape[2]
    names = torch.eye(size, dtype=torch.float64).expand(*inputs.key.shape[:2], size, size)
    captured = {name: tensor.detach() for name, tensor in inputs.captured.items()}
    out = fs.reference(pattern, inputs.query.detach(), inputs.key.detach(), names, **captured, **options)
    assert isinstance(out, Tensor)
    return out


def shows_its_softmax(name: str) -> bool:
    """A gate on V changes what comes out, and not the softmax: then the oracle's output is another."""
    return fs.compile(COMPOSITIONS[name]).ir.gate_v == Constant(1.0)


@pytest.mark.parametrize("name", [name for name in COMPOSITIONS if shows_its_softmax(name)])
def test_mass_is_the_sum_of_the_oracles_probabilities(name: str) -> None:
    pattern = COMPOSITIONS[name]
    inputs = make_inputs(tensors_of(pattern), size=40)
    mass = fs.compile(pattern).mass(inputs.query, inputs.key, **inputs.captured)
    assert mass.dtype is torch.float64
    assert not mass.requires_grad
    assert_close("mass", mass, probabilities(pattern, inputs).sum(2))


@pytest.mark.parametrize("gate", ["kv", "v"])
def test_a_gate_on_v_is_not_part_of_it(gate: str) -> None:
    """The softmax is that of the same selection with its gate on K alone, or with none."""
    gated, plain = P["sparsek"](9, gate=gate), P["sparsek"](9, gate={"kv": "k", "v": "none"}[gate])
    inputs = make_inputs(["scores"], size=40)
    mass = fs.compile(gated).mass(inputs.query, inputs.key, **inputs.captured)
    assert_close("mass", mass, probabilities(plain, inputs).sum(2))


def test_every_query_that_sees_a_key_adds_one() -> None:
    pattern: Any = CAUSAL & P["sparsek"](8, after=5)
    inputs = make_inputs(["scores"], size=40, heads=4, kv_heads=2)
    mass = fs.compile(pattern).mass(inputs.query.float(), inputs.key.float(), scores=inputs.captured["scores"].float())
    assert mass.shape == (2, 4, 40)
    assert mass.dtype is torch.float32
    assert mass.sum(-1) == pytest.approx(torch.full((2, 4), 35.0), rel=1e-5)


def test_small_chunks_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    pattern: Any = CAUSAL & (P["sliding_window"](9) | P["sinks"](2))
    inputs = make_inputs(size=70)
    whole = fs.compile(pattern).mass(inputs.query, inputs.key)
    monkeypatch.setattr(chunked, "_CHUNK_ELEMENTS", 500)
    assert_close("mass", fs.compile(pattern, block_size=16).mass(inputs.query, inputs.key), whole)


def test_scale_and_offset_count() -> None:
    inputs = make_inputs(size=40, q_len=11)
    mass = fs.compile(CAUSAL).mass(inputs.query, inputs.key, scale=0.7, q_offset=20)
    assert_close("mass", mass, probabilities(CAUSAL, inputs, scale=0.7, q_offset=20).sum(2))


def test_any_backend_has_it() -> None:
    """Also one that could not run the call: there is one way to compute it."""
    inputs = make_inputs(["scores"], size=40)
    attention = fs.compile(P["sparsek"](8), backend="gather")
    with pytest.raises(BackendError):
        attention.bind(q_len=40, head_dim=8, dtype=torch.float64)
    assert attention.mass(inputs.query, inputs.key, **inputs.captured).shape == (2, 4, 40)


def test_its_mistakes_are_those_of_a_call() -> None:
    inputs = make_inputs(["scores"], size=40)
    with pytest.raises(ShapeError, match=r"scores: got shape \(2, 2, 39\)"):
        fs.compile(P["sparsek"](8)).mass(inputs.query, inputs.key, scores=inputs.captured["scores"][..., 1:])
