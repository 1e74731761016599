"""FlexAttention over positions reordered by residue class, compiled, against the oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import flexsparse as fs
from flexsparse.tolerance import evaluate, judge
from tests.gathered.calls import call_of
from tests.helpers import torchs_own_warnings
from tests.residues.test_residues import PATTERNS

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@torchs_own_warnings
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["dilated window", "strided", "learned biases", "soft cap and sink"])
def test_reordered_attention_is_within_the_policy(name: str, dtype: torch.dtype) -> None:
    call = call_of(PATTERNS[name], 528, dtype, head_dim=32)
    got = evaluate(fs.compile(PATTERNS[name], backend="residue_flex"), call)
    found = judge(PATTERNS[name], got, call)
    assert not [f"{c.name}: {c.error:.3g} > {c.allowed:.3g}" for c in found if not c.holds]


def test_auto_takes_it_where_it_is_faster() -> None:
    query, key, value = (torch.randn(1, 8, 32768, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    attention: Any = fs.compile("strided(64)")
    out = attention(query, key, value)
    assert attention.plan.backend == "residue_flex"
    wanted = fs.compile("strided(64)", backend="flex")(query, key, value)
    torch.testing.assert_close(out, wanted, atol=2e-2, rtol=2e-2)
