"""The choice of blocks against a loop over queries, and its ties, slabs, head groups, dtypes and offsets."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flexsparse.ops import blocks
from flexsparse.ops.blocks import choose_blocks

SCORES = ["mean", "bounds"]


def looped(query: Tensor, key: Tensor, k: int, block: int, score: str, offset: int = 0) -> Tensor:
    """One query at a time, in float64, by Python's own sort."""
    groups = query.shape[1] // key.shape[1]
    rows = []
    for b in range(query.shape[0]):
        for h in range(query.shape[1]):
            for i, q in enumerate(query[b, h].double()):
                parts = key[b, h // groups].double().split(block)
                own = (i + offset) // block
                rate = [
                    float(q @ p.mean(0) if score == "mean" else torch.maximum(q * p.amin(0), q * p.amax(0)).sum())
                    for p in parts
                ]
                best = sorted(range(own), key=lambda n: (-rate[n], n))[:k]
                rows.append([n == own or n in best for n in range(len(parts))])
    return torch.tensor(rows).reshape(*query.shape[:3], -1)


def draw(size: int, *, q_len: int | None = None, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return torch.randn(2, 4, q_len or size, 5).to(dtype), torch.randn(2, 2, size, 5).to(dtype)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("size", [1, 17, 64, 129])
@pytest.mark.parametrize(("k", "block"), [(1, 1), (2, 8), (3, 5), (100, 16), (1, 200)])
def test_the_choice_is_that_of_one_query_at_a_time(k: int, block: int, size: int, score: str) -> None:
    query, key = draw(size)
    assert torch.equal(choose_blocks(query, key, k, block, score), looped(query, key, k, block, score))


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_operands_are_ranked_in_float32(dtype: torch.dtype, score: str) -> None:
    query, key = draw(129, dtype=dtype)
    assert torch.equal(choose_blocks(query, key, 3, 8, score), looped(query, key, 3, 8, score))


@pytest.mark.parametrize("score", SCORES)
def test_autocast_does_not_lower_the_scores(score: str) -> None:
    query, key = draw(129, dtype=torch.float32)
    wanted = choose_blocks(query, key, 3, 8, score)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(choose_blocks(query, key, 3, 8, score), wanted)


@pytest.mark.parametrize("score", SCORES)
def test_slabs_change_nothing(score: str, monkeypatch: pytest.MonkeyPatch) -> None:
    query, key = draw(100)
    whole = choose_blocks(query, key, 2, 8, score)
    monkeypatch.setattr(blocks, "_SLAB", 700)
    assert torch.equal(choose_blocks(query, key, 2, 8, score), whole)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("offset", [1, 16, 50])
def test_an_offset_gives_the_later_rows(offset: int, score: str) -> None:
    query, key = draw(77)
    whole = choose_blocks(query, key, 2, 8, score)
    late = choose_blocks(query[:, :, offset:], key, 2, 8, score, q_offset=offset)
    assert torch.equal(late, whole[:, :, offset:])
    assert torch.equal(late, looped(query[:, :, offset:], key, 2, 8, score, offset))


@pytest.mark.parametrize("score", SCORES)
def test_ties_go_to_the_earlier_block(score: str) -> None:
    query, key = torch.ones(1, 1, 32, 2), torch.ones(1, 1, 32, 2)
    chosen = choose_blocks(query, key, 2, 4, score)[0, 0]
    assert chosen[31].nonzero().flatten().tolist() == [0, 1, 7]
    assert chosen[6].nonzero().flatten().tolist() == [0, 1]
    key[:, :, 12:16] = 2.0
    assert choose_blocks(query, key, 2, 4, score)[0, 0, 31].nonzero().flatten().tolist() == [0, 3, 7]


def test_bounds_see_a_single_large_key_that_the_mean_does_not() -> None:
    key = torch.zeros(1, 1, 24, 1)
    key[0, 0, 2], key[0, 0, 3] = 5.0, -6.0
    key[0, 0, 8:16] = 0.5
    query = torch.ones(1, 1, 24, 1)
    assert choose_blocks(query, key, 1, 8, "bounds")[0, 0, 20].tolist() == [True, False, True]
    assert choose_blocks(query, key, 1, 8, "mean")[0, 0, 20].tolist() == [False, True, True]


def test_no_gradient_and_no_order_of_strides() -> None:
    query, key = draw(40)
    wanted = choose_blocks(query, key, 2, 8)
    first, second = (x.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in (query, key))
    found = choose_blocks(first, second, 2, 8)
    assert torch.equal(found, wanted)
    assert not found.requires_grad
