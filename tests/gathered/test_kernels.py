"""The kernels that gather, on a GPU or in Triton's interpreter, against the oracle: out, lse and every gradient."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

import flexsparse as fs
from flexsparse.codegen.kernels import recording
from flexsparse.language import b, captured, kv, log, per_head, q, score, topk, where
from flexsparse.runtime import gathered, gathered_arguments, gathered_gradients
from flexsparse.tolerance import evaluate
from tests.gathered.calls import COMPOSITIONS, DEVICE, call_of, failures
from tests.runtime.compositions import CAUSAL, P

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="needs a GPU or Triton's interpreter"),
    pytest.mark.usefixtures("poisoned_memory"),
]
# In the interpreter a chunk of 64 queries is a whole tile already; two of them, the second cut short, are enough.
SIZE = 100 if INTERPRETED else 300
KEEP: Any = captured("keep", dims=("b", "s"), dtype="bool")
WINDOW = P["sliding_window"](40)
HYBRID = WINDOW | P["sparsek"](24, after=40)


# What is left out of the interpreter's runs, which take seconds each: it is like something that is in them.
LEFT_OUT = {f"sparsek gate {gate}" for gate in ("k", "logit", "none", "ste", "ste_identity", "ste_sigmoid")}
LEFT_OUT |= {
    "hybrid gate none",
    "hybrid gate ste",
    "hybrid gate ste_identity",
    "paper hybrid",
    "after greater than window",
}


def test_what_is_left_out_of_the_interpreter_exists() -> None:
    assert set(COMPOSITIONS) > LEFT_OUT


# The interpreter's bfloat16 is wrong.
@pytest.mark.parametrize("dtype", [torch.float32] if INTERPRETED else [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [name for name in COMPOSITIONS if not INTERPRETED or name not in LEFT_OUT])
def test_every_composition_is_within_the_policy(name: str, dtype: torch.dtype) -> None:
    assert not failures(COMPOSITIONS[name], call_of(COMPOSITIONS[name], SIZE, dtype))


@pytest.mark.parametrize(
    "shape",
    [
        {"score_heads": 1},
        {"score_heads": 4},
        {"heads": 3, "kv_heads": 3, "head_dim": 24, "value_dim": 40},
        {"heads": 6, "kv_heads": 2, "batch": 1},
    ],
    ids=["shared scores", "scores of each query head", "odd head_dim", "three to one"],
)
def test_any_heads_and_head_dim(shape: dict[str, Any]) -> None:
    assert not failures(HYBRID, call_of(HYBRID, SIZE, **shape))


@pytest.mark.parametrize("size", [1, 64, 129] if INTERPRETED else [1, 2, 63, 64, 65, 129])
def test_any_length(size: int) -> None:
    assert not failures(HYBRID, call_of(HYBRID, size, batch=1))


@pytest.mark.parametrize("k", [1, 33, 70, 500])
def test_any_number_of_slots(k: int) -> None:
    pattern = P["sparsek"](k) + P["alibi"]()
    assert not failures(pattern, call_of(pattern, 140, batch=1))


@pytest.mark.parametrize(
    ("window", "after"), [(64, 64), (40, 1), (130, 64), (20, 64), (3, 0), (70, 33), (40, 250)], ids=str
)
def test_keys_enter_in_tiles_that_the_window_has_or_has_not(window: int, after: int) -> None:
    """Those tiles are computed once, whatever else of them is near: nothing, a part, or all of it."""
    pattern = P["sliding_window"](window) | P["sparsek"](24, after=after) | P["sinks"](3)
    assert not failures(pattern, call_of(pattern, 200, batch=1, heads=2, kv_heads=1))


def test_rows_too_far_apart_for_32_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    far = torch.empty_strided((1, 1, 3, 8), (0, 0, 1 << 30, 1), device="meta")
    assert gathered_arguments.is_wide(far)
    assert not gathered_arguments.is_wide(far[:, :, :2])
    monkeypatch.setattr(gathered_arguments, "is_wide", lambda *tensors: True)
    assert not failures(HYBRID, call_of(HYBRID, 130, batch=1))


@pytest.mark.parametrize("dtype", [torch.float32] if INTERPRETED else [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_rows_whose_scores_rise_for_long(head_dim: int, dtype: torch.dtype) -> None:
    """Each tile of keys raises the level of its rows, or falls short of it by less than what is let pass."""
    call = call_of(HYBRID, SIZE, dtype, batch=1, heads=2, kv_heads=2, head_dim=head_dim)
    # Products in the interpreter are numpy's, whose rounding differs from processor to processor.
    rising = torch.linspace(0, 10 if INTERPRETED else 40, SIZE, device=DEVICE)[:, None]
    call.key.copy_(call.query.flip(2) * 0.1 + rising * call.query.sign().mean(2, keepdim=True))
    assert not failures(HYBRID, call)


def arithmetic() -> dict[str, Any]:
    """Integer arithmetic of both signs, extremes, and functions of a score with a derivative of their own."""
    negative = (q - kv * 2) // 3 % 5 != 2
    bent = where(kv % 2 == 0, 1.0, 0.5) * (q - kv)
    return {
        "division of both signs": HYBRID & negative,
        "extremes": (WINDOW & (abs(q - kv - 7) > 2)) | topk(9, after=3, gate="kv"),
        "a score of indices": HYBRID + bent / 50,
        "tanh of a score": HYBRID.score(P["softcap"](1.5)),
        "tanh of small numbers": HYBRID.score(P["softcap"](20.0)),
        "numbers of each head": P["sliding_window"](per_head([5, 50, 5, 50])) | P["sparsek"](7),
        "a gate that near tiles alone mention": per_head(
            [per_head([per_head([P["full"](), topk(7, gate="ste")]), topk(9, scores="u", gate="logit")]), WINDOW]
        ),
        "boolean tensor": (HYBRID | P["sinks"](3)) & KEEP[b, kv],
        "nothing near": topk(9, gate="v") & (kv % 3 > 0),
        "a selection that others hide": CAUSAL & (P["sparsek"](30) | WINDOW | P["sparsek"](9, scores="u")),
    }


@pytest.mark.parametrize("name", arithmetic())
def test_what_is_printed_into_the_kernels_means_what_it_says(name: str) -> None:
    pattern = arithmetic()[name]
    assert not failures(pattern, call_of(pattern, SIZE, batch=1))


@pytest.mark.parametrize(
    ("busy", "regime"),
    [
        (busy, regime)
        for n, busy in enumerate((1, 6, 1000))
        for m, regime in enumerate(("random", "rising", "falling"))
        if not INTERPRETED or n == m
    ],
)
def test_spans_of_chunks_add_up(busy: int, regime: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys that leave their slot within a span, stay through it, or stay through several."""
    monkeypatch.setattr(gathered_gradients, "_BUSY", busy)
    monkeypatch.setattr(recording, "_recordings", {})
    call = call_of(HYBRID, 330, batch=1, heads=1, kv_heads=1)
    if regime != "random":
        call.captured["scores"].copy_(call.captured["scores"].sort(descending=regime == "falling").values)
    assert not failures(HYBRID, call)


def test_two_runs_have_the_same_bits() -> None:
    call = call_of(HYBRID, SIZE)
    attention = fs.compile(HYBRID, backend="gather")
    first, second = evaluate(attention, call), evaluate(attention, call)
    for name, one in first.items():
        assert torch.equal(one, second[name]), name


def test_rows_that_see_no_key() -> None:
    pattern: Any = P["sparsek"](16, after=50)
    call = call_of(pattern, SIZE)
    got = evaluate(fs.compile(pattern, backend="gather"), call)
    assert (got["out"][:, :, :50] == 0).all()
    assert (got["lse"][:, :, :50] == -torch.inf).all()
    assert (got["d query"][:, :, :50] == 0).all()
    assert not any(torch.isnan(x).any() for x in got.values())


def test_deterministic_asks_for_nothing_more() -> None:
    assert not failures(HYBRID, call_of(HYBRID, 70, batch=1), deterministic=True)


def test_what_is_no_number_comes_out_as_such() -> None:
    pattern: Any = P["sparsek"](8)
    call = call_of(pattern, 70, batch=1, heads=2, kv_heads=1)
    call.query[0, 0, 50] = torch.nan
    attention: Any = fs.compile(pattern, backend="gather")
    out, lse = attention(call.query, call.key, call.value, return_lse=True, scores=call.captured["scores"])
    assert torch.isnan(out[0, 0, 50]).all()
    assert torch.isnan(lse[0, 0, 50])
    assert int(torch.isnan(lse).sum()) == 1


# numpy says so in the interpreter.
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("gate", ["kv", "v", "k", "logit"])
def test_scores_that_are_no_numbers_leave_earlier_rows_alone(gate: str) -> None:
    pattern: Any = P["sparsek"](8, gate=gate)
    call = call_of(pattern, SIZE, batch=1, heads=2, kv_heads=1)
    attention: Any = fs.compile(pattern, backend="gather")
    found = []
    for spoiled in (False, True):
        scores = call.captured["scores"].clone()
        scores[..., 70] = torch.nan if spoiled else scores[..., 70]
        leaf = call.query.clone().requires_grad_()
        out = attention(leaf, call.key, call.value, scores=scores, validate=False)
        found.append((out[:, :, :70].detach(), *torch.autograd.grad(out[:, :, :70].sum(), leaf)))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1][:, :, :70], found[1][1][:, :, :70])


@pytest.mark.filterwarnings("ignore:(invalid value|divide by zero) encountered:RuntimeWarning")
@pytest.mark.parametrize("name", ["hybrid", "selected", "scored", "two", "capped"])
def test_a_threshold_that_is_no_number_stays_with_the_keys_that_are_seen(name: str) -> None:
    selected, near = P["sparsek"](8, after=20), P["sliding_window"](20)
    pattern = {
        "hybrid": near | selected,
        "selected": P["sparsek"](8),
        # Its slope is no number where the key is later than the query.
        "scored": (near | selected).score(score * (1 + log(q - kv + 1) / 8)),
        "two": near | selected | P["sparsek"](5, after=20, scores="u"),
        "capped": near | topk(8, after=20, gate="capped_softmax"),
    }[name]
    call = call_of(pattern, 100, batch=1, heads=2, kv_heads=1)
    # The first keys nobody sees any more when scores begin to be no numbers.
    for scores in (call.captured[each] for each in ("scores", "u") if each in call.captured):
        scores[..., :30] = torch.linspace(-9, -8, 30, device=DEVICE)
    call.captured["scores"][..., 90:] = torch.nan
    leaves = [x.clone().requires_grad_() for x in (call.query, call.key, call.value)]
    attention: Any = fs.compile(pattern, backend="gather")
    out = attention(*leaves, **call.captured, validate=False)
    of_query, *of_keys = torch.autograd.grad(out, leaves, call.grad_out)
    assert not torch.isnan(of_query[:, :, :90]).any()
    for gradient in of_keys:
        assert not torch.isnan(gradient[:, :, :30]).any()
        assert torch.isnan(gradient[:, :, 30:90]).any()


def test_nothing_flows_into_rows_without_keys() -> None:
    pattern: Any = P["sparsek"](16, after=20)
    call = call_of(pattern, 70, batch=1, heads=2, kv_heads=1)
    leaves = [x.clone().requires_grad_() for x in (call.query, call.key, call.value, call.captured["scores"])]
    attention: Any = fs.compile(pattern, backend="gather")
    out, lse = attention(*leaves[:3], scores=leaves[3], return_lse=True)
    # The chain through the square of -inf is NaN behind the where.
    loss = torch.where(lse == -torch.inf, 0.0, lse**2).sum() + out.sum()
    assert all(torch.isfinite(x).all() for x in torch.autograd.grad(loss, leaves))


def test_a_captured_tensor_may_have_any_name() -> None:
    named: Any = captured("level", dims=("b", "s"), dtype="bool")
    pattern: Any = HYBRID & named[b, kv]
    call = call_of(HYBRID, 70, batch=1)
    seen = torch.rand(1, 70, generator=torch.Generator().manual_seed(0)).to(DEVICE) < 0.7
    attention: Any = fs.compile(pattern, backend="gather")
    got = attention(call.query, call.key, call.value, level=seen, **call.captured)
    oracle: Any = fs.reference
    wanted = oracle(pattern, call.query, call.key, call.value, level=seen, **call.captured)
    assert float((got - wanted).abs().max()) <= 1e-5


def test_operands_of_any_strides() -> None:
    call = call_of(HYBRID, 70, batch=1)
    attention: Any = fs.compile(HYBRID, backend="gather")
    wanted = attention(call.query, call.key, call.value, **call.captured)
    rows = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (call.query, call.key, call.value)]
    columns = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (call.query, call.key, call.value)]
    for operands in (rows, columns):
        assert torch.equal(attention(*operands, **call.captured), wanted)


@pytest.mark.parametrize("packed", [False, True], ids=["[B, S, H, D]", "one projection [B, S, 3, H, D]"])
def test_operands_with_heads_behind_positions_are_read_where_they_are(
    packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No kernel of forward or backward gets a copy of query, key, value or of what flows into the output."""
    call = call_of(HYBRID, 70, batch=1, heads=2, kv_heads=2)
    together = torch.stack([x.transpose(1, 2) for x in (call.query, call.key, call.value)], 2).requires_grad_()
    held = together.unbind(2) if packed else [x.detach().clone().requires_grad_() for x in together.unbind(2)]
    flow = torch.randn_like(held[0])
    places = {f"p_{name}": x.data_ptr() for name, x in zip(("query", "key", "value"), held, strict=True)}
    places["p_d_out"] = flow.data_ptr()
    read: dict[str, set[int]] = {name: set() for name in places}
    launch: Any = gathered.launch  # type: ignore[attr-defined]

    def watched(kernel: Any, grid: tuple[int, ...], **named: Any) -> None:
        for name in read.keys() & named.keys():
            read[name].add(named[name].data_ptr())
        launch(kernel, grid, **named)

    for module in (gathered, gathered_gradients):
        monkeypatch.setattr(module, "launch", watched)
    monkeypatch.setattr(recording, "_recordings", {})
    attention: Any = fs.compile(HYBRID, backend="gather")
    out = attention(*(x.transpose(1, 2) for x in held), **call.captured)
    torch.autograd.backward(out.transpose(1, 2), flow)
    assert read == {name: {place} for name, place in places.items()}


# numpy says so where the interpreter takes the difference of two stand-ins for infinity.
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("pattern", [P["sparsek"](8), P["sliding_window"](8) | P["sparsek"](8, after=8)])
def test_infinite_scores(pattern: Any) -> None:
    call = call_of(pattern, SIZE, batch=1)
    call.captured["scores"][..., 5:90:7] = -torch.inf
    call.captured["scores"][..., 20:90:31] = torch.inf
    assert not failures(pattern, call)


def test_twenty_steps_of_training_follow_the_oracle() -> None:
    """Gradient descent on everything that learns, once through the kernels and once through the oracle."""
    call = call_of(HYBRID, 66, batch=1, heads=2, kv_heads=1)
    goal = torch.randn(call.query.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    losses: list[list[float]] = []
    for backend in ("gather", "reference"):
        leaves = [x.clone().requires_grad_() for x in (call.query, call.key, call.value, call.captured["scores"])]
        attention = fs.compile(HYBRID, backend=backend)
        losses.append([])
        for _ in range(20):
            loss = (attention(*leaves[:3], scores=leaves[3]) - goal).square().mean()
            losses[-1].append(float(loss.detach()))
            for leaf, step in zip(leaves, torch.autograd.grad(loss, leaves), strict=True):
                leaf.data -= 20.0 * step
    assert losses[0][-1] < 0.9 * losses[0][0]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
