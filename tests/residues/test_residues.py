"""Attention over positions reordered by residue class: against the oracle, what is refused, and what is planned."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import flexsparse as fs
from flexsparse.errors import BackendError
from flexsparse.ir.residues import split_residues
from flexsparse.ir.text import text
from flexsparse.language import b, h, kv, kv_len, q
from flexsparse.runtime.residues import by_class, in_order, merged
from tests.helpers import assert_same_result, make_inputs, oracle, run, tensors_of, torchs_own_warnings
from tests.runtime.compositions import BIAS, CAUSAL, KEEP, SLOPE, P

EAGER = "residue_flex_eager"
# Every modulus divides 48.
PATTERNS: dict[str, Any] = {
    "dilated window": P["dilated_window"](5, 4),
    "strided": P["strided"](8),
    "window and dilated window": P["sliding_window"](7) | P["dilated_window"](5, 3),
    "two moduli": CAUSAL & (((q - kv) % 4 == 0) | ((q - kv) % 6 == 0)),
    "one modulus of another": CAUSAL & (((q - kv) % 2 == 0) | ((q - kv) % 4 == 0)),
    "residues written apart": (q % 3 == kv % 3) & (kv <= q + 5),
    "not causal": ((kv - q) % 4 == 0) & (abs(q - kv) < 20),
    "a bias of distance": P["dilated_window"](5, 4) + P["alibi"](),
    "learned biases": P["strided"](4) + BIAS - SLOPE[h] * abs(q - kv),
    "soft cap and sink": P["strided"](4).score(P["softcap"](2.0)) & P["learned_sinks"](),
    "documents": P["strided"](4) & P["document"](),
    "boolean tensor": P["dilated_window"](9, 2) & KEEP[b, kv],
    "a length": CAUSAL & ((q - kv) % 4 == 0) & (2 * (q - kv) < kv_len),
    "rows without keys": ((q - kv) % 6 == 0) & (kv < q - 10),
    "heads apart": CAUSAL & (((q - kv) % 2 == 0) | (h == 1)),
}


@torchs_own_warnings
@pytest.mark.parametrize("name", PATTERNS)
def test_reordered_attention_is_the_oracles(name: str) -> None:
    inputs = make_inputs(tensors_of(PATTERNS[name]), size=48, head_dim=16)
    got = run(fs.compile(PATTERNS[name], backend=EAGER, block_size=16), inputs)
    assert_same_result(got, run(oracle(PATTERNS[name]), inputs))


@torchs_own_warnings
def test_without_lse() -> None:
    inputs = make_inputs([], size=48, head_dim=16)
    operands = inputs.query, inputs.key, inputs.value
    attention: Any = fs.compile(PATTERNS["dilated window"], backend=EAGER, block_size=16)
    torch.testing.assert_close(attention(*operands), fs.reference(PATTERNS["dilated window"], *operands))


@torchs_own_warnings
def test_compiled_on_cpu() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, 256, 32, generator=generator) for _ in range(3))
    attention: Any = fs.compile("dilated_window(20, 2)", backend="residue_flex")
    for size in (256, 128):
        operands = [x[:, :, :size].contiguous() for x in (query, key, value)]
        wanted = fs.reference("dilated_window(20, 2)", *operands)
        torch.testing.assert_close(attention(*operands), wanted, atol=1e-5, rtol=1e-5)
    assert attention.plan.backend == "residue_flex"


@pytest.mark.parametrize(
    ("pattern", "within", "rest"),
    [
        ("dilated_window(64, 4)", "(kv - q <= 0) & (q - kv <= 63)", None),
        ("strided(8)", "kv - q <= 0", "(kv <= q) & (q - kv < 8) & ~((q - kv) % 8 == 0)"),
    ],
)
def test_classes_are_bands(pattern: str, within: str, rest: str | None) -> None:
    split = split_residues(fs.compile(pattern).ir)
    assert split is not None
    assert text(split.within.mask) == within
    assert (None if split.rest is None else text(split.rest.mask)) == rest


def test_positions_go_there_and_back() -> None:
    x = torch.randn(2, 3, 12, 5)
    moved = by_class(x, 4)
    assert moved.shape == (8, 3, 3, 5)
    assert torch.equal(moved[4 + 1, :, 2], x[1, :, 9])
    assert torch.equal(in_order(moved, 4), x)
    assert torch.equal(in_order(moved[..., 0], 4), x[..., 0])


def test_sets_of_keys_are_joined_without_a_gradient_into_rows_that_see_none() -> None:
    lse = torch.tensor([0.5, -torch.inf, 2.0, -torch.inf], requires_grad=True)
    other = torch.tensor([1.5, 3.0, -torch.inf, -torch.inf], requires_grad=True)
    ones, twos = torch.ones(4, 1), torch.full((4, 1), 2.0)
    out, joined = merged(ones, lse, twos, other)
    share = torch.sigmoid(torch.tensor(1.0))
    torch.testing.assert_close(out[:, 0], torch.tensor([1 + float(share), 2.0, 1.0, 0.0]))
    torch.testing.assert_close(joined, torch.logaddexp(lse, other))
    found = torch.autograd.grad(out.sum() + joined[:3].sum(), (lse, other))
    assert all(torch.isfinite(x).all() for x in found)
    assert found[0][1] == found[0][3] == found[1][2] == found[1][3] == 0


ON_GPU: dict[str, Any] = {"q_len": 4096, "head_dim": 64, "heads": 4, "device": "cuda"}


@pytest.mark.parametrize(
    ("pattern", "shapes", "reason"),
    [
        ("causal", {}, "The mask has no condition such as (q - kv) % 4 == 0"),
        ("strided(8)", {"q_len": 4097}, "A length of 4097 is no multiple of 8: pad it"),
        ("strided(8)", {"kv_len": 8192}, "as many queries as keys"),
        ("strided(8) | sparsek(4)", {}, "Selections and functions that could not be traced"),
        ("strided(8)", {"device": "cpu", "dtype": torch.float32}, "joined by their LSE"),
    ],
)
def test_what_cannot_be_reordered_is_refused(pattern: str, shapes: dict[str, Any], reason: str) -> None:
    with pytest.raises(BackendError) as caught:
        fs.compile(pattern, backend="residue_flex").bind(**{**ON_GPU, **shapes})
    assert reason in str(caught.value)


def test_the_plan_counts_the_tiles_of_both_calls() -> None:
    plan = fs.compile("strided(8)", backend="residue_flex").bind(**ON_GPU).plan
    assert plan.tiles is not None
    # Within a class 512 positions, causally: 4 tiles a side. Of the rest the diagonal and the tiles beside it.
    assert (plan.tiles.full, plan.tiles.partial) == (4 * 8 * 6, 4 * (8 * 4 + 32 + 31))
    assert any("modulo 8" in note for note in plan.notes)
    assert any("joined by their lse" in note for note in plan.notes)
