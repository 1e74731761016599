"""FlexAttention functions become patterns that mean the same; what cannot be traced still runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import flexsparse as fs
from flexsparse.dense import dense_mask
from flexsparse.errors import CapturedError, DeviceError, ExpressionError
from flexsparse.ir.nodes import Opaque, walk

LENGTH = 90
DOC = torch.arange(LENGTH).div(25, rounding_mode="floor").repeat(2, 1)
OFFSET = torch.tensor(5)


def by_elements(function: Callable[..., Any], batch: int = 2, heads: int = 2) -> Tensor:
    """The function at every index, one element at a time, as FlexAttention defines it."""
    indices = (range(batch), range(heads), range(LENGTH), range(LENGTH))
    grid = torch.cartesian_prod(*(torch.tensor(list(r)) for r in indices))
    return torch.stack([function(*row) for row in grid[::7]]), grid[::7]  # type: ignore[return-value]


def causal_documents(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
    return (q >= kv) & (DOC[b, q] == DOC[b, kv])


def branches(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
    near = q - kv < 20
    return torch.where(near, q >= kv, (q // 4) % 3 == (kv // 4) % 3) ^ (torch.abs(q - kv) > 70)


def casts(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
    half = (q.float() * 0.5).to(torch.int64)
    return torch.logical_and(kv <= half, torch.logical_not(kv == OFFSET)) | (h.bool() & (kv < 3))


def arithmetic(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
    shifted = torch.div(q - kv, 3, rounding_mode="trunc") + torch.fmod(kv - q, 4) - torch.remainder(kv - q, 4)
    return (torch.clamp(shifted, -3, 5) < 2) & (torch.minimum(q, kv) >= 1) & (torch.maximum(q, kv) < 80)


@pytest.mark.parametrize("function", [causal_documents, branches, casts, arithmetic], ids=lambda f: f.__name__)
def test_masks_mean_the_same_element_by_element(function: Callable[..., Tensor]) -> None:
    pattern = fs.from_flex(mask_mod=function)
    assert not any(isinstance(n, Opaque) for n in walk(pattern.node))
    expected, grid = by_elements(function)
    got = dense_mask(pattern, LENGTH, batch=2, heads=2)
    assert torch.equal(got[tuple(grid.T)], expected)


def test_scores_and_gradients_of_closures_match_the_function() -> None:
    slopes = torch.tensor([0.1, -0.2], requires_grad=True)

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        capped = torch.tanh(score / 30.0) * 30.0
        return capped + slopes[h] * (kv - q) + torch.where(q - kv > 3, 0.25, -0.5)

    pattern = fs.from_flex(mask_mod=causal_documents, score_mod=score_mod)
    query, key, value = (torch.randn(2, 2, LENGTH, 8, dtype=torch.float64) for _ in range(3))
    out = fs.compile(pattern, backend="chunked")(query, key, value)
    (got,) = torch.autograd.grad(out.square().sum(), slopes)

    h, q, kv = torch.arange(2)[:, None, None], torch.arange(LENGTH)[:, None], torch.arange(LENGTH)
    scores = query @ key.mT / 8**0.5
    scores = torch.tanh(scores / 30) * 30 + slopes.double()[h] * (kv - q) + torch.where(q - kv > 3, 0.25, -0.5)
    hidden = ~((q >= kv) & (DOC[:, None, :, None] == DOC[:, None, None, :]))
    expected = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ value
    (wanted,) = torch.autograd.grad(expected.square().sum(), slopes)
    # slopes are float32, so their products are rounded once; everything else is float64.
    assert (out - expected).abs().max() < 1e-5
    assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_a_call_may_give_other_values_for_closed_over_tensors() -> None:
    pattern = fs.from_flex(mask_mod=causal_documents)
    attention = fs.compile(pattern, backend="chunked")
    query = torch.randn(1, 1, 40, 8, dtype=torch.float64)
    one_document = torch.zeros(1, 40, dtype=torch.long)
    got = attention(query, query, query, DOC=one_document)
    assert torch.equal(got, fs.compile("causal", backend="chunked")(query, query, query))


def test_two_tensors_of_one_name_are_refused() -> None:
    def make(doc: Tensor) -> Callable[..., Tensor]:
        return lambda b, h, q, kv: doc[b, q] == doc[b, kv]

    both = fs.from_flex(make(DOC)) & fs.from_flex(make(DOC + 1))
    query = torch.randn(2, 1, LENGTH, 8)
    with pytest.raises(CapturedError, match="doc: got two different tensors that traced functions call by this name"):
        fs.compile(both, backend="chunked")(query, query, query)


def strange(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
    return ((q ^ kv) < 40) & (q >= kv)


def test_what_cannot_be_traced_runs_as_it_is_and_says_why() -> None:
    pattern = fs.from_flex(mask_mod=strange) & fs.parse("sliding_window(30)")
    query = torch.randn(1, 2, LENGTH, 8, dtype=torch.float64)
    q, kv = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)
    hidden = ~(((q ^ kv) < 40) & (q >= kv) & (q - kv < 30))
    expected = (query @ query.mT / 8**0.5).masked_fill(hidden, -torch.inf).softmax(-1) @ query
    for backend in ("chunked", "flex_eager", "reference"):
        attention = fs.compile(pattern, backend=backend)
        assert (attention(query, query, query) - expected).abs().max() < 1e-12, backend
    explained = str(fs.compile(pattern, backend="chunked").explain(q_len=64, head_dim=8))
    assert "strange could not be traced (bitwise_xor of integers)" in explained


def test_tiles_of_an_opaque_mask_are_sound() -> None:
    kinds = fs.block_mask(fs.from_flex(mask_mod=strange), LENGTH, block_size=16).to_dense()[0, 0].bool()
    q, kv = torch.arange(96)[:, None], torch.arange(96)
    seen = ((q ^ kv) < 40) & (q >= kv) & (q < LENGTH) & (kv < LENGTH)
    tiles = seen.reshape(6, 16, 6, 16).any(3).any(1)
    assert bool((kinds | ~tiles).all())


BAD: list[tuple[Callable[..., Any], str]] = [
    (
        lambda b, h, q, kv: q >= kv if q > 2 else q < kv,
        "got a function that branches on its arguments or calls .item()",
    ),
    (lambda b, h, q, kv: kv < q.item(), "got a function that branches on its arguments or calls .item()"),
    (lambda b, h, q, kv: q * 1.0, "got floats, expected booleans. Return a comparison"),
    (lambda b, h, q, kv: q - kv, "got integers, expected booleans"),
]


@pytest.mark.parametrize(("function", "text"), BAD, ids=["branch", "item", "floats", "integers"])
def test_mistakes_in_a_mask_are_named(function: Callable[..., Any], text: str) -> None:
    with pytest.raises(ExpressionError) as caught:
        fs.from_flex(mask_mod=function)
    assert text in str(caught.value)


def test_nothing_given() -> None:
    with pytest.raises(ExpressionError, match="from_flex: got neither mask_mod nor score_mod"):
        fs.from_flex()


def test_a_tensor_on_another_device_is_named() -> None:
    elsewhere = DOC.to("meta")
    query = torch.randn(2, 1, LENGTH, 8)
    attention = fs.compile(fs.from_flex(causal_documents), backend="chunked")
    with pytest.raises(DeviceError, match="DOC: got meta, expected query's device, cpu"):
        attention(query, query, query, DOC=elsewhere)


def test_to_flex_gives_functions_for_plain_flex_attention() -> None:
    pattern = fs.parse("(document & causal) + alibi")
    assert isinstance(pattern, fs.language.Pattern)
    mask_mod, score_mod = pattern.to_flex(heads=4, q_len=LENGTH, doc=DOC)
    q, kv = torch.tensor(40), torch.tensor(39)
    zero = torch.tensor(0)
    assert bool(mask_mod(zero, zero, q, kv))
    assert not bool(mask_mod(zero, zero, q, torch.tensor(3)))
    # Head 0 of 4 has slope 2^-2.
    assert float(score_mod(torch.tensor(1.0), zero, zero, q, kv)) == 0.75
    selection = fs.parse("sparsek(4)")
    assert isinstance(selection, fs.language.Pattern)
    with pytest.raises(ExpressionError, match="got a pattern with a selection"):
        selection.to_flex()
    blocks = fs.parse("moba(16, 2)")
    assert isinstance(blocks, fs.language.Pattern)
    with pytest.raises(ExpressionError) as refused:
        blocks.to_flex()
    assert str(refused.value) == (
        "to_flex(moba(16, 2)): got a selection that depends on query and key, expected functions of indices and of "
        "tensors that are known. Use flexsparse.compile, which chooses the blocks at each call."
    )
    sunk = fs.parse("causal.sink(0)")
    assert isinstance(sunk, fs.language.Pattern)
    with pytest.raises(ExpressionError) as caught:
        sunk.to_flex()
    assert str(caught.value) == (
        "to_flex(causal().sink(0)): got a pattern with a sink, expected masks and scores alone: FlexAttention's "
        "functions give every term of the softmax a key. Use flexsparse.compile, or apply out * sigmoid(lse - sink) "
        "to what flex_attention returns."
    )
