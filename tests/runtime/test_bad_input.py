"""What a call refuses: the class of the error and its whole text."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import flexsparse as fs
from flexsparse.errors import CapturedError, DeviceError, DtypeError, NonFiniteScoresError, SegmentError, ShapeError
from flexsparse.language import b, captured, h, kv, per_head, q

B, H, KV, S, D = 2, 4, 2, 12, 8
FLOATS = "float16, bfloat16, float32 or float64"


def operands(**change: Any) -> dict[str, Any]:
    made: dict[str, Any] = {
        "query": torch.zeros(B, H, S, D),
        "key": torch.zeros(B, KV, S, D),
        "value": torch.zeros(B, KV, S, D),
    }
    return {**made, **change}


def message_of(pattern: Any, error: type[Exception], **given: Any) -> str:
    with pytest.raises(error) as caught:
        fs.compile(pattern, backend="chunked")(**operands(**given))
    return str(caught.value)


def zeros(*shape: int, **options: Any) -> Tensor:
    return torch.zeros(*shape, **options)


OPERANDS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"query": [1.0]}, ShapeError, "query: got list, expected a tensor [B, H, S, D]."),
    (
        {"query": zeros(H, S, D)},
        ShapeError,
        "query: got shape (4, 12, 8), expected four dimensions [B, H, S, D]. "
        "Add the missing dimensions, such as query[None].",
    ),
    (
        {"value": zeros(1, B, KV, S, D)},
        ShapeError,
        "value: got shape (1, 2, 2, 12, 8), expected four dimensions [B, H, S, D].",
    ),
    ({"query": zeros(B, H, S, D, dtype=torch.long)}, DtypeError, f"query: got torch.int64, expected {FLOATS}."),
    (
        {"key": zeros(B, KV, S, D, dtype=torch.bfloat16)},
        DtypeError,
        "key: got torch.bfloat16, expected query's dtype, torch.float32. "
        "Convert with .to(query.dtype), or run the projections under one autocast.",
    ),
    (
        {"key": zeros(B, KV, S, D, device="meta")},
        DeviceError,
        "key: got meta, expected query's device, cpu. Move it with .to(...).",
    ),
    ({"query": zeros(B, H, 0, D)}, ShapeError, "query: got shape (2, 4, 0, 8), expected no dimension of size 0."),
    ({"key": zeros(B, KV, 0, D)}, ShapeError, "key: got shape (2, 2, 0, 8), expected no dimension of size 0."),
    (
        {"key": zeros(1, KV, S, D)},
        ShapeError,
        "key, value: got key batch 1, value batch 2, expected query's batch, 2. Expand them to query's batch.",
    ),
    (
        {"value": zeros(B, KV, S + 1, D)},
        ShapeError,
        "value: got shape (2, 2, 13, 8), expected [B, H_kv, S_kv] of key, (2, 2, 12).",
    ),
    ({"key": zeros(B, KV, S, D + 1)}, ShapeError, "key: got head_dim 9, expected query's head_dim, 8."),
    (
        {"key": zeros(B, 3, S, D), "value": zeros(B, 3, S, D)},
        ShapeError,
        "key: got 3 KV heads for 4 query heads, expected a number of KV heads that divides the number of query heads. "
        "Use one of [1, 2, 4].",
    ),
    ({"q_offset": -1}, ShapeError, "q_offset: got -1, expected an integer of at least 0, the position of query 0."),
    ({"q_offset": 1.5}, ShapeError, "q_offset: got 1.5, expected an integer of at least 0, the position of query 0."),
    (
        {"scale": math.nan},
        ShapeError,
        "scale: got nan, expected a finite int or float, or None for 1 / sqrt(head_dim).",
    ),
    ({"scale": "1"}, ShapeError, "scale: got '1', expected a finite int or float, or None for 1 / sqrt(head_dim)."),
    (
        {"doc": zeros(B, S, dtype=torch.long)},
        CapturedError,
        "doc: got a tensor that the pattern does not use, expected no captured tensors. The pattern takes no tensors.",
    ),
]


@pytest.mark.parametrize(
    ("change", "error", "message"), OPERANDS, ids=[m.split(", expected")[0] for _, _, m in OPERANDS]
)
def test_operands(change: dict[str, Any], error: type[Exception], message: str) -> None:
    assert message_of("causal", error, **change) == message


LONG = torch.long
CAPTURED: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("document", {}, CapturedError, "doc: got nothing, expected a tensor (dims ('b', 's')). Pass doc=... to the call."),
    (
        "sparsek(3)",
        {},
        CapturedError,
        "scores: got nothing, expected a tensor (the scores of its selection). Pass scores=... to the call.",
    ),
    (
        "document",
        {"docs": zeros(B, S, dtype=LONG)},
        CapturedError,
        "docs: got a tensor that the pattern does not use, expected only doc. Did you mean 'doc'?",
    ),
    ("document", {"doc": [0] * S}, CapturedError, "doc: got list, expected a tensor."),
    ("document", {"doc": zeros(B, S)}, DtypeError, "doc: got torch.float32, expected integers."),
    ("document", {"doc": zeros(B, S, dtype=torch.bool)}, DtypeError, "doc: got torch.bool, expected integers."),
    (
        "causal + relative_bias(3)",
        {"bias": zeros(H, 7, dtype=LONG)},
        DtypeError,
        "bias: got torch.int64, expected floating point.",
    ),
    (
        "document",
        {"doc": zeros(B, S, dtype=LONG, device="meta")},
        DeviceError,
        "doc: got meta, expected query's device, cpu. Move it with .to(...).",
    ),
    (
        "sparsek(3)",
        {"scores": zeros(B, KV, S, device="meta")},
        DeviceError,
        "scores: got meta, expected query's device, cpu. Move it with .to(...).",
    ),
    (
        "document",
        {"doc": zeros(B, S + 1, dtype=LONG)},
        ShapeError,
        "doc: got size 13 in dimension 1 of shape (2, 13), expected 12, the key length.",
    ),
    (
        "document",
        {"doc": zeros(3, S, dtype=LONG)},
        ShapeError,
        "doc: got size 3 in dimension 0 of shape (3, 12), expected 2, the batch size.",
    ),
    (
        "document",
        {"doc": zeros(1, B, S, dtype=LONG)},
        ShapeError,
        "doc: got shape (1, 2, 12), expected dimensions ['b', 's'].",
    ),
    (
        "causal + relative_bias(3)",
        {"bias": zeros(KV, 7)},
        ShapeError,
        "bias: got size 2 in dimension 0 of shape (2, 7), expected 4, the number of query heads.",
    ),
    (
        "causal + relative_bias(3)",
        {"bias": zeros(H, 6)},
        CapturedError,
        "bias[h, minimum(maximum(q - kv, -3), 3) + 3] in the score: got an index from 0 to 6 in dimension 1 of size 6, "
        "expected indices from 0 to 5 for every query and key, hidden ones included. "
        "Clamp it: minimum(maximum(minimum(maximum(q - kv, -3), 3) + 3, 0), 5).",
    ),
    (
        "sparsek(3)",
        {"scores": zeros(B, KV, S, dtype=LONG)},
        DtypeError,
        "scores: got torch.int64, expected floating point; float32 is best at any length.",
    ),
    (
        "sparsek(3)",
        {"scores": zeros(B, 3, S)},
        ShapeError,
        "scores: got shape (2, 3, 12), expected [2, 1, 12] or [2, 2, 12] or [2, 4, 12].",
    ),
    (
        "sparsek(3)",
        {"scores": zeros(1, KV, S)},
        ShapeError,
        "scores: got shape (1, 2, 12), expected [2, 1, 12] or [2, 2, 12] or [2, 4, 12].",
    ),
    (
        "sparsek(3)",
        {"scores": zeros(B, KV, S, 1)},
        ShapeError,
        "scores: got shape (2, 2, 12, 1), expected [2, 1, 12] or [2, 2, 12] or [2, 4, 12]. "
        "Scores are one number a key: [B, heads, S]; squeeze a last dimension of 1.",
    ),
    (
        "sparsek(3)",
        {"scores": zeros(B, KV, S), "q_offset": 1},
        ShapeError,
        "query: got positions up to 12 with 12 keys, expected query positions below the key length, as the pattern "
        "selects from a causal prefix. Pass the keys and scores of every position up to the last query.",
    ),
    (
        "moba(4, 1)",
        {"q_offset": 1},
        ShapeError,
        "query: got positions up to 12 with 12 keys, expected query positions below the key length, as the pattern "
        "selects from a causal prefix. Pass the keys and scores of every position up to the last query.",
    ),
    (
        "document(cu_seqlens='ends')",
        {"ends": torch.tensor([0, 5, 11])},
        ShapeError,
        "ends: got [0, 5, 11], expected non-decreasing numbers from 0 to the key length, 12. "
        "Start with 0 and end with the total length of the packed sequence.",
    ),
    (
        "document(cu_seqlens='ends')",
        {"ends": torch.tensor([0, 8, 5, 12])},
        ShapeError,
        "ends: got [0, 8, 5, 12], expected non-decreasing numbers from 0 to the key length, 12. "
        "Start with 0 and end with the total length of the packed sequence.",
    ),
    (
        "document(cu_seqlens='ends')",
        {"ends": torch.tensor([1, 12])},
        ShapeError,
        "ends: got [1, 12], expected non-decreasing numbers from 0 to the key length, 12. "
        "Start with 0 and end with the total length of the packed sequence.",
    ),
    (
        "document(cu_seqlens='ends')",
        {"ends": torch.tensor([0])},
        ShapeError,
        "ends: got shape (1,), expected [N + 1] cumulative lengths, N >= 1.",
    ),
    (
        "document(cu_seqlens='ends')",
        {"ends": zeros(2, dtype=torch.float32)},
        DtypeError,
        "ends: got torch.float32, expected integers.",
    ),
    (
        "sparsek(3, segments='doc')",
        {"scores": zeros(B, KV, S), "doc": torch.arange(S).flip(0)},
        SegmentError,
        "doc: got ids that fall at position [0, 1], expected non-decreasing ids along the sequence. "
        "Number the documents in the order in which they are packed.",
    ),
]


@pytest.mark.parametrize(
    ("pattern", "given", "error", "message"),
    CAPTURED,
    ids=[f"{p}-{m.split(', expected')[0]}" for p, _, _, m in CAPTURED],
)
def test_captured_tensors(pattern: str, given: dict[str, Any], error: type[Exception], message: str) -> None:
    assert message_of(pattern, error, **given) == message


def test_nan_scores_name_their_position() -> None:
    scores = zeros(B, KV, S)
    scores[1, 0, 7] = math.nan
    assert message_of("sparsek(3)", NonFiniteScoresError, scores=scores) == (
        "scores: got NaN at (1, 0, 7) and 0 more, expected numbers; -inf excludes a key. "
        "Find where the scorer diverged, or mask padding with -inf."
    )


def test_nan_scores_without_validation_poison_the_later_queries_of_their_row_alone() -> None:
    scores = torch.randn(B, KV, S)
    scores[1, 0, 7] = math.nan
    random: dict[str, Any] = {name: torch.randn_like(x) for name, x in operands().items()}
    out = fs.compile("sparsek(3, after=2)", backend="chunked")(**random, scores=scores, validate=False)
    poisoned = torch.isnan(out).any(-1)
    # Two query heads share the scores of a KV head. Thresholds are NaN from the position on, whatever `after` is.
    expected = torch.zeros(B, H, S, dtype=torch.bool)
    expected[1, :2, 7:] = True
    assert torch.equal(poisoned, expected)


def test_a_gradient_needs_a_learnable_declaration() -> None:
    weight: Any = captured("weight", dims=("h",), dtype="float")
    pattern = fs.parse("causal") + weight[h]
    assert message_of(pattern, CapturedError, weight=zeros(H).requires_grad_()) == (
        "weight: got a tensor that requires a gradient, expected one that does not, as the pattern declares it "
        "without learnable=True. Declare captured('weight', ..., learnable=True), or pass weight.detach()."
    )


def test_free_dimensions_agree_within_a_call() -> None:
    first, second = (captured(name, dims=("s", "rank"), dtype="float") for name in ("first", "second"))
    pattern = fs.parse("causal") + (first[kv, 0] + second[q, 0])
    assert message_of(pattern, ShapeError, first=zeros(S, 3), second=zeros(S, 2)) == (
        "second: got size 2 for 'rank', expected 3, as in first."
    )


def test_per_head_entries_divide_the_heads() -> None:
    expected = "a number of entries that divides the number of query heads"
    for pattern in (fs.parse("causal") + per_head([1, 2, 3]), fs.parse("sliding_window(per_head([1, 2, 3]))")):
        assert message_of(pattern, CapturedError) == f"per_head: got 3 entries for 4 query heads, expected {expected}."


def test_per_head_patterns_divide_the_heads_as_well() -> None:
    pattern = fs.parse("per_head([causal, sinks(2), sinks(3)])")
    assert message_of(pattern, CapturedError).startswith("per_head: got 3 entries for 4 query heads")


def test_an_index_outside_its_tensor_is_refused_even_where_the_mask_hides_it() -> None:
    doc: Any = captured("doc", dims=("b", "s"))
    pattern = (kv < q) & (doc[b, q - 1] == doc[b, kv])
    assert message_of(pattern, CapturedError, doc=zeros(B, S, dtype=LONG)) == (
        "doc[b, q - 1] in the mask: got an index from -1 to 10 in dimension 1 of size 12, "
        "expected indices from 0 to 11 for every query and key, hidden ones included. "
        "Clamp it: minimum(maximum(q - 1, 0), 11)."
    )


def test_a_tensor_given_as_none_counts_as_not_given() -> None:
    assert message_of("document", CapturedError, doc=None).startswith("doc: got nothing")
    fs.compile("causal", backend="chunked")(**operands(doc=None))


def test_a_tensor_that_simplification_made_idle_may_still_be_given() -> None:
    # Whoever reads the pattern passes what it names; what the compiler makes of it is not the caller's concern.
    out = fs.compile("document | full", backend="chunked")(**operands(doc=zeros(B, S, dtype=LONG)))
    assert out.shape == (B, H, S, D)


@pytest.mark.parametrize("backend", ["auto", "chunked", "flex", "flex_eager"])
def test_a_device_that_holds_no_values_is_refused_in_words(backend: str) -> None:
    given = {name: x.to("meta") for name, x in operands().items()}
    with pytest.raises(DeviceError):
        fs.compile("causal", backend=backend)(**given)


def test_a_row_without_its_batch_dimension_is_named_as_it_came() -> None:
    query = torch.randn(1, 1, 12, 8)
    with pytest.raises(ShapeError) as caught:
        fs.compile("document", backend="chunked")(query, query, query, doc=torch.arange(5))
    assert str(caught.value) == "doc: got size 5 in dimension 0 of shape (5,), expected 12, the key length."
