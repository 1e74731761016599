"""Compiled FlexAttention on a GPU against the oracle, under the tolerance policy: out, lse and every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import flexsparse as fs
from flexsparse.language import h, kv, q, topk
from flexsparse.ops import causal_sparsek, causal_topk, sparsek
from flexsparse.tolerance import Call, evaluate, judge
from tests.helpers import DIFFERENTIABLE, make_inputs, tensors_of
from tests.ops.regimes import REGIMES, draw
from tests.runtime.compositions import CAUSAL, SLOPE, P

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    # Inductor recommends TF32; the tests compare float32 with float32, and torch's default keeps TF32 off.
    # A kernel that does not fit is built smaller, which is announced.
    pytest.mark.filterwarnings("ignore:FlexAttention's kernel does not fit:flexsparse.errors.BackendNotice"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]

WINDOW = P["sliding_window"](96)
COMPOSITIONS: dict[str, tuple[Any, int]] = {
    "causal": (CAUSAL, 1000),
    "window, sinks and alibi": (CAUSAL & (WINDOW | P["sinks"](4)) + P["alibi"](), 513),
    "documents and padding": (CAUSAL & P["document"]() & P["padding"](), 300),
    "softcap": (CAUSAL.score(P["softcap"](20.0)), 256),
    "relative bias": (CAUSAL + P["relative_bias"](16), 257),
    "learned slope": (CAUSAL + SLOPE[h] * (kv - q), 256),
    "hybrid": (CAUSAL & (WINDOW | P["sinks"](4) | P["sparsek"](32, after=96)), 1000),
    "gate on K": (P["sparsek"](48, gate="k"), 300),
    "gate on V": (WINDOW | topk(32, after=96, gate="v"), 300),
    "gate on the logit": (P["sparsek"](48, gate="logit"), 300),
    "straight through": (P["sparsek"](48, gate="ste"), 300),
    "straight through the identity": (P["sparsek"](48, gate="ste_identity"), 300),
    "straight through a sigmoid": (P["sparsek"](48, gate="ste_sigmoid"), 300),
    "capped softmax": (P["sparsek"](48, gate="capped_softmax"), 300),
    "two selections": (P["sparsek"](32) | P["sparsek"](16, scores="u", gate="v"), 300),
    "learned sinks": (WINDOW & P["learned_sinks"](), 513),
    "learned sinks on a hybrid": ((WINDOW | P["sparsek"](32, after=96)) & P["learned_sinks"](), 300),
    "moba": (P["moba"](64, 3), 1000),
    "quest within documents": (P["quest"](32, 4) & P["document"]() | WINDOW, 513),
    "selection in segments": (P["sparsek"](24, segments="segments") + P["alibi"](), 257),
}


def call_of(pattern: Any, dtype: torch.dtype, size: int) -> Call:
    """Operands in ``dtype`` and scores in float32, on the GPU; four query heads over two KV heads."""
    inputs = make_inputs(tensors_of(pattern), size=size, head_dim=64).to(dtype, torch.float32)
    captured = {n: t.detach().cuda() for n, t in inputs.captured.items()}
    learned = tuple(n for n in captured if n in DIFFERENTIABLE)
    generator = torch.Generator().manual_seed(5)

    def flow(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).cuda()

    query, key, value = (x.detach().cuda() for x in (inputs.query, inputs.key, inputs.value))
    return Call(query, key, value, captured, learned, flow(*query.shape), flow(*query.shape[:3])).cast(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", COMPOSITIONS)
def test_compiled_flex_is_within_the_policy(name: str, dtype: torch.dtype) -> None:
    pattern, size = COMPOSITIONS[name]
    call = call_of(pattern, dtype, size)
    got = evaluate(fs.compile(pattern, backend="flex"), call)
    failed = [f"{c.name}: {c.error:.3g} > {c.allowed:.3g}" for c in judge(pattern, got, call) if not c.holds]
    assert not failed


def test_auto_takes_flex_on_a_gpu() -> None:
    call = call_of(CAUSAL, torch.bfloat16, 256)
    attention = fs.compile(CAUSAL)
    attention(call.query, call.key, call.value)
    assert attention.plan.backend == "flex"


@pytest.mark.parametrize("name", ["relative bias", "learned slope"])
def test_gradients_of_learned_tensors_have_the_same_bits_in_two_runs(name: str) -> None:
    pattern, size = COMPOSITIONS[name]
    call = call_of(pattern, torch.bfloat16, size)
    attention = fs.compile(pattern, backend="flex")
    first, second = evaluate(attention, call), evaluate(attention, call)
    (learned,) = call.learned
    assert torch.equal(first[f"d {learned}"], second[f"d {learned}"])


def test_deterministic_gives_scores_gradients_of_the_same_bits() -> None:
    pattern, size = COMPOSITIONS["hybrid"]
    call = call_of(pattern, torch.bfloat16, size)
    attention = fs.compile(pattern, backend="flex", deterministic=True)
    first, second = evaluate(attention, call), evaluate(attention, call)
    assert torch.equal(first["d scores"], second["d scores"])


def test_rows_that_see_no_key() -> None:
    pattern: Any = CAUSAL & P["sparsek"](16, after=100)
    call = call_of(pattern, torch.bfloat16, 256)
    got = evaluate(fs.compile(pattern, backend="flex"), call)
    assert (got["out"][:, :, :100] == 0).all()
    assert (got["lse"][:, :, :100] == -torch.inf).all()
    assert (got["d query"][:, :, :100] == 0).all()
    assert not any(torch.isnan(x).any() for x in got.values())


@pytest.mark.parametrize("regime", REGIMES)
def test_operators_give_what_the_cpu_gives(regime: str) -> None:
    rows = torch.stack([draw(regime, 257, seed) for seed in range(4)])
    for dtype in (torch.float32, torch.float64):
        u = rows.to(dtype)
        on_gpu = u.cuda()
        assert torch.equal(sparsek(on_gpu, 7).cpu(), sparsek(u, 7))
        assert torch.equal(causal_sparsek(on_gpu, 7, 3).tau.cpu(), causal_sparsek(u, 7, 3).tau)
        for mine, theirs in zip(causal_topk(on_gpu, 7, 3), causal_topk(u, 7, 3), strict=True):
            assert torch.equal(mine.cpu(), theirs)


@pytest.mark.parametrize("regime", ["normal", "integers", "position slope", "some -inf"])
def test_gradients_of_thresholds_are_those_of_the_cpu(regime: str) -> None:
    u = torch.stack([draw(regime, 257, seed) for seed in range(4)])
    flow = torch.randn_like(u)
    found = []
    for leaf in (u.clone().requires_grad_(), u.cuda().requires_grad_()):
        tau = causal_sparsek(leaf, 7).tau
        found.append(torch.autograd.grad(tau, leaf, flow.to(leaf.device))[0].cpu())
    # A difference of two cumulative sums of 257 shares, in whatever order the device adds them.
    assert float((found[0] - found[1]).abs().max()) <= 257 * 2.0**-52 * float(flow.abs().sum(1).max())


def test_masks_are_classified_on_the_gpu_as_on_the_cpu() -> None:
    for text in ("causal & document", "sliding_window(per_head([20, 200, 3, 100]))", "padding & causal"):
        pattern: Any = fs.parse(text)
        call = call_of(pattern, torch.bfloat16, 513)
        on_gpu = fs.compile(pattern, backend="flex", block_size=64)
        on_cpu = fs.compile(pattern, backend="chunked", block_size=64)
        captured: dict[str, Any] = dict(call.captured)
        on_gpu(call.query, call.key, call.value, **captured)
        given: dict[str, Any] = {n: t.cpu() for n, t in captured.items()}
        on_cpu(call.query.cpu(), call.key.cpu(), call.value.cpu(), **given)
        assert on_gpu.plan.tiles == on_cpu.plan.tiles


def test_lists_too_large_for_every_column_share_a_buffer_and_give_the_same_bits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """FlexAttention reads the full tiles with the strides of the partial ones, so both must have the same."""
    from flexsparse.analysis import lists

    query, key, value = (torch.randn(1, 2, 1500, 64, device="cuda", requires_grad=True) for _ in range(3))
    results = []
    # Patterns of different text, so that nothing of the first is reused for the second.
    for text, roomy in (("causal()", 1 << 30), ("causal() & causal()", 0)):
        monkeypatch.setattr(lists, "_ROOMY_BYTES", roomy)
        out = fs.compile(text, backend="flex")(query, key, value)
        results.append((out, *torch.autograd.grad(out.square().sum(), (query, key, value))))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_lengths_take_two_builds_one_for_multiples_of_128() -> None:
    pattern: Any = fs.parse("document & causal")
    attention = fs.compile(pattern, backend="flex")
    for length in (300, 257, 1000, 1280, 256, 640, 900, 1024):
        call = call_of(pattern, torch.bfloat16, length)
        got = evaluate(attention, call)
        failed = [f"{c.name}: {c.error:.3g} > {c.allowed:.3g}" for c in judge(pattern, got, call) if not c.holds]
        assert not failed
        assert attention.builds == (1 if length in (300, 257, 1000) else 2)
