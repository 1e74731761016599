"""The kernel that adds copies up gives the bits of its PyTorch form, on a GPU or in Triton's interpreter."""

from __future__ import annotations

import os

import pytest
import torch

from flexsparse.codegen.gathering.rows import rows_of
from flexsparse.ir.nodes import SelectionNode
from flexsparse.ops import causal_topk
from flexsparse.runtime import rows as runtime_rows
from flexsparse.runtime.rows import make_tables

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="needs a GPU or Triton's interpreter"),
]


# The interpreter's bfloat16 is wrong.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16] if INTERPRETED else [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("regime", ["random", "rising", "falling"])
@pytest.mark.parametrize(
    ("size", "k", "heads", "dim"), [(1, 1, 1, 1), (200, 5, 2, 1), (150, 70, 4, 24), (40, 90, 2, 200)]
)
def test_the_kernel_gives_the_bits_of_the_pytorch_form(
    size: int, k: int, heads: int, dim: int, regime: str, dtype: torch.dtype
) -> None:
    from flexsparse.codegen.kernels.slot_sums import add_slot_sums

    u = torch.randn(2, heads, size)
    if regime != "random":
        u = u.sort(2, descending=regime == "falling").values
    selections = [SelectionNode(k, after, "scores", None, "kv") for after in (0, 3)]
    rows = rows_of(selections, size, 16)
    lives = [causal_topk(u, k, s.after)._asdict() for s in selections]
    tables = make_tables(rows, {f"{name}_{n}": x for n, made in enumerate(lives) for name, x in made.items()})
    # Two heads share what each of these selects.
    flow = torch.randn(2, 2 * heads, rows.total, dim).to(dtype)
    for n, holder in enumerate(tables.holders):
        first = rows.starts[n]
        wanted = torch.randn(2, 2 * heads, size, dim)
        got = wanted.clone().to(DEVICE)
        runtime_rows.add_slot_sums(wanted, flow, first, holder)
        add_slot_sums(got, flow.to(DEVICE), first, holder.to(DEVICE))
        assert torch.equal(got.cpu(), wanted)
