"""Attention over copies of selected keys against the oracle: out, lse and gradients, through eager FlexAttention."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import flexsparse as fs
from flexsparse.language import b, captured, h, kv, per_head, q, topk
from flexsparse.tolerance import evaluate, judge
from tests.gather_flex.calls import COMPOSITIONS, agree
from tests.gathered.calls import call_of
from tests.helpers import assert_same_result, make_inputs, oracle, run, torchs_own_warnings
from tests.runtime.compositions import CAUSAL, GATES, P

pytestmark = [
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]

WINDOW = P["sliding_window"](20)
HYBRID: Any = WINDOW | P["sparsek"](9, after=20)
EAGER = "gather_flex_eager"


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_every_composition_is_the_oracle(name: str) -> None:
    agree(COMPOSITIONS[name], size=35, batch=2)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("after", [0, 20])
def test_every_gate_beside_a_window_over_several_chunks(gate: str, after: int) -> None:
    agree(WINDOW | topk(9, after=after, gate=gate), size=75, batch=1)


@pytest.mark.parametrize("size", [1, 2, 15, 16, 17, 48, 127])
def test_any_length(size: int) -> None:
    agree(HYBRID, size=size, batch=1, heads=2, kv_heads=1)


@pytest.mark.parametrize("k", [1, 33, 50, 500])
def test_any_number_of_slots(k: int) -> None:
    agree(P["sparsek"](k) + P["alibi"](), size=100, batch=1, heads=2, kv_heads=1)


@pytest.mark.parametrize(
    "shape",
    [
        {"score_heads": 1},
        {"score_heads": 4},
        {"heads": 3, "kv_heads": 3, "head_dim": 24, "value_dim": 40},
        {"heads": 6, "kv_heads": 2},
        {"heads": 4, "kv_heads": 1, "score_heads": 4},
    ],
    ids=["shared scores", "scores of each query head", "odd head_dim", "three to one", "one KV head"],
)
def test_any_heads(shape: dict[str, Any]) -> None:
    agree(HYBRID, size=50, batch=1, **shape)


def test_selections_of_unlike_heads() -> None:
    pattern: Any = P["sparsek"](5) | P["sparsek"](7, scores="u", gate="v")
    inputs = make_inputs(["scores", "u"], size=40, batch=1, head_dim=16, score_heads=4)
    shared = inputs.captured["scores"].detach()[:, :1].clone().requires_grad_()
    inputs = replace(inputs, captured={**inputs.captured, "scores": shared})
    got = run(fs.compile(pattern, backend=EAGER, block_size=16), inputs)
    assert_same_result(got, run(oracle(pattern), inputs))


def composed() -> dict[str, Any]:
    """What a user's own composition adds to a selection."""
    keep: Any = captured("keep", dims=("b", "s"), dtype="bool")
    slope: Any = captured("slope", dims=("h",), learnable=True)
    return {
        "documents, sinks and alibi": CAUSAL & P["document"]() & (HYBRID | P["sinks"](3)) + P["alibi"](),
        "softcap": HYBRID.score(P["softcap"](2.0)),
        "window of each head": P["sliding_window"](per_head([3, 30, 12, 1])) | P["sparsek"](7),
        "relative bias": HYBRID + P["relative_bias"](16),
        "learned slope and sinks": (HYBRID + slope[h] * (kv - q)) & P["learned_sinks"](),
        "boolean tensor": (HYBRID | P["sinks"](3)) & keep[b, kv],
        "nothing near": topk(9, gate="v") & (kv % 3 > 0),
        "a selection that others hide": CAUSAL & (P["sparsek"](12) | WINDOW | P["sparsek"](9, scores="u")),
        "segments": P["sparsek"](5, segments="segments") + P["alibi"](),
        "a window before the selection begins": P["sliding_window"](10) | P["sparsek"](6, after=30),
        "blocks that queries choose": P["moba"](8, 2) | P["sparsek"](6, after=3),
    }


@pytest.mark.parametrize("name", composed())
def test_compositions_work_with_the_selection(name: str) -> None:
    agree(composed()[name], size=75, batch=1)


def test_a_function_that_cannot_be_traced_gets_keys_and_not_rows() -> None:
    def near(b: Any, h: Any, q: Any, kv: Any) -> Any:
        return torch.sin(1.0 * kv) > -0.5

    pattern = fs.from_flex(near) & HYBRID
    assert fs.compile(pattern).ir.opaque
    agree(pattern, size=40, batch=1, heads=2, kv_heads=1)


@pytest.mark.parametrize("regime", ["rising", "falling", "equal", "infinite"])
def test_any_turnover_of_slots(regime: str) -> None:
    def change(captured: Any) -> None:
        scores = captured["scores"]
        if regime in ("rising", "falling"):
            scores.copy_(scores.sort(descending=regime == "falling").values)
        elif regime == "equal":
            scores.zero_()
        else:
            scores[..., 5:70:7] = -torch.inf
            scores[..., 20:70:31] = torch.inf

    agree(HYBRID, size=90, change=change, batch=1, heads=2, kv_heads=1)


@pytest.mark.parametrize("block", [16, 48, 128])
def test_the_block_size_changes_no_result(block: int) -> None:
    agree(P["sparsek"](40, after=3) | P["sinks"](2), block, size=100, batch=1, heads=2, kv_heads=1)


def test_rows_that_see_no_key() -> None:
    pattern: Any = P["sparsek"](16, after=50)
    got = evaluate(fs.compile(pattern, backend=EAGER, block_size=16), call_of(pattern, 70))
    assert (got["out"][:, :, :50] == 0).all()
    assert (got["lse"][:, :, :50] == -torch.inf).all()
    assert (got["d query"][:, :, :50] == 0).all()
    assert not any(torch.isnan(x).any() for x in got.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_within_the_policy(dtype: torch.dtype) -> None:
    call = call_of(HYBRID, 100, dtype)
    got = evaluate(fs.compile(HYBRID, backend=EAGER, block_size=16), call)
    # The gradient of the scores is a sum over two calls (README, Limits).
    judged = [c for c in judge(HYBRID, got, call) if c.name != "d scores"]
    assert not [f"{c.name}: {c.error:.3g} > {c.allowed:.3g}" for c in judged if not c.holds]


def test_deterministic_gives_the_scores_the_gradients_of_the_chunked_path() -> None:
    call = call_of(HYBRID, 70)
    results = []
    for backend in (EAGER, "chunked"):
        results.append(evaluate(fs.compile(HYBRID, backend=backend, deterministic=True, block_size=16), call))
    assert float((results[0]["d scores"] - results[1]["d scores"]).abs().max()) <= 1e-5
    again = evaluate(fs.compile(HYBRID, backend=EAGER, deterministic=True, block_size=16), call)
    assert torch.equal(again["d scores"], results[0]["d scores"])


def test_operands_of_any_strides() -> None:
    call = call_of(HYBRID, 40)
    attention: Any = fs.compile(HYBRID, backend=EAGER, block_size=16)
    wanted = attention(call.query, call.key, call.value, **call.captured)
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (call.query, call.key, call.value)]
    assert torch.equal(attention(*turned, **call.captured), wanted)


@pytest.mark.slow
@torchs_own_warnings
def test_compiled_for_inference_on_a_cpu_reads_the_block_mask_in_one_build() -> None:
    """Eager FlexAttention computes every pair; what is compiled computes the listed tiles alone."""
    pattern: Any = P["document"]() & (P["sliding_window"](40) | topk(20, after=30, gate="k")) + P["alibi"]()
    attention: Any = fs.compile(pattern, backend="gather_flex", block_size=32)
    for size in (300, 401):
        inputs = make_inputs(["doc", "scores"], size=size, head_dim=16).to(torch.float32)
        operands = [x.detach() for x in (inputs.query, inputs.key, inputs.value)]
        given = {name: x.detach() for name, x in inputs.captured.items()}
        out = attention(*operands, **given)
        exact: Any = fs.reference(pattern, *(x.double() for x in operands), **given)
        # float32 softmax over at most 61 keys: 64 roundings of the largest cover the products and the sum.
        assert float((out - exact).abs().max()) <= 64 * torch.finfo(torch.float32).eps * float(exact.abs().max())
    assert attention.builds == 1
