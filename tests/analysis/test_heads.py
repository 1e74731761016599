"""Heads with one mask are analysed once; every head has its own lists, equal to torch's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

import flexsparse as fs
from flexsparse.analysis.heads import first_alike
from flexsparse.analysis.tiles import EMPTY, FULL, PARTIAL, Sizes, Tiles, classify
from flexsparse.ir.lower import lower
from flexsparse.language import captured, h, kv, per_head, q
from flexsparse.patterns import catalogue
from flexsparse.pipeline import forget_tiles
from tests.analysis.test_tiles import exact_kinds

P: Any = catalogue()
TABLE = captured("table", dims=("h",))

ALIKE = [
    ("causal", 4, (0, 0, 0, 0)),
    ("sliding_window(per_head([20, 200, 20, 200]))", 4, (0, 1, 0, 1)),
    ("sliding_window(per_head([20, 200, 20, 200]))", 8, (0, 0, 2, 2, 0, 0, 2, 2)),
    ("sliding_window(per_head([20, 20]))", 4, (0, 0, 0, 0)),
    ("head_windows([10, 60])", 6, (0, 0, 0, 3, 3, 3)),
    ("per_head([causal(), sliding_window(30)])", 4, (0, 0, 2, 2)),
    ("per_head([causal(), sliding_window(30), causal(), full()])", 4, (0, 1, 0, 3)),
]


@pytest.mark.parametrize(("text", "heads", "first"), ALIKE)
def test_heads_with_one_mask_are_found(text: str, heads: int, first: tuple[int, ...]) -> None:
    program = lower(fs.parse(text).node)
    assert first_alike(program.mask, program.tables, heads) == first


def test_arithmetic_on_the_head_is_worked_out() -> None:
    mask: Any = (q - kv < h % 2 * 64 + 16) & (kv <= q)
    assert first_alike(lower(mask.node).mask, (), 5) == (0, 1, 0, 1, 0)


def test_tensors_indexed_by_the_head_keep_all_heads_apart() -> None:
    mask: Any = q - kv < TABLE[h]
    assert first_alike(lower(mask.node).mask, (), 3) == (0, 1, 2)
    grouped: Any = q - kv < TABLE[h // 2]
    assert first_alike(lower(grouped.node).mask, (), 4) == (0, 0, 2, 2)


def test_reals_that_differ_keep_heads_apart_and_equal_ones_do_not() -> None:
    mask: Any = (q - kv) * per_head([0.5, 0.25, 0.5, 0.1]) < 10.0
    program = lower(mask.node)
    assert first_alike(program.mask, program.tables, 4) == (0, 1, 0, 3)


def test_selections_keep_all_heads_apart() -> None:
    assert first_alike(lower(P["sparsek"](4).node).mask, (), 3) == (0, 1, 2)


def tiles_of(text: str, heads: int, size: int, batch: int = 1, block: int = 16) -> Tiles:
    program = lower(fs.parse(text).node)
    return classify(program.mask, Sizes(batch, heads, size, size), block=block, tables=program.tables)


@pytest.mark.parametrize(("text", "heads", "first"), ALIKE)
@pytest.mark.parametrize("size", [64, 129])
def test_only_distinct_heads_are_analysed_and_all_are_right(
    text: str, heads: int, first: tuple[int, ...], size: int
) -> None:
    tiles = tiles_of(text, heads, size, batch=2)
    assert tiles.distinct_heads == len(set(first))
    wanted = exact_kinds(fs.dense_mask(text, size, batch=2, heads=heads), 16)
    assert torch.equal(tiles.kinds.expand_as(wanted), wanted)
    for kind in (EMPTY, PARTIAL, FULL):
        assert tiles.count(kind) == int((wanted == kind).sum())


@pytest.mark.parametrize("roomy", [0, 1 << 24], ids=["narrow lists", "roomy lists"])
@pytest.mark.parametrize("text", ["sliding_window(per_head([20, 200, 20, 200]))", "per_head([fixed(16, 2), causal])"])
def test_every_head_has_torchs_lists(text: str, roomy: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexsparse.analysis.lists._ROOMY_BYTES", roomy)
    forget_tiles()
    mine: Any = fs.block_mask(text, 300, heads=4, block_size=32)
    theirs: Any = create_block_mask(mine.mask_mod, 1, 4, 300, 300, device="cpu", BLOCK_SIZE=32)
    for name in ("kv", "full_kv", "q", "full_q"):
        count, left, right = (getattr(x, f"{name}_{y}") for x, y in (
            (mine, "num_blocks"), (mine, "indices"), (theirs, "indices")))  # fmt: skip
        assert torch.equal(count, getattr(theirs, f"{name}_num_blocks"))
        for head in range(4):
            for row in range(count.shape[2]):
                used = int(count[0, head, row])
                assert torch.equal(left[0, head, row, :used], right[0, head, row, :used])
    assert mine.kv_indices.stride() == mine.full_kv_indices.stride()
    forget_tiles()


def test_the_plan_says_how_many_heads_differ() -> None:
    attention = fs.compile("sliding_window(per_head([20, 200, 20, 200]))", backend="chunked")
    bound = attention.bind(q_len=256, head_dim=16, heads=4)
    assert (bound.plan.mask_heads, bound.plan.distinct_heads) == (4, 2)
    assert "1 row(s) x 4 head(s), analysed for 2 that differ" in str(attention.explain(q_len=256, head_dim=16, heads=4))
    alike = fs.compile("sliding_window(per_head([20, 20]))", backend="chunked").bind(q_len=256, head_dim=16, heads=4)
    assert (alike.plan.mask_heads, alike.plan.distinct_heads) == (1, 1)
    assert any("one block mask serves all" in note for note in alike.plan.notes)
