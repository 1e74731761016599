"""Tiles of masks that choose blocks by query and key: exact where the choice stands alone, sound in compositions."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import flexsparse as fs
from flexsparse.analysis import tiles
from flexsparse.analysis.blocks import block_counts
from flexsparse.errors import BackendError, CapturedError, ExpressionError
from flexsparse.patterns import catalogue
from tests.helpers import assert_tiles_sound, bound_and_functions, generated_mask, plain_shapes

P: Any = catalogue()


def operands(size: int, q_len: int, heads: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(2, heads, q_len, 3, dtype=torch.float64), torch.randn(2, 1, size, 3, dtype=torch.float64)


@pytest.mark.parametrize("name", ["moba", "quest"])
@pytest.mark.parametrize("tile", [16, 48])
@pytest.mark.parametrize(("block", "k"), [(1, 3), (7, 2), (16, 1), (16, 3), (40, 1), (300, 1)])
@pytest.mark.parametrize("offset", [0, 50])
def test_tiles_of_a_choice_are_exact(name: str, tile: int, block: int, k: int, offset: int) -> None:
    size = 150
    query, key = operands(size, size - offset)
    pattern = P[name](block, k)
    shapes = plain_shapes(size, batch=2, heads=2, q_offset=offset, q_len=size - offset)
    bound, functions = bound_and_functions(pattern, shapes, {}, block=tile, operands=(query, key))
    mask = fs.dense_mask(pattern, size - offset, size, batch=2, heads=2, q_offset=offset, query=query, key=key)
    assert torch.equal(generated_mask(functions, shapes), mask)
    kinds = bound.tiles.kinds
    assert_tiles_sound(kinds, tile, mask)
    padded = torch.nn.functional.pad(mask, (0, -size % tile, 0, -(size - offset) % tile))
    tiled = padded.unflatten(2, (-1, tile)).unflatten(4, (-1, tile))
    some, every = tiled.any(5).any(3), tiled.all(5).all(3)
    assert torch.equal(kinds != tiles.EMPTY, some)
    # A tile that hangs over the end has pairs that are not there, so it is never complete here either.
    assert torch.equal(kinds == tiles.FULL, every)


@pytest.mark.parametrize(
    "text",
    [
        "moba(16, 2) & sliding_window(40)",
        "~moba(16, 1)",
        "quest(8, 1) | sinks(5)",
        "moba(8, 1) ^ quest(8, 1)",
        "where(moba(16, 1), 1, 0) + q % 2 > 0",
        "per_head([moba(16, 1), causal()])",
    ],
)
def test_tiles_of_compositions_are_sound(text: str) -> None:
    pattern: Any = fs.parse(text)
    query, key = operands(100, 100)
    shapes = plain_shapes(100, batch=2, heads=2)
    bound, functions = bound_and_functions(pattern, shapes, {}, operands=(query, key))
    mask = fs.dense_mask(pattern, 100, batch=2, heads=2, query=query, key=key)
    assert torch.equal(generated_mask(functions, shapes), mask)
    assert_tiles_sound(bound.tiles.kinds, bound.tiles.block, mask)


def test_counts_of_a_part_of_a_tile_are_sound_and_of_two_tiles_unknown() -> None:
    chosen = torch.zeros(1, 1, 32, 4, dtype=torch.bool)
    chosen[0, 0, :16, 1] = True
    chosen[0, 0, 3, 2] = True
    counts = block_counts(chosen, 16, 100, 8)

    def ask(q: tuple[int, int], kv: tuple[int, int]) -> tuple[bool, bool]:
        zero = torch.tensor(0)
        found = counts.bounds(zero, zero, *((torch.tensor(low), torch.tensor(high)) for low, high in (q, kv)))
        return bool(found[0]), bool(found[1])

    assert ask((100, 115), (8, 15)) == (True, True)
    assert ask((100, 115), (8, 16)) == (False, True)
    assert ask((100, 115), (0, 7)) == (False, False)
    assert ask((116, 131), (0, 31)) == (False, False)
    assert ask((104, 104), (16, 23)) == (False, True)
    assert ask((110, 120), (8, 15)) == (False, True)


def test_the_choice_is_made_anew_at_each_call() -> None:
    attention = fs.compile("moba(16, 1)", backend="chunked", block_size=16)
    query, key = operands(64, 64)
    seen = []
    for flipped in (query, -query):
        attention(flipped, key, key)
        seen.append(fs.dense_mask("moba(16, 1)", 64, batch=2, heads=2, query=flipped, key=key))
        assert attention.plan.tiles is not None
        assert attention.plan.tiles.empty == _empty(seen[-1])
    assert not torch.equal(*seen)


def _empty(mask: torch.Tensor) -> int:
    return int((~mask.unflatten(2, (-1, 16)).unflatten(4, (-1, 16)).any(5).any(3)).sum())


def test_proofs_know_what_every_choice_has_in_common() -> None:
    assert fs.is_causal("moba(16, 2) & document").holds is True
    assert fs.equivalent("moba(16, 2)", "moba(16, 2) & causal").reason == "the canonical forms agree"
    assert fs.implies("causal & block_diagonal(16)", "moba(16, 3)").holds is True
    unknown = fs.implies("moba(16, 2)", "moba(16, 3)")
    assert unknown.holds is None
    assert "depends on what z3 does not model" in unknown.reason
    assert fs.depends_on("moba(16, 2)", "b").holds is True


def test_a_mask_of_query_and_key_has_no_block_mask() -> None:
    with pytest.raises(ExpressionError) as caught:
        fs.block_mask("moba(16, 2) & causal", 64)
    assert str(caught.value) == (
        "block_mask(moba(16, 2) & causal()): got a selection that depends on query and key, expected a mask that is "
        "known before the call. Use flexsparse.compile, which chooses the blocks and classifies the tiles at each call."
    )
    with pytest.raises(CapturedError) as missing:
        fs.dense_mask("quest(16, 2)", 64, query=torch.randn(1, 1, 64, 4))
    assert str(missing.value) == (
        "query, key: got nothing, expected both, as the blocks of block_topk(2, block=16, score='bounds') depend on "
        "them. Pass query=... and key=... as well."
    )


def test_the_plan_says_that_nothing_may_be_forgotten() -> None:
    told = str(fs.compile("moba(64, 4)").explain(q_len=256, head_dim=64, device="cuda"))
    assert "carries no eviction certificate" in told
    assert "without a gradient of the choice" in told
    assert "tiles     known at the call" in told
    with pytest.raises(BackendError, match="Compiled CPU FlexAttention cannot build the look-up of chosen blocks"):
        fs.compile("moba(64, 4)", backend="flex").bind(q_len=64, head_dim=16, dtype=torch.float32)
