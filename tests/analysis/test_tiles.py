"""Tiles from bounds: sound for every mask, exact for the usual ones, equal to torch's own BlockMask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

import flexsparse as fs
from flexsparse.analysis.lists import Listed
from flexsparse.analysis.tiles import EMPTY, FULL, PARTIAL, Sizes, classify, index_errors
from flexsparse.analysis.tiles import _repays as repays
from flexsparse.codegen.block_mask import make_block_mask
from flexsparse.ir.lower import lower
from flexsparse.language import b, captured, kv, log, q, sqrt
from flexsparse.patterns import catalogue
from tests.helpers import assert_tiles_sound, bound_and_functions, make_captured, plain_shapes, tensors_of
from tests.language.strategies import MASKS, PATTERNS

P: Any = catalogue()
BLOCK = 16


def world(pattern: Any, size: int, seed: int = 0, batch: int = 2, heads: int = 2) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return make_captured(
        tensors_of(pattern), batch=batch, heads=heads, size=size, score_heads=heads, generator=generator
    )


def tiles_and_mask(pattern: Any, size: int, seed: int = 0, block: int = BLOCK) -> tuple[Tensor, Tensor]:
    given_tensors = world(pattern, size, seed)
    bound, _ = bound_and_functions(pattern, plain_shapes(size, batch=2, heads=2, kv_heads=2), given_tensors, block)
    return bound.tiles.kinds, fs.dense_mask(pattern, size, batch=2, heads=2, **given_tensors)


@settings(max_examples=1200)
@given(MASKS, st.sampled_from([1, 15, 33, 50]), st.integers(0, 3))
def test_tiles_are_sound_for_any_mask(mask: Any, size: int, seed: int) -> None:
    kinds, dense = tiles_and_mask(mask, size, seed)
    assert_tiles_sound(kinds, BLOCK, dense)


@settings(max_examples=60)
@given(PATTERNS, st.sampled_from([17, 40]), st.integers(0, 3))
def test_tiles_are_sound_for_any_pattern_with_selections(pattern: Any, size: int, seed: int) -> None:
    kinds, dense = tiles_and_mask(pattern, size, seed)
    assert_tiles_sound(kinds, BLOCK, dense)


@pytest.mark.parametrize("after", [0, 1, 15, 16, 20, 33, 47, 48, 200])
@pytest.mark.parametrize("text", ["sliding_window(30)", "causal() & (q % 3 > kv % 2)", "sinks(3) | sliding_window(16)"])
def test_tiles_apart_from_those_where_keys_enter(text: str, after: int) -> None:
    size = 100
    pattern: Any = fs.parse(text)
    bound, _ = bound_and_functions(pattern, plain_shapes(size, batch=1, heads=1, kv_heads=1), {}, BLOCK)
    query, key = torch.arange(size)[:, None], torch.arange(size)[None, :]
    # At the first query of a row of tiles no key enters inside of it.
    enters = (query - key == after) & (query % BLOCK > 0)
    pad = -size % BLOCK
    entered = torch.nn.functional.pad(enters, (0, pad, 0, pad)).unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))
    kept = bound.tiles.kinds[0, 0].masked_fill(entered.any(3).any(1), EMPTY)
    apart = bound.tiles.apart_from_entries(after)
    # The last row of tiles has queries that are not there, for which keys are left out as well.
    assert torch.equal(apart.kinds[0, 0, :-1], kept[:-1])
    assert ((apart.kinds[0, 0, -1] == kept[-1]) | (apart.kinds[0, 0, -1] == EMPTY)).all()
    assert apart is bound.tiles.apart_from_entries(after)


def test_what_is_kept_apart_from_entries_is_little_and_serves_training() -> None:
    pattern: Any = fs.parse("sliding_window(30)")
    bound, _ = bound_and_functions(pattern, plain_shapes(100, batch=1, heads=1, kv_heads=1), {}, BLOCK)
    with torch.inference_mode():
        apart = bound.tiles.apart_from_entries(7)
    assert not apart.partial.listed().column.is_inference()
    for after in range(20):
        bound.tiles.apart_from_entries(after)
    assert len(bound.tiles._apart) <= 4


@pytest.mark.parametrize(
    "mask",
    [
        sqrt(q - kv) <= 100,
        ~(sqrt(q - kv) > 100),
        log(q - kv) < 50,
        ~(log(q - kv) >= 50),
        (q - kv) / (q - kv) < 2,
        (kv - q) % -5 <= -2,
        (q - kv) // -4 == 1,
        abs(kv - q) % 7 == 0,
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [16, 32, 50])
def test_tiles_are_sound_where_reals_are_undefined_or_signs_change(mask: Any, size: int) -> None:
    kinds, dense = tiles_and_mask(mask, size)
    assert_tiles_sound(kinds, BLOCK, dense)


def exact_kinds(mask: Tensor, block: int) -> Tensor:
    """What every tile is, from the dense mask; a ragged tile is never FULL."""
    rows, heads, q_len, kv_len = mask.shape
    tall, wide = -(-q_len // block), -(-kv_len // block)
    kinds = torch.empty(rows, heads, tall, wide, dtype=torch.uint8)
    for i in range(tall):
        for j in range(wide):
            part = mask[:, :, i * block : (i + 1) * block, j * block : (j + 1) * block].flatten(2)
            whole = part.all(2) & (part.shape[2] == block * block)
            kinds[:, :, i, j] = torch.where(whole, FULL, torch.where(part.any(2), PARTIAL, EMPTY))
    return kinds


EXACT = [
    "full", "causal", "sliding_window(1)", "sliding_window(20)", "sliding_window(20, causal=False)", "sinks(4)",
    "sinks(40)", "prefix_lm(24)", "prefix_lm(32)", "global_tokens(5)", "padding", "dilated_window(8, 3)",
    "document", "document(cu_seqlens='cu_seqlens')", "causal & sinks(20)", "causal & ~sinks(16)", "~causal",
]  # fmt: skip


@pytest.mark.parametrize("size", [16, 47, 130, 200])
@pytest.mark.parametrize("text", EXACT)
def test_tiles_of_the_usual_masks_are_exact(text: str, size: int) -> None:
    kinds, dense = tiles_and_mask(fs.parse(text), size)
    assert torch.equal(kinds.expand(2, 2, -1, -1), exact_kinds(dense, BLOCK))


def test_windows_within_causal_documents_are_exact_on_sorted_ids() -> None:
    pattern: Any = P["causal"]() & P["sliding_window"](30) & P["document"]()
    ids = torch.arange(200).div(64, rounding_mode="floor")[None]
    bound, _ = bound_and_functions(pattern, plain_shapes(200), {"doc": ids})
    assert torch.equal(bound.tiles.kinds, exact_kinds(fs.dense_mask(pattern, 200, doc=ids), BLOCK))


@pytest.mark.parametrize(("q_len", "kv_len"), [(16, 16), (17, 16), (16, 17), (33, 47)])
def test_ragged_tiles_are_never_full(q_len: int, kv_len: int) -> None:
    kinds = classify(lower(P["full"]().node).mask, Sizes(1, 1, q_len, kv_len), block=BLOCK).kinds[0, 0]
    if q_len % BLOCK:
        assert (kinds[-1] == PARTIAL).all()
    if kv_len % BLOCK:
        assert (kinds[:, -1] == PARTIAL).all()
    assert (kinds[: q_len // BLOCK, : kv_len // BLOCK] == FULL).all()


def test_rows_and_heads_are_kept_apart_only_where_the_mask_needs_them() -> None:
    for text, rows, heads in (("causal", 1, 1), ("padding", 2, 1), ("sliding_window(per_head([4, 40]))", 1, 2)):
        pattern: Any = fs.parse(text)
        kinds, _ = tiles_and_mask(pattern, 50)
        assert kinds.shape[:2] == (rows, heads)


def test_counts_cover_all_rows_and_heads() -> None:
    tiles = classify(lower(P["causal"]().node).mask, Sizes(2, 3, 64, 64), block=BLOCK)
    assert (tiles.count(FULL), tiles.count(PARTIAL), tiles.count(EMPTY)) == (6 * 6, 6 * 4, 6 * 6)
    assert tiles.total == 6 * 16


def test_queries_start_at_their_offset() -> None:
    kinds = classify(lower(P["causal"]().node).mask, Sizes(1, 1, 16, 48, q_offset=32), block=BLOCK).kinds
    assert kinds.tolist() == [[[[FULL, FULL, PARTIAL]]]]


@pytest.mark.parametrize("size", [64, 129, 200])
@pytest.mark.parametrize(
    "text",
    [
        "full",
        "causal",
        "sliding_window(30)",
        "causal & (sliding_window(30) | sinks(4))",
        "prefix_lm(100)",
        "document & causal",
        "padding & causal",
        "dilated_window(30, 4)",
        "global_tokens(40)",
        "sliding_window(per_head([20, 70]))",
    ],
)
def test_block_mask_equals_torchs_own(text: str, size: int) -> None:
    pattern: Any = fs.parse(text)
    given_tensors = world(pattern, size)
    shapes = plain_shapes(size, batch=2, heads=2, kv_heads=2)
    bound, functions = bound_and_functions(pattern, shapes, given_tensors, 32)
    mine: Any = make_block_mask(bound.tiles, functions["mask_mod"])
    rows, heads = bound.tiles.kinds.shape[:2]
    theirs: Any = create_block_mask(functions["mask_mod"], rows, heads, size, size, device="cpu", BLOCK_SIZE=32)
    assert mine.shape == theirs.shape
    assert mine.seq_lengths == theirs.seq_lengths == (size, size)
    assert mine.BLOCK_SIZE == theirs.BLOCK_SIZE
    assert torch.equal(mine.to_dense(), theirs.to_dense())
    assert torch.equal(mine.kv_num_blocks, theirs.kv_num_blocks)
    assert torch.equal(mine.full_kv_num_blocks, theirs.full_kv_num_blocks)
    for counts, left, right in (
        (theirs.kv_num_blocks, mine.kv_indices, theirs.kv_indices),
        (theirs.full_kv_num_blocks, mine.full_kv_indices, theirs.full_kv_indices),
        (theirs.q_num_blocks, mine.q_indices, theirs.q_indices),
        (theirs.full_q_num_blocks, mine.full_q_indices, theirs.full_q_indices),
    ):
        # Entries past the count are padding that nobody reads.
        read = torch.arange(left.shape[-1]) < counts[..., None]
        assert torch.equal(left[read], right[read])


def test_look_ups_that_can_leave_their_tensor_are_found() -> None:
    doc: Any = captured("doc", dims=("b", "s"))
    tensors = {"doc": torch.zeros(2, 40, dtype=torch.long)}
    inside = lower((doc[b, q] == doc[b, kv]).node).mask
    assert index_errors(inside, Sizes(2, 1, 40, 40), tensors) == []
    assert len(index_errors(inside, Sizes(2, 1, 41, 40), tensors)) == 1
    assert len(index_errors(inside, Sizes(2, 1, 40, 40, q_offset=1), tensors)) == 1
    [(load, dim, low, high)] = index_errors(lower((doc[b, q - 1] == 0).node).mask, Sizes(2, 1, 40, 40), tensors)
    assert (str(load.tensor.name), dim, low, high) == ("doc", 1, -1, 38)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_numbers_beyond_a_tensors_dtype_are_compared_as_numbers(dtype: torch.dtype) -> None:
    doc: Any = captured("doc", dims=("b", "s"))
    ids = (torch.arange(64) // 16)[None].to(dtype)
    for mask in (doc[b, kv] <= q - 40, doc[b, kv] > q - 40, doc[b, kv] < q * 4096, doc[b, kv] >= q * -4096):
        tiles = classify(lower(mask.node).mask, Sizes(1, 1, 64, 64), {"doc": ids}, block=BLOCK)
        dense = fs.dense_mask(mask, 64, doc=ids)
        assert_tiles_sound(tiles.kinds, BLOCK, dense)
        assert torch.equal(tiles.kinds, exact_kinds(dense, BLOCK))


def untraced(b: Any, h: Any, q: Any, kv: Any) -> Any:
    return torch.sin(1.0 * kv) > -0.5


def test_an_untraced_function_is_looked_at_on_an_accelerator_where_that_repays() -> None:
    opaque, traced = (fs.compile(pattern).ir.mask for pattern in (fs.from_flex(untraced), "causal & sinks(2)"))
    tiles, gpu = Listed(torch.full((1, 1, 4), 2, dtype=torch.int32), torch.zeros(8, dtype=torch.int32), 4), "cuda"
    for mask, heads, device, expected in (
        (opaque, 16, "cpu", True),
        (opaque, 16, gpu, False),
        (opaque, 1 << 15, gpu, True),
        (traced, 16, gpu, True),
    ):
        assert repays(mask, tiles, Sizes(2, heads, 512, 512), torch.device(device)) == expected


def test_tiles_of_an_untraced_function_that_is_not_looked_at_are_sound(monkeypatch: pytest.MonkeyPatch) -> None:
    pattern: Any = fs.from_flex(untraced) & P["sliding_window"](20)
    mask, sizes, dense = fs.compile(pattern).ir.mask, Sizes(1, 1, 75, 75), fs.dense_mask(pattern, 75)
    looked_at = classify(mask, sizes, {}, block=BLOCK).kinds
    monkeypatch.setattr("flexsparse.analysis.tiles._repays", lambda *_: False)
    kinds = classify(mask, sizes, {}, block=BLOCK).kinds
    assert_tiles_sound(kinds, BLOCK, dense)
    assert (kinds == PARTIAL).sum() >= (looked_at == PARTIAL).sum()
    assert not (kinds == FULL).any()


def test_lists_that_are_sent_together_begin_at_multiples_of_16_bytes() -> None:
    from flexsparse.analysis.lists import _put_together, _taken_apart

    sent = [torch.arange(n, dtype=torch.int32).reshape(1, -1) for n in (5, 8, 1, 3)]
    found = _taken_apart(_put_together(sent), sent)
    for one, other in zip(found, sent, strict=True):
        assert torch.equal(one, other)
        assert one.is_contiguous()
        assert one.storage_offset() * one.element_size() % 16 == 0


@pytest.mark.parametrize("columns", [40, 41])
def test_indices_that_share_a_buffer_begin_at_multiples_of_16_bytes(
    columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flexsparse.analysis import lists

    monkeypatch.setattr(lists, "_ROOMY_BYTES", 0)
    tiles = classify(
        fs.compile("causal & (sliding_window(900) | sinks(100))").ir.mask, Sizes(1, 1, 128 * columns, 128 * columns), {}
    )
    counts, indices, other_counts, other_indices = lists.index_pair(tiles.partial, tiles.full, torch.device("cpu"))
    assert other_indices.storage_offset() % 4 == 0
    for made, table, wanted in ((counts, indices, tiles.partial), (other_counts, other_indices, tiles.full)):
        for row, count in enumerate(made.flatten().tolist()):
            _, _, rows, listed = wanted.listed().coordinates()
            assert table[0, 0, row, :count].tolist() == listed[rows == row].tolist()
