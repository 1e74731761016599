"""Every mask of the catalogue against its witness: the oracle, the generated function and the tiles."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import flexsparse as fs
from flexsparse.patterns import catalogue
from tests.helpers import (
    assert_tiles_sound,
    bound_and_functions,
    generated_mask,
    make_captured,
    plain_shapes,
    tensors_of,
)
from tests.patterns.witnesses import MASKS, SCORES, World

BATCH, HEADS = 2, 2
EXAMPLES = [(name, dict(e)) for name, p in catalogue().items() if name in MASKS for e in p.examples]


def witness_mask(name: str, arguments: dict[str, Any], size: int, tensors: dict[str, Tensor]) -> Tensor:
    world = World(size, HEADS, {key: tensor.tolist() for key, tensor in tensors.items()})
    predicate = MASKS[name]
    rows = [
        [
            [[predicate(world, b, h, q, kv, **arguments) for kv in range(size)] for q in range(size)]
            for h in range(HEADS)
        ]
        for b in range(BATCH)
    ]
    return torch.tensor(rows)


@pytest.mark.parametrize("size", [1, 17, 129, 200])
@pytest.mark.parametrize(("name", "arguments"), EXAMPLES, ids=[f"{n}-{a}" for n, a in EXAMPLES])
def test_mask_is_what_its_witness_says(name: str, arguments: dict[str, Any], size: int) -> None:
    pattern = catalogue()[name](**arguments)
    generator = torch.Generator().manual_seed(size)
    captured = make_captured(
        tensors_of(pattern), batch=BATCH, heads=HEADS, size=size, score_heads=HEADS, generator=generator
    )
    query = torch.randn(BATCH, HEADS, size, 3, generator=generator, dtype=torch.float64)
    key = torch.randn(BATCH, 1, size, 3, generator=generator, dtype=torch.float64)
    wanted = witness_mask(name, arguments, size, {**captured, "query": query, "key": key})
    seen = fs.dense_mask(pattern, size, batch=BATCH, heads=HEADS, query=query, key=key, **captured)
    assert torch.equal(seen, wanted)
    shapes = plain_shapes(size, batch=BATCH, heads=HEADS, kv_heads=HEADS)
    bound, functions = bound_and_functions(pattern, shapes, captured, operands=(query, key))
    assert torch.equal(generated_mask(functions, shapes), wanted)
    assert_tiles_sound(bound.tiles.kinds, bound.tiles.block, wanted)


def test_every_pattern_has_one_witness() -> None:
    assert sorted([*MASKS, *SCORES]) == sorted(catalogue())


@pytest.mark.parametrize("name", sorted(catalogue()))
def test_every_pattern_declares_examples_and_a_summary(name: str) -> None:
    pattern = catalogue()[name]
    assert pattern.examples
    assert pattern.name == name
    assert len(pattern.summary) > 20


def keys_seen(pattern: Any, q: int, size: int = 12, **options: Any) -> list[int]:
    """The keys that one query sees, by number."""
    mask = fs.dense_mask(pattern, size, **options)
    _, functions = bound_and_functions(pattern, plain_shapes(size), options)
    assert torch.equal(generated_mask(functions, plain_shapes(size)), mask)
    return [int(n) for n in mask[0, 0, q].nonzero().flatten()]


BOUNDS: list[tuple[str, int, list[int]]] = [
    # causal: the diagonal is included.
    ("causal()", 0, [0]),
    ("causal()", 3, [0, 1, 2, 3]),
    # A window counts the query itself: window=1 is the diagonal, window=3 ends two keys back.
    ("sliding_window(1)", 5, [5]),
    ("sliding_window(3)", 5, [3, 4, 5]),
    ("sliding_window(3)", 1, [0, 1]),
    ("sliding_window(3, causal=False)", 5, [3, 4, 5, 6, 7]),
    ("sliding_window(1, causal=False)", 5, [5]),
    # window keys, dilation apart, the query's own among them.
    ("dilated_window(3, 2)", 8, [4, 6, 8]),
    ("dilated_window(3, 2)", 3, [1, 3]),
    ("dilated_window(2, 5)", 11, [6, 11]),
    # Counts are exclusive.
    ("sinks(2)", 0, [0, 1]),
    ("sinks(2)", 11, [0, 1]),
    ("prefix_lm(0)", 2, [0, 1, 2]),
    ("prefix_lm(4)", 2, [0, 1, 2, 3]),
    ("prefix_lm(4)", 4, [0, 1, 2, 3, 4]),
    ("global_tokens(2)", 1, list(range(12))),
    ("global_tokens(2)", 2, [0, 1]),
    ("full()", 0, list(range(12))),
]


@pytest.mark.parametrize(("text", "q", "keys"), BOUNDS, ids=[f"{t}@{q}" for t, q, _ in BOUNDS])
def test_bounds_element_by_element(text: str, q: int, keys: list[int]) -> None:
    assert keys_seen(fs.parse(text), q) == keys


def test_padding_bound_is_exclusive() -> None:
    for length, keys in ((0, []), (1, [0]), (11, list(range(11))), (12, list(range(12)))):
        assert keys_seen(fs.parse("padding"), 4, lengths=torch.tensor([length])) == keys


def test_cumulative_lengths_include_the_first_position_and_exclude_the_end() -> None:
    pattern, ends = fs.parse("document(cu_seqlens='cu_seqlens')"), torch.tensor([0, 5, 6, 12])
    assert keys_seen(pattern, 4, cu_seqlens=ends) == [0, 1, 2, 3, 4]
    assert keys_seen(pattern, 5, cu_seqlens=ends) == [5]
    assert keys_seen(pattern, 6, cu_seqlens=ends) == [6, 7, 8, 9, 10, 11]


def test_cumulative_lengths_may_hold_empty_documents() -> None:
    pattern, ends = fs.parse("document(cu_seqlens='cu_seqlens')"), torch.tensor([0, 5, 5, 12])
    assert keys_seen(pattern, 4, cu_seqlens=ends) == [0, 1, 2, 3, 4]
    assert keys_seen(pattern, 5, cu_seqlens=ends) == list(range(5, 12))


def test_after_is_inclusive_and_window_and_after_meet_without_a_hole() -> None:
    falling = -torch.arange(12.0)[None, None]
    assert keys_seen(fs.parse("sparsek(100, after=4)"), 6, scores=falling) == [0, 1, 2]
    assert keys_seen(fs.parse("sparsek(2, after=4)"), 11, scores=falling) == [0, 1]
    assert keys_seen(fs.parse("sparsek_window(2, 3)"), 11, scores=falling) == [0, 1, 9, 10, 11]
    assert keys_seen(fs.parse("sparsek_window(100, 3)"), 11, scores=falling) == list(range(12))
    # From position k + window - 1 on a query sees exactly k + window distinct keys.
    assert [len(keys_seen(fs.parse("sparsek_window(2, 3)"), q, scores=falling)) for q in (2, 3, 4, 5)] == [3, 4, 5, 5]


def test_ties_keep_the_earlier_key() -> None:
    assert keys_seen(fs.parse("sparsek(3)"), 11, scores=torch.zeros(1, 1, 12)) == [0, 1, 2]


def test_each_head_has_its_own_window() -> None:
    pattern: Any = fs.parse("sliding_window(per_head([1, 3]))")
    mask = fs.dense_mask(pattern, 12, heads=4)
    assert [[int(n) for n in mask[0, h, 5].nonzero()] for h in range(4)] == [[5], [5], [3, 4, 5], [3, 4, 5]]
    shapes = plain_shapes(12, heads=4)
    assert torch.equal(generated_mask(bound_and_functions(pattern, shapes, {})[1], shapes), mask)


def test_document_ids_need_no_order_and_take_one_row_for_all() -> None:
    pattern: Any = fs.parse("document")
    ids = torch.tensor([7, -1, 7, 3, -1])
    wanted = torch.tensor([[a == b for b in ids.tolist()] for a in ids.tolist()])
    assert torch.equal(fs.dense_mask(pattern, 5, batch=2, doc=ids), wanted.expand(2, 1, 5, 5))
    shapes = plain_shapes(5, batch=2)
    assert torch.equal(generated_mask(bound_and_functions(pattern, shapes, {"doc": ids})[1], shapes)[1, 0], wanted)
