"""Every pair is seen in exactly one row of its key, tiles have all of them, and nothing flows back out of order."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flexsparse.codegen.gathering.rows import Rows, rows_of
from flexsparse.ir.nodes import SelectionNode
from flexsparse.ops import causal_topk
from flexsparse.runtime import rows as runtime_rows
from flexsparse.runtime.rows import Tables, make_tables
from tests.gather_flex.calls import COMPOSITIONS, bound_rows, seen_rows
from tests.helpers import assert_tiles_sound, bound_and_functions, generated_mask, make_inputs, tensors_of
from tests.runtime.compositions import P

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize(("size", "block"), [(1, 16), (70, 16), (100, 32)])
@pytest.mark.parametrize("name", COMPOSITIONS)
def test_each_key_is_seen_once_and_in_a_listed_tile(name: str, size: int, block: int) -> None:
    pattern = COMPOSITIONS[name]
    rows, bound, tables, shapes, functions = bound_rows(pattern, size, block)
    seen = seen_rows(rows, shapes, functions)
    inputs = make_inputs(tensors_of(pattern), size=size)
    operands = (inputs.query.detach(), inputs.key.detach())
    _, plain = bound_and_functions(pattern, shapes, inputs.captured, block, operands)
    key = tables.key.repeat_interleave(shapes.heads // tables.heads, 1).long()
    counted = torch.zeros(*seen.shape[:3], size, dtype=torch.long)
    counted.scatter_add_(3, key.unsqueeze(2).expand_as(seen), seen.long())
    assert torch.equal(counted, generated_mask(plain, shapes).long())
    assert bound.tiles.sizes.kv_len == rows.total
    assert_tiles_sound(bound.tiles.kinds, block, seen)


def test_a_chunk_is_half_as_long_as_it_has_slots() -> None:
    selections = [SelectionNode(k, after, "u", None, "kv") for k, after in ((300, 0), (70, 10**9))]
    rows = rows_of(selections, 5000, 64)
    assert rows == Rows(5000, 64, 192, (300, 70), (0, 5000))
    assert (rows.chunks, rows.padded, rows.widths) == (27, 5056, (320, 128))
    assert rows.starts == (5056, 5056 + 27 * 320, 5056 + 27 * (320 + 128))
    # Copies are twice the keys, and what fills up tiles.
    assert rows.total - rows.padded <= 2 * (rows.length + rows.chunk) + rows.chunks * 2 * 64


def test_slots_that_cannot_be_in_use_have_no_tiles() -> None:
    """The first 20 queries have no candidates; then each tile has its fresh keys, and once there are some its slots."""
    pattern: Any = P["sparsek"](5, after=20)
    rows, bound, _, _, _ = bound_rows(pattern, 70, 16)
    assert rows.chunk == 16
    assert bound.tiles.partial.count[0, 0].tolist() == [0, 1, 3, 3, 3]
    # Keys 13 to 27 enter inside the third chunk, whose slots are the third tile behind the five of the keys.
    assert bound.tiles.partial.listed().column[1:4].tolist() == [0, 1, 5 + 2]
    assert bound.tiles.full.count.sum() == 0


def tables_of(size: int, regime: str, k: int = 5, after: int = 0, block: int = 16, heads: int = 2) -> Tables:
    u = torch.randn(2, heads, size)
    if regime != "random":
        u = u.sort(2, descending=regime == "falling").values
    rows = rows_of([SelectionNode(k, after, "scores", None, "kv")], size, block)
    lives = causal_topk(u, k, after)
    return make_tables(rows, {f"{name}_0": x for name, x in lives._asdict().items()})


@pytest.mark.parametrize("regime", ["random", "rising", "falling"])
@pytest.mark.parametrize(("size", "k", "after"), [(1, 5, 0), (70, 5, 0), (129, 40, 7), (100, 500, 3)])
def test_what_flows_back_is_the_sum_over_copies(regime: str, size: int, k: int, after: int) -> None:
    tables = tables_of(size, regime, k, after)
    x = torch.randn(2, 4, size, 3, dtype=torch.float64, requires_grad=True)
    key = tables.key.repeat_interleave(2, 1).long().unsqueeze(-1).expand(-1, -1, -1, 3)
    rows = tables.gather(x)
    assert torch.equal(rows, x.gather(2, key))
    # Nothing flows into rows that are nobody's, as no query sees them.
    someone = torch.ones(tables.key.shape, dtype=torch.bool)
    someone[:, :, size : tables.rows.padded] = False
    someone[:, :, tables.rows.padded :] = tables.holders[0].flatten(2) >= 0
    flow = torch.randn_like(rows) * someone.repeat_interleave(2, 1).unsqueeze(-1)
    (got,) = torch.autograd.grad(rows, x, flow)
    wanted = torch.zeros_like(x).scatter_add(2, key, flow)
    # At most as many terms as there are chunks, and the key's own.
    bound = (tables.rows.chunks + 1) * torch.finfo(torch.float64).eps * float(flow.abs().max()) * tables.rows.chunks
    assert float((got - wanted).abs().max()) <= bound


def test_sums_of_low_precision_are_wide_and_have_the_same_bits_twice() -> None:
    tables = tables_of(4816, "falling")
    x = torch.randn(2, 2, 4816, 8, dtype=torch.bfloat16, requires_grad=True)
    flow = torch.ones(2, 2, tables.rows.total, 8, dtype=torch.bfloat16)
    found = [torch.autograd.grad(tables.gather(x), x, flow)[0] for _ in range(2)]
    assert torch.equal(*found)
    # The first key stays to the end: 301 copies and its own row. A sum in bfloat16 would not pass 256.
    assert tables.rows.chunks == 301
    assert (found[0][:, :, 0] == 302.0).all()


def test_scores_of_fewer_heads_are_gathered_for_each() -> None:
    tables = tables_of(70, "random", heads=4)
    u = torch.randn(2, 1, 70, dtype=torch.float64, requires_grad=True)
    found = tables.gather_scores(u)
    assert torch.equal(found, u.expand(-1, 4, -1).gather(2, tables.key.long()))
    (got,) = torch.autograd.grad(found[..., :70].sum(), u)
    assert (got == 4.0).all()


def test_no_sum_is_scattered(monkeypatch: pytest.MonkeyPatch) -> None:
    """A key leaves its slot once, so an entry is written once; what belongs to nobody goes past the end."""
    tables = tables_of(200, "random")
    written: list[Any] = []
    scatter = torch.Tensor.scatter_

    def watched(self: torch.Tensor, dim: int, index: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        written.append(index)
        return scatter(self, dim, index, source)

    total, rows = torch.zeros(2, 2, 200, 1), torch.ones(2, 2, tables.rows.total, 1)
    monkeypatch.setattr(torch.Tensor, "scatter_", watched)
    runtime_rows.add_slot_sums(total, rows, tables.rows.padded, tables.holders[0])
    monkeypatch.undo()
    every = torch.cat(written, 2)
    for row in every.flatten(0, 1).squeeze(-1):
        keys = row[row < 200]
        assert len(keys.unique()) == len(keys)
