"""Tiles are made once for the same tensors, and again as soon as anything that they depend on changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import flexsparse as fs
from flexsparse import pipeline
from flexsparse.analysis.tiles import classify

S = 300


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was classified; the cache starts empty."""
    calls: list[Any] = []

    def counted(mask: Any, *arguments: Any, **options: Any) -> Any:
        calls.append(mask)
        return classify(mask, *arguments, **options)

    monkeypatch.setattr("flexsparse.pipeline.classify", counted)
    pipeline.forget_tiles()
    return calls


def kinds(text: str, **captured: Any) -> torch.Tensor:
    return fs.block_mask(text, S, block_size=32, **captured).kv_num_blocks.clone()


def test_the_same_tensor_is_classified_once(made: list[Any]) -> None:
    doc = torch.arange(S) // 100
    first = kinds("document & causal", doc=doc)
    assert torch.equal(kinds("document & causal", doc=doc), first)
    assert len(made) == 1


def test_a_change_in_place_is_seen(made: list[Any]) -> None:
    doc = torch.arange(S) // 100
    before = kinds("document & causal", doc=doc)
    doc[150:] = 9
    after = kinds("document & causal", doc=doc)
    assert len(made) == 2
    assert not torch.equal(before, after)
    assert torch.equal(after, kinds("document & causal", doc=doc.clone()))


def test_new_tensors_never_pass_for_old_ones(made: list[Any]) -> None:
    """Memory that is freed and handed out again must not look like the tensor that it held."""
    for width in (50, 60, 70, 80, 90):
        doc = torch.arange(S) // width
        expected = fs.dense_mask("document", S, doc=doc)
        got = fs.block_mask("document", S, block_size=32, doc=doc).to_dense()[0, 0].bool()
        padded = torch.nn.functional.pad(expected[0, 0], (0, 20, 0, 20)).reshape(10, 32, 10, 32).any(3).any(1)
        assert torch.equal(got, padded)
        del doc
    assert len(made) == 5


def test_lengths_heads_and_numbers_are_part_of_the_key(made: list[Any]) -> None:
    for text in ("causal", "sliding_window(per_head([3, 40]))", "sliding_window(per_head([3, 200]))"):
        fs.block_mask(text, S, heads=2)
        fs.block_mask(text, S + 1, heads=2)
        fs.block_mask(text, S, heads=2)
    assert len(made) == 6


def test_selections_are_classified_at_every_call(made: list[Any]) -> None:
    scores = torch.randn(1, 1, S)
    kinds("sparsek(8)", scores=scores)
    kinds("sparsek(8)", scores=scores)
    assert len(made) == 2


def test_inference_tensors_are_not_kept(made: list[Any]) -> None:
    with torch.inference_mode():
        doc = torch.arange(S) // 100
        kinds("document", doc=doc)
        kinds("document", doc=doc)
    assert len(made) == 2


@pytest.mark.parametrize("text", ["causal", "document"])
def test_what_inference_left_behind_serves_training(made: list[Any], text: str) -> None:
    query = torch.randn(1, 1, S, 16, requires_grad=True)
    captured: dict[str, Any] = {"doc": torch.arange(S) // 100} if text == "document" else {}
    attention = fs.compile(text, backend="flex_eager")
    with torch.inference_mode():
        attention(query, query, query, **captured)
    attention(query, query, query, **captured).sum().backward()
    kept = fs.block_mask(text, S, **captured)
    assert not kept.kv_indices.is_inference()
    assert not kept.kv_num_blocks.is_inference()
    assert len(made) == 1
