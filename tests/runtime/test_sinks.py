"""Sinks against attention written one query at a time: a term in the denominator without a key and a value."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import flexsparse as fs
from flexsparse.language import captured, h, q
from flexsparse.patterns import catalogue
from flexsparse.tolerance import evaluate, judge
from tests.helpers import Inputs, assert_close, assert_same_result, make_inputs, oracle, run, torchs_own_warnings
from tests.runtime.naive import Key, gates_of, naive_attention
from tests.runtime.test_low_precision import call_of as low_precision_call

P: Any = catalogue()
SINK: Any = captured("sink_logits", dims=("h",), learnable=True)
SIZE, WINDOW = 11, 3
BACKENDS = ["reference", "chunked", "flex_eager"]


def inputs(*names: str, size: int = SIZE) -> Inputs:
    return make_inputs(["sink_logits", *names], size=size, batch=2, heads=4, kv_heads=2, head_dim=16)


def window(i: int) -> list[Key]:
    return [Key(j) for j in range(max(0, i - WINDOW + 1), i + 1)]


@torchs_own_warnings
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_learned_sink_is_one_more_column_without_a_value(backend: str) -> None:
    def naive(query: Tensor, key: Tensor, value: Tensor, *, sink_logits: Tensor, return_lse: bool) -> Any:
        return naive_attention(query, key, value, lambda b, h, i: window(i), sink=lambda b, h, i: sink_logits[h])

    attention = fs.compile(P["sliding_window"](WINDOW) & P["learned_sinks"](), backend=backend, block_size=16)
    assert_same_result(run(attention, inputs()), run(naive, inputs()))


@torchs_own_warnings
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_see_no_key_give_zero_and_the_sink(backend: str) -> None:
    def naive(query: Tensor, key: Tensor, value: Tensor, *, sink_logits: Tensor, return_lse: bool) -> Any:
        keys = [list[Key](), *(window(i) for i in range(1, SIZE))]
        keys[5] = []
        return naive_attention(query, key, value, lambda b, h, i: keys[i], sink=lambda b, h, i: sink_logits[h] * i)

    pattern = (P["sliding_window"](WINDOW) & ~((q == 0) | (q == 5))).sink(SINK[h] * q)
    got = run(fs.compile(pattern, backend=backend, block_size=16), inputs())
    assert_same_result(got, run(naive, inputs()))
    logits = inputs().captured["sink_logits"].detach()
    assert (got.out[:, :, [0, 5]] == 0).all()
    assert torch.equal(got.lse[:, :, 5], (5 * logits).expand(2, 4))


@torchs_own_warnings
def test_a_sinks_gradient_in_float32_does_not_sum_the_rounding_of_lse() -> None:
    pattern: Any = P["causal"]() & P["learned_sinks"]()
    shares = []
    for seed in range(4):
        call = low_precision_call(pattern, torch.float32, 500, heads=4, kv_heads=2)
        torch.manual_seed(seed)
        call = replace(call, grad_out=torch.randn_like(call.grad_out))
        got = evaluate(fs.compile(pattern, backend="flex_eager"), call)
        shares += [c.share for c in judge(pattern, got, call) if c.name == "d sink_logits"]
    assert max(shares) < 0.6


@torchs_own_warnings
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gate", ["v", "kv", "logit"])
def test_the_gate_on_v_does_not_touch_the_sink(gate: str, backend: str) -> None:
    def naive(
        query: Tensor, key: Tensor, value: Tensor, *, scores: Tensor, sink_logits: Tensor, return_lse: bool
    ) -> Any:
        def see(b: int, h: int, i: int) -> list[Key]:
            return [
                Key(j, *(m if part in gate.replace("logit", "l") else 1.0 for part in "kvl"))
                for j, m in gates_of(scores[b, h // 2], 3, i, 2).items()
            ]

        return naive_attention(query, key, value, see, sink=lambda b, h, i: sink_logits[h])

    pattern = P["sparsek"](3, after=2, gate=gate) & P["learned_sinks"]()
    got = run(fs.compile(pattern, backend=backend, block_size=16), inputs("scores"))
    assert_same_result(got, run(naive, inputs("scores")))


@pytest.mark.parametrize("backend", BACKENDS[:2])
def test_off_by_one_is_a_sink_of_zero(backend: str) -> None:
    some = inputs()
    query, key, value = (x.detach() for x in (some.query, some.key[:, :1], some.value[:, :1]))
    scores = (query @ key.mT / 4.0).exp()
    wanted = scores @ value / (1 + scores.sum(-1, keepdim=True))
    out = fs.compile("full.sink(0)", backend=backend)(query, key, value)
    assert_close("out", out, wanted)


@torchs_own_warnings
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("far", [-1e4, 1e4, -math.inf])
def test_a_far_sink_neither_overflows_nor_gives_nan(far: float, backend: str) -> None:
    some = inputs()
    some.captured["sink_logits"].data.fill_(far)
    pattern = P["sliding_window"](WINDOW) & (q != 0) & P["learned_sinks"]()
    got = run(fs.compile(pattern, backend=backend, block_size=16), some)
    plain = run(fs.compile(P["sliding_window"](WINDOW) & (q != 0), backend="reference"), Inputs(*operands(some), {}))
    assert not any(g is None or torch.isnan(g).any() for g in got.gradients.values())
    if far < 0:
        assert_close("out", got.out, plain.out)
        assert_close("lse", got.lse[:, :, 1:], plain.lse[:, :, 1:])
        assert (got.lse[:, :, 0] == far).all()
        assert_close("d query", got.gradients["query"], plain.gradients["query"])  # type: ignore[arg-type]
    else:
        assert (got.out == 0).all()
        assert (got.lse == far).all()


def operands(some: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    return some.query, some.key, some.value


def detached(some: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    return some.query.detach(), some.key.detach(), some.value.detach()


def test_a_sink_shifts_with_the_offset_of_the_queries() -> None:
    pattern = P["causal"]().sink(SINK[h] + q / 8)
    some = inputs()
    some = Inputs(*detached(some), {n: t.detach() for n, t in some.captured.items()})
    whole = fs.compile(pattern, backend="chunked")(*operands(some), **some.captured)
    late = fs.compile(pattern, backend="chunked")(
        some.query[:, :, 6:], some.key, some.value, q_offset=6, **some.captured
    )
    assert_close("out", late, whole[:, :, 6:])
    exact: Any = fs.reference(pattern, some.query[:, :, 6:], some.key, some.value, q_offset=6, **some.captured)
    assert_close("out", late, exact)


@torchs_own_warnings
@pytest.mark.parametrize("backend", ["chunked", "flex_eager"])
def test_only_the_sink_may_ask_for_a_gradient(backend: str) -> None:
    some = inputs()
    fixed = Inputs(*detached(some), some.captured)
    pattern = P["causal"]() & P["learned_sinks"]()
    assert_same_result(run(fs.compile(pattern, backend=backend, block_size=16), fixed), run(oracle(pattern), fixed))


def test_gradients_of_the_sink_are_the_same_bits_twice() -> None:
    some = inputs(size=129).to(torch.float32)
    attention = fs.compile(P["causal"]() & P["learned_sinks"](), backend="chunked")
    first, second = (run(attention, some).gradients["sink_logits"] for _ in range(2))
    assert first is not None
    assert torch.equal(first, second)  # type: ignore[arg-type]


def test_the_plan_says_what_the_sink_costs() -> None:
    attention = fs.compile(P["causal"]() & P["learned_sinks"]())
    told = attention.explain(q_len=256, head_dim=64, heads=4, device="cuda", needs_grad=True)
    assert "out * sigmoid(lse - sink)" in str(told)
    assert "sink       = sink_logits[h]" in attention.code("ir")
    assert not any("recomputed" in note for note in told.plan.notes), "the sink needs no second pass over the keys"
    wide = attention.explain(q_len=256, head_dim=64, heads=4, device="cuda", needs_grad=True, dtype=torch.float32)
    assert any("its gradient is recomputed in float32" in note for note in wide.plan.notes)
    with pytest.raises(fs.errors.BackendError, match="A sink needs the LSE"):
        fs.compile("causal.sink(0)", backend="flex").bind(q_len=64, head_dim=16, dtype=torch.float32)


def test_equal_sinks_are_one_and_text_keeps_them() -> None:
    both: Any = fs.parse("(causal & learned_sinks) | (sinks(2) & learned_sinks)")
    assert str(fs.compile(both).ir).splitlines()[-1] == "sink       = sink_logits[h]"
    assert fs.parse(str(both)) == both
    one: Any = fs.parse("causal.sink(2) & full.sink(1 + 1)")
    assert str(fs.compile(one).ir).splitlines()[-1] == "sink       = 2"
    named: Any = fs.parse('causal.sink(captured("t", dims=("h",), learnable=True)[h])')
    assert fs.parse(str(named), captured={"t": captured("t", dims=("h",), learnable=True)}) == named
