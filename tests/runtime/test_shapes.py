"""Shapes that kernels get wrong: every GQA ratio, odd dimensions, offsets, strides, empty rows, one token."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import flexsparse as fs
from flexsparse.errors import GradientError
from tests.helpers import (
    Inputs,
    assert_close,
    assert_same_result,
    make_inputs,
    oracle,
    run,
    tensors_of,
    torchs_own_warnings,
)

HYBRID: Any = fs.parse("causal & (sliding_window(5) | sinks(2) | sparsek(4, after=5)) + alibi")
BACKENDS = ["chunked", "flex_eager"]


def agree(pattern: Any, inputs: Inputs, backend: str = "chunked", **options: Any) -> None:
    got = run(fs.compile(pattern, backend=backend, block_size=16), inputs, **options)
    assert_same_result(got, run(oracle(pattern), inputs, **options))


@pytest.mark.parametrize("ratio", [1, 2, 4, 8])
@pytest.mark.parametrize("score_heads", ["one", "kv", "all"])
def test_every_gqa_ratio_and_every_shape_of_scores(ratio: int, score_heads: str) -> None:
    kv_heads = 8 // ratio
    number = {"one": 1, "kv": kv_heads, "all": 8}[score_heads]
    inputs = make_inputs(["scores"], size=37, heads=8, kv_heads=kv_heads, score_heads=number)
    assert inputs.captured["scores"].shape == (2, number, 37)
    agree(HYBRID, inputs)


@pytest.mark.parametrize(("head_dim", "value_dim"), [(1, 1), (7, 7), (8, 3), (3, 16), (33, 65)])
def test_odd_and_different_dimensions(head_dim: int, value_dim: int) -> None:
    inputs = make_inputs(["scores"], size=21, head_dim=head_dim, value_dim=value_dim)
    assert fs.compile(HYBRID, backend="chunked")(inputs.query, inputs.key, inputs.value, **inputs.captured).shape == (
        2,
        4,
        21,
        value_dim,
    )
    agree(HYBRID, inputs)


@pytest.mark.parametrize(("q_len", "offset"), [(1, 36), (5, 0), (5, 32), (37, 0), (20, 17), (17, 3)])
def test_queries_start_at_their_offset(q_len: int, offset: int) -> None:
    agree(HYBRID, make_inputs(["scores"], size=37, q_len=q_len), q_offset=offset)


def test_a_decoding_step_equals_the_last_row_of_the_whole() -> None:
    inputs = make_inputs(["scores"], size=37)
    attention = fs.compile(HYBRID, backend="chunked")
    whole = attention(inputs.query, inputs.key, inputs.value, **inputs.captured)
    step = attention(inputs.query[:, :, -1:], inputs.key, inputs.value, q_offset=36, **inputs.captured)
    assert_close("step", step.detach(), whole[:, :, -1:].detach())


@pytest.mark.parametrize(("q_len", "size"), [(5, 40), (40, 5), (1, 1)])
def test_cross_attention_lengths(q_len: int, size: int) -> None:
    agree(fs.parse("full & ~(kv == 3)"), make_inputs(size=size, q_len=q_len))


@pytest.mark.parametrize("scale", [0.25, 1.0, 3, 0.0, -0.5])
def test_custom_scale(scale: float) -> None:
    agree(HYBRID, make_inputs(["scores"], size=21), scale=scale)


def strided(inputs: Inputs) -> Inputs:
    """The same values under other strides: transposed, sliced from wider tensors, every second element."""

    def layout(x: Tensor) -> Tensor:
        wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), torch.nan, dtype=x.dtype)
        wide[..., ::2] = x.detach()
        return wide[..., ::2].transpose(0, -1).contiguous().transpose(0, -1).requires_grad_(x.requires_grad)

    captured = {name: layout(t) if t.is_floating_point() else t for name, t in inputs.captured.items()}
    return Inputs(layout(inputs.query), layout(inputs.key), layout(inputs.value), captured)


@pytest.mark.parametrize("backend", BACKENDS)
@torchs_own_warnings
def test_strides_do_not_matter(backend: str) -> None:
    inputs = make_inputs(["scores"], size=21, head_dim=16)
    other = strided(inputs)
    assert not other.query.is_contiguous()
    attention = fs.compile(HYBRID, backend=backend)
    assert_same_result(run(attention, other), run(oracle(HYBRID), inputs))


def test_sequence_first_tensors_as_models_hold_them() -> None:
    inputs = make_inputs(["scores"], size=21)
    held = [x.detach().transpose(1, 2).contiguous() for x in (inputs.query, inputs.key, inputs.value)]
    captured = {"scores": inputs.captured["scores"].detach()}
    out = fs.compile(HYBRID, backend="chunked")(*(x.transpose(1, 2) for x in held), **captured)
    wanted = oracle(HYBRID)(inputs.query, inputs.key, inputs.value, **inputs.captured)
    assert_close("out", out, wanted.detach())


EMPTY = [
    "sinks(3) & (q > 4)",
    "causal & (kv > 3)",
    "sparsek(4, after=6)",
    "sparsek(4, after=100)",
    "full & False",
    "sparsek(3, after=6, gate='logit') & (q % 2 == 0)",
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("text", EMPTY)
@torchs_own_warnings
def test_rows_that_see_no_key(text: str, backend: str) -> None:
    pattern: Any = fs.parse(text)
    inputs = make_inputs(tensors_of(pattern), size=21, head_dim=16)
    got = run(fs.compile(pattern, backend=backend, block_size=16), inputs)
    empty = ~fs.dense_mask(pattern, 21, batch=2, heads=4, **inputs.captured).any(-1)
    assert empty.any()
    assert (got.out[empty] == 0).all()
    assert (got.lse[empty] == -torch.inf).all()
    query_gradient = got.gradients["query"]
    assert query_gradient is None or (query_gradient[empty] == 0).all()
    assert_same_result(got, run(oracle(pattern), inputs))


def test_keys_of_minus_infinite_score_are_never_seen() -> None:
    inputs = make_inputs(["scores"], size=21)
    scores = inputs.captured["scores"].detach().clone()
    scores[..., 5:9] = -torch.inf
    scores[0, 0, 11] = torch.inf
    inputs = replace(inputs, captured={"scores": scores.requires_grad_()})
    for gate in ("kv", "v", "logit", "ste"):
        agree(fs.parse(f"sparsek(3, gate='{gate}')"), inputs)
        agree(fs.parse(f"sparsek(100, gate='{gate}')"), inputs)


def test_gate_none_gives_the_scores_no_gradient() -> None:
    inputs = make_inputs(["scores"], size=21)
    got = run(fs.compile("sparsek(3, gate='none')", backend="chunked"), inputs)
    gradient = got.gradients["scores"]
    assert gradient is None or not gradient.any()
    assert run(fs.compile("sparsek(3)", backend="chunked"), inputs).gradients["scores"] is not None


def test_ids_broadcast_over_the_batch() -> None:
    inputs = make_inputs(["doc"], size=21)
    ids = inputs.captured["doc"][:1]
    for given in (ids, ids[0]):
        agree(fs.parse("document & causal"), replace(inputs, captured={"doc": given}))


@pytest.mark.parametrize("backend", BACKENDS)
@torchs_own_warnings
def test_two_runs_give_the_same_bits(backend: str) -> None:
    pattern: Any = fs.parse("causal & (sliding_window(5) | sparsek(4, after=5)) + relative_bias(16)")
    inputs = make_inputs(["scores", "bias"], size=60, head_dim=16).to(torch.float32)
    attention = fs.compile(pattern, backend=backend)
    first, second = run(attention, inputs), run(attention, inputs)
    assert torch.equal(first.out, second.out)
    assert torch.equal(first.lse, second.lse)
    for name, gradient in first.gradients.items():
        other = second.gradients[name]
        assert gradient is not None
        assert other is not None
        assert torch.equal(gradient, other), name


@torchs_own_warnings
def test_head_counts_may_change_between_calls() -> None:
    # alibi closes over a number that depends on the head count; dynamo must not make it symbolic.
    pattern: Any = fs.parse("causal + alibi")
    for heads in (4, 8, 2):
        agree(pattern, make_inputs(size=9, heads=heads, head_dim=16), "flex_eager")


def test_the_block_size_changes_no_result() -> None:
    inputs = make_inputs(["scores"], size=150)
    wanted = run(oracle(HYBRID), inputs)
    for block in (16, 48, 128, 256):
        assert_same_result(run(fs.compile(HYBRID, backend="chunked", block_size=block), inputs), wanted)


def test_small_chunks_change_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexsparse.runtime.chunked._CHUNK_ELEMENTS", 64)
    agree(HYBRID, make_inputs(["scores"], size=70))


@pytest.mark.usefixtures("poisoned_memory")
def test_uninitialised_memory_is_never_read() -> None:
    agree(HYBRID, make_inputs(["scores"], size=50))


@pytest.mark.parametrize("wanted", ["query", "key", "value", "scores", "bias"])
def test_a_gradient_is_right_when_it_is_the_only_one(wanted: str) -> None:
    pattern: Any = HYBRID + fs.parse("relative_bias(16)")
    full = make_inputs(["scores", "bias"], size=21)

    def only(name: str, x: Tensor) -> Tensor:
        return x.detach().requires_grad_(name == wanted)

    inputs = Inputs(
        only("query", full.query),
        only("key", full.key),
        only("value", full.value),
        {name: only(name, x) for name, x in full.captured.items()},
    )
    agree(pattern, inputs)


def test_nothing_is_recorded_without_gradients() -> None:
    inputs = make_inputs(["scores"], size=21)
    with torch.no_grad():
        out = fs.compile(HYBRID, backend="chunked")(inputs.query, inputs.key, inputs.value, **inputs.captured)
    assert not out.requires_grad


def test_second_derivative_is_refused() -> None:
    inputs = make_inputs(size=5)
    out = fs.compile("causal", backend="chunked")(inputs.query, inputs.key, inputs.value)
    (first,) = torch.autograd.grad((out**2).sum(), inputs.query, create_graph=True)
    with pytest.raises(GradientError, match="attention: got a second derivative, expected first derivatives only"):
        first.sum().backward()
    # And where it is a part of what is asked for.
    out = fs.compile("causal", backend="chunked")(inputs.query, inputs.key, inputs.value)
    (first,) = torch.autograd.grad(out.sin().sum(), inputs.query, create_graph=True)
    with pytest.raises(GradientError, match="second derivative"):
        torch.autograd.grad(out.sum() + first.square().sum(), inputs.query)
