"""The oracle against attention written one query at a time, and proof that comparing with it catches wrong answers."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import flexsparse as fs
from flexsparse.dense_selections import sorted_gates
from flexsparse.errors import CapturedError
from tests.helpers import Inputs, Result, assert_same_result, make_inputs, oracle, run
from tests.runtime.naive import Key, gates_of, naive_attention
from tests.twins import differentiable_gates, exact_gates, exact_prefix_taus, prefix_tau

SIZE, K, WINDOW = 13, 3, 4
GATES = ["kv", "k", "v", "logit", "none", "ste"]


def keys_with_gate(gate: str, j: int, m: Tensor) -> Key:
    """The three gates of one selected key, as the table of the documentation has them."""
    through = 1 + (m - m.detach())
    return {
        "kv": Key(j, on_k=m, on_v=m),
        "k": Key(j, on_k=m),
        "v": Key(j, on_v=m),
        "logit": Key(j, on_logit=m),
        "none": Key(j),
        "ste": Key(j, on_k=through, on_v=through),
    }[gate]


def naive(see: Callable[[Tensor, int], list[Key]]) -> Callable[..., Any]:
    """Attention where what a query sees depends on its scores row and its position."""

    def attend(query: Tensor, key: Tensor, value: Tensor, *, scores: Tensor, return_lse: bool) -> Any:
        groups = query.shape[1] // scores.shape[1]
        return naive_attention(query, key, value, lambda b, h, i: see(scores[b, h // groups], i))

    return attend


def inputs() -> Inputs:
    return make_inputs(["scores"], size=SIZE, batch=1, heads=2, kv_heads=1)


def window(i: int) -> range:
    return range(max(0, i - WINDOW + 1), i + 1)


@pytest.mark.parametrize("gate", GATES)
def test_selection_is_what_one_query_at_a_time_gives(gate: str) -> None:
    attend = naive(lambda u, i: [keys_with_gate(gate, j, m) for j, m in gates_of(u, K, i).items()])
    assert_same_result(run(oracle(f"sparsek({K}, gate='{gate}')"), inputs()), run(attend, inputs()))


def test_the_capped_softmax_is_what_one_query_at_a_time_gives() -> None:
    def see(u: Tensor, i: int) -> list[Key]:
        tau = prefix_tau(u[: i + 1], K)
        scores = u.tolist()
        best = sorted(range(i + 1), key=lambda j: (-scores[j], j))[:K]
        m = torch.where(u >= tau, 1.0, (u - tau).clamp(max=0).exp()) if i + 1 > K else torch.ones_like(u)
        return [Key(j, on_k=m[j], on_v=m[j]) for j in best]

    found = run(oracle(f"sparsek({K}, gate='capped_softmax')"), inputs())
    assert_same_result(found, run(naive(see), inputs()))
    learned = found.gradients["scores"]
    assert learned is not None
    assert float(learned.abs().max()) > 0


def tau_of(prefix: Tensor, k: int) -> Tensor:
    """The threshold by its definition from the gates: what is free shares what the saturated ones leave of k."""
    m = differentiable_gates(prefix, k).detach()
    free, whole = (m > 0) & (m < 1), int((m == 1).sum())
    if not free.any():
        return prefix[m == 0].max().detach()
    return (prefix[free].sum() - (k - whole)) / int(free.sum())


@pytest.mark.parametrize("gate", ["ste_identity", "ste_sigmoid"])
def test_straight_through_gates_take_the_gradient_of_what_they_name(gate: str) -> None:
    def see(u: Tensor, i: int) -> list[Key]:
        keys = []
        for j in gates_of(u, K, i):
            surrogate = u[j]
            if gate == "ste_sigmoid":
                surrogate = torch.sigmoid(u[j] - tau_of(u[: i + 1], K)) if i + 1 > K else torch.ones_like(u[j])
            through = 1 + (surrogate - surrogate.detach())
            keys.append(Key(j, on_k=through, on_v=through))
        return keys

    found = run(oracle(f"sparsek({K}, gate='{gate}')"), inputs())
    assert_same_result(found, run(naive(see), inputs()))
    learned = found.gradients["scores"]
    assert learned is not None
    assert float(learned.abs().max()) > 0


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("after", [0, WINDOW])
def test_window_or_selection_counts_each_key_once_with_the_larger_gate(gate: str, after: int) -> None:
    def see(u: Tensor, i: int) -> list[Key]:
        selected = {j: m for j, m in gates_of(u, K, i, after).items() if j not in window(i)}
        return [Key(j) for j in window(i)] + [keys_with_gate(gate, j, m) for j, m in selected.items()]

    pattern = f"sliding_window({WINDOW}) | sparsek({K}, after={after}, gate='{gate}')"
    assert_same_result(run(oracle(pattern), inputs()), run(naive(see), inputs()))


def test_the_larger_of_two_gates_wins_and_both_multiply() -> None:
    def larger(u: Tensor, i: int) -> list[Key]:
        few, many = gates_of(u, 2, i), gates_of(u, 4, i)
        best = {j: many[j] if j not in few or bool(many[j] > few[j]) else few[j] for j in many}
        return [Key(j, on_v=m) for j, m in best.items()]

    def product(u: Tensor, i: int) -> list[Key]:
        few, many = gates_of(u, 2, i), gates_of(u, 4, i)
        return [Key(j, on_v=few[j] * many[j]) for j in few]

    either, both = "sparsek(2, gate='v') | sparsek(4, gate='v')", "sparsek(2, gate='v') & sparsek(4, gate='v')"
    assert_same_result(run(oracle(either), inputs()), run(naive(larger), inputs()))
    assert_same_result(run(oracle(both), inputs()), run(naive(product), inputs()))


def test_left_score_wins_and_scores_apply_left_to_right() -> None:
    query, key, value = (x.detach() for x in (inputs().query, inputs().key, inputs().value))

    def added(h: int, i: int, j: int) -> float:
        return 1.0 if j in window(i) else 2.0

    def every(b: int, h: int, i: int) -> list[Key]:
        return [Key(j) for j in range(SIZE) if j in window(i) or j < 2]

    wanted, _ = naive_attention(query, key, value, every, added)
    got: Any = fs.reference(f"(sliding_window({WINDOW}) + 1) | (sinks(2) + 2)", query, key, value)
    assert torch.allclose(got, wanted, rtol=0, atol=1e-14)


def test_segments_restart_the_prefix_and_a_document_mask_does_not() -> None:
    ids = [0] * 5 + [1] * 8
    some = inputs()
    query, key, value = (x.detach() for x in (some.query, some.key, some.value))
    u = some.captured["scores"].detach()
    doc = torch.tensor(ids)

    def restarted(b: int, h: int, i: int) -> list[Key]:
        return [keys_with_gate("kv", j, m) for j, m in gates_of(u[b, 0], K, i, 0, ids).items()]

    def masked(b: int, h: int, i: int) -> list[Key]:
        return [keys_with_gate("kv", j, m) for j, m in gates_of(u[b, 0], K, i).items() if ids[j] == ids[i]]

    outs = []
    for text, sees in ((f"sparsek({K}, segments='doc')", restarted), (f"document & sparsek({K})", masked)):
        wanted, _ = naive_attention(query, key, value, sees)
        got: Any = fs.reference(text, query, key, value, scores=u, doc=doc)
        assert torch.allclose(got, wanted, rtol=0, atol=1e-14)
        outs.append(got)
    assert not torch.allclose(*outs), "the two are different patterns"


def perturbed(change: str) -> Callable[..., Any]:
    """The hybrid with one mistake of the kind that implementations make."""

    def see(u: Tensor, i: int) -> list[Key]:
        after, first = WINDOW, window(i)
        if change == "window one short":
            first = window(i)[1:]
        if change == "after one early":
            after = WINDOW - 1
        at = i - 1 if change == "tau of the prefix before" and i > WINDOW else i
        gates = gates_of(u, K, at, after)
        if change == "tau of the prefix before":
            keys = gates_of(u, K, i, after)
            gates = {j: gates.get(j, m) for j, m in keys.items()}
        if change == "tau detached":
            gates = {j: m.detach() for j, m in gates.items()}
        selected = [keys_with_gate("kv", j, m) for j, m in gates.items() if j not in first]
        if change == "no gate on V":
            selected = [Key(k.index, on_k=k.on_k) for k in selected]
        if change == "no gate on K":
            selected = [Key(k.index, on_v=k.on_v) for k in selected]
        if change == "the last key dropped":
            selected = selected[:-1]
        return [Key(j) for j in first] + selected

    return naive(see)


HYBRID = f"sliding_window({WINDOW}) | sparsek({K}, after={WINDOW})"


def test_the_unperturbed_hybrid_passes() -> None:
    assert_same_result(run(perturbed("nothing"), inputs()), run(oracle(HYBRID), inputs()))


@pytest.mark.parametrize(
    "change",
    [
        "window one short",
        "after one early",
        "tau of the prefix before",
        "tau detached",
        "no gate on V",
        "no gate on K",
        "the last key dropped",
    ],
)
def test_a_wrong_implementation_is_caught(change: str) -> None:
    with pytest.raises(AssertionError):
        assert_same_result(run(perturbed(change), inputs()), run(oracle(HYBRID), inputs()))


def changed(result: Result, name: str, by: float) -> Result:
    """The result with one element of one part off by ``by``."""
    parts = {"out": result.out.clone(), "lse": result.lse.clone()}
    gradients = {n: None if g is None else g.clone() for n, g in result.gradients.items()}
    target = parts[name] if name in parts else gradients[name]
    assert target is not None
    target.view(-1)[-1] += by
    return Result(parts["out"], parts["lse"], gradients)


@pytest.mark.parametrize("name", ["out", "lse", "query", "key", "value", "scores"])
def test_the_comparison_sees_every_part_to_the_last_digits(name: str) -> None:
    right = run(oracle(HYBRID), inputs())
    assert_same_result(changed(right, name, 1e-15), right)
    with pytest.raises(AssertionError, match=name):
        assert_same_result(changed(right, name, 1e-10), right)
    with pytest.raises(AssertionError, match="NaN"):
        assert_same_result(changed(right, name, float("nan")), right)


def test_the_oracle_differentiates_to_second_order() -> None:
    few = make_inputs(["scores"], size=5, batch=1, heads=1, kv_heads=1, head_dim=2)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Any:
        return fs.reference("causal.score(softcap(2.0))", query, key, value)

    assert torch.autograd.gradcheck(attend, (few.query, few.key, few.value))
    assert torch.autograd.gradgradcheck(attend, (few.query, few.key, few.value))


def test_the_oracle_gives_the_callers_dtype_and_a_wide_lse() -> None:
    for dtype, wide in (
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
    ):
        some = make_inputs(size=5).to(dtype)
        out, lse = fs.reference("causal", some.query, some.key, some.value, return_lse=True)
        assert (out.dtype, lse.dtype) == (dtype, wide)


@pytest.mark.parametrize("spread", [1.0, 30.0, 300.0])
def test_the_oracles_gates_are_those_of_exact_fractions(spread: float) -> None:
    """Widely spread scores leave plateaus between the events, of which tau is the lower end."""
    generator = torch.Generator().manual_seed(0)
    for size, k in itertools.product((2, 3, 6, 11), (1, 2, 4)):
        z = spread * torch.randn(size, generator=generator, dtype=torch.float64)
        gates, tau = sorted_gates(z, k)
        wanted = torch.tensor([float(g) for g in exact_gates(z.tolist(), k)], dtype=torch.float64)
        assert float((gates - wanted).abs().max()) <= 1e-12 * spread
        assert float(tau) == pytest.approx(exact_prefix_taus(z.tolist(), k)[-1], abs=1e-12 * spread)


def test_the_oracle_ignores_no_name() -> None:
    query, key, value = torch.randn(3, 1, 2, 8, 4)
    window = "sliding_window(scalar('window', 3))"
    with pytest.raises(CapturedError, match=r"windw: got a name that the pattern does not use.*Did you mean 'window'"):
        fs.reference(window, query, key, value, windw=2)
    with pytest.raises(CapturedError, match="docs: got a name"):
        fs.reference("causal", query, key, value, docs=torch.zeros(8))
    with pytest.raises(CapturedError, match="lengths: got a name that the pattern does not use, expected none"):
        fs.dense_mask("causal", 8, lengths=torch.tensor([3]))
    assert fs.dense_mask(window, 8, window=2).sum() == 15
