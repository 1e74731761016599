"""Tiles counted query by query are exact where ranges of queries say nothing, and stand back where they must."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import flexsparse as fs
from flexsparse.analysis.queries import pairs_seen
from flexsparse.analysis.tiles import Sizes, classify, region_of
from flexsparse.ir.lower import lower
from flexsparse.language import b, captured, floor, kv, log, q
from tests.analysis.test_tiles import exact_kinds

PLACE = captured("place", dims=("b", "s"))
SCATTERED: dict[str, Any] = {
    "hash of a block": kv // 4 == q // 4 * 16807 % 46337 % 60,
    "two hashes": (kv == q * 7919 % 211) | (kv == q * 104729 % 197),
    "all but a hash": kv != q * 7919 % 211,
    "keys from a tensor": abs(kv - PLACE[b, q]) < 3,
}


@pytest.mark.parametrize("name", SCATTERED)
@pytest.mark.parametrize("size", [256, 250])
def test_scattered_keys_are_classified_exactly(name: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    mask = SCATTERED[name]
    place = torch.randint(0, size, (2, size), generator=torch.Generator().manual_seed(0))
    tensors: dict[str, Any] = {"place": place} if name == "keys from a tensor" else {}
    counted = []

    def seen(*arguments: Any) -> Any:
        counted.append(pairs_seen(*arguments))
        return counted[-1]

    monkeypatch.setattr("flexsparse.analysis.tiles.pairs_seen", seen)
    tiles = classify(lower(mask.node).mask, Sizes(2, 1, size, size), tensors, block=16)
    wanted = exact_kinds(fs.dense_mask(mask, size, batch=2, **tensors), 16)
    assert torch.equal(tiles.kinds.expand_as(wanted), wanted)
    assert tiles.undecided == 0
    assert len(counted) == 1
    assert counted[0] is not None


def seen_of(mask: Any, size: int, starts: list[int], block: int = 16, offset: int = 0) -> torch.Tensor | None:
    sizes = Sizes(1, 1, size, size + offset, q_offset=offset)
    region = region_of(sizes, {}, 1, [0], block, torch.device("cpu"))
    return pairs_seen(lower(mask.node).mask, region, torch.tensor(starts), offset + size, block)


def test_pairs_are_counted_from_the_offset_and_to_the_last_query() -> None:
    seen = seen_of(kv <= q, 24, [8, 24], offset=8)
    assert seen is not None
    # Queries 8 to 23, then 24 to 31; keys 0 to 15, then 16 to 31.
    assert seen.tolist() == [[[[sum(min(x, 15) + 1 for x in range(8, 24)), sum(range(1, 9))], [128, 100]]]]


def test_what_is_not_known_of_single_queries_is_not_counted() -> None:
    unsolved: Any = (q - kv) % 3 == 0
    assert seen_of(unsolved, 32, [0, 16]) is None
    # A logarithm is rounded, so its floor may be either of two numbers even for one query.
    vague: Any = kv <= floor(log(q + 1) / log(2.0))
    assert seen_of(vague, 32, [0, 16]) is None


def test_too_much_to_count_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    assert seen_of(kv <= q, 32, [0, 16]) is not None
    monkeypatch.setattr("flexsparse.analysis.queries._QUERIES", 31)
    assert seen_of(kv <= q, 32, [0, 16]) is None
