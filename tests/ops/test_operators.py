"""The causal operators as PyTorch operators: under compile, vmap, autocast, and with slots that hold."""

from __future__ import annotations

import math
from typing import Any, cast

import pytest
import torch
from torch._subclasses import FakeTensorMode

from flexsparse.errors import DtypeError, GradientError, PatternArgumentError, ShapeError
from flexsparse.ops import (
    causal_capped_softmax,
    causal_select,
    causal_sparsek,
    causal_topk,
    dense_gates,
    gates,
    slot_table,
    sparsek,
)
from tests.ops.regimes import REGIMES, draw

IDS = torch.tensor([0] * 9 + [1] * 1 + [2] * 30)


def test_one_call_gives_the_slot_table_too() -> None:
    u = torch.randn(2, 3, 50)
    thresholds, selection, table = causal_select(u, 4, 3, chunk=16)
    assert table.shape == (2, 3, 4, 4)
    assert torch.equal(table, slot_table(selection, 4, 16))
    assert torch.equal(thresholds.tau, causal_sparsek(u, 4, 3).tau)
    mapped = torch.func.vmap(lambda row: causal_select(row, 4, 3, validate=False, chunk=16)[2])(u)
    assert torch.equal(mapped, table)
    with pytest.raises(PatternArgumentError, match="chunk: got 0"):
        causal_select(u, 4, chunk=0)


@pytest.mark.parametrize("segments", [None, IDS.expand(2, 40)])
def test_operators_pass_torchs_own_checks(segments: Any) -> None:
    u = torch.randn(2, 40, requires_grad=True)
    # The gradient is checked in test_causal; opcheck's own compares it under AOT autograd with the eager one.
    torch.library.opcheck(torch.ops.flexsparse.causal_selection.default, (u, 5, 2, segments, True, True, 16))
    _, lived = causal_select(u.detach(), 5, 2, segments)
    torch.library.opcheck(torch.ops.flexsparse.slot_table.default, (*lived, 5, 16))


def test_compile_takes_the_whole_graph_with_gradients() -> None:
    def loss(u: torch.Tensor) -> torch.Tensor:
        tau = causal_sparsek(u, 4, 3, IDS, validate=False).tau
        birth, death, _ = causal_topk(u, 4, 3, IDS, validate=False)
        return torch.where(torch.isinf(tau), 0.0, tau).square().sum() + (death - birth).sum()

    u = torch.randn(3, 40, requires_grad=True)
    found = []
    for run in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        value = run(u)
        found.append((value, *torch.autograd.grad(value, u)))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("name", ["sparsek", "causal_selection", "capped_softmax"])
def test_what_a_graph_is_promised_of_an_operator_is_what_it_gives(name: str) -> None:
    """Strides too, whatever those of its input are: Inductor computes with them."""
    u = torch.randn(9, 4).t()
    operator = getattr(torch.ops.flexsparse, name).default
    rest: dict[str, Any] = {
        "sparsek": (3,),
        "causal_selection": (3, 1, None, True, True, 2),
        "capped_softmax": (3, 1, None),
    }
    mode = FakeTensorMode()
    with mode:
        promised = operator(mode.from_tensor(u), *rest[name])
    given = operator(u, *rest[name])
    assert [(x.shape, x.stride(), x.dtype) for x in given] == [(x.shape, x.stride(), x.dtype) for x in promised]


@pytest.mark.parametrize("operator", [sparsek, causal_sparsek, causal_capped_softmax])
def test_derivatives_in_forward_mode_are_refused_not_dropped(operator: Any) -> None:
    u = torch.randn(12)
    with pytest.raises(GradientError, match="got a tensor with a forward-mode derivative"):
        torch.func.jvp(lambda x: operator(x, 3), (u,), (u,))


def test_a_gate_that_stays_0_has_no_gradient() -> None:
    """With k = 1 tau is the best score that is not selected, as long as the best is more than 1 above it."""
    u = torch.tensor([5.0, 0.0, 0.25], dtype=torch.float64, requires_grad=True)
    query = torch.tensor([2, 2, 2])

    def found(x: torch.Tensor) -> torch.Tensor:
        return gates(x, causal_sparsek(x, 1).tau, query, torch.arange(3))

    assert torch.equal(found(u), sparsek(u, 1))
    for shown in (found(u), dense_gates(u, causal_sparsek(u, 1).tau)[2]):
        (gradient,) = torch.autograd.grad(shown.sum(), u)
        assert torch.equal(gradient, torch.zeros(3, dtype=torch.float64))
    assert torch.autograd.gradcheck(found, (u,))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda u, at: sparsek(u, 1, dim=3), ShapeError, "dim: got 3, expected an integer from -1 to 0."),
        (
            lambda u, at: sparsek(u, 1, dim=cast(Any, None)),
            ShapeError,
            "dim: got None, expected an integer from -1 to 0.",
        ),
        (
            lambda u, at: gates(u, cast(Any, causal_sparsek(u, 2)), at, at),
            DtypeError,
            "tau: got CausalThresholds, expected a tensor. Take its .tau.",
        ),
        (lambda u, at: gates(u.int(), u, at, at), DtypeError, "u: got torch.int32, expected a tensor of real numbers."),
        (
            lambda u, at: gates(u, u, cast(Any, [1]), at),
            ShapeError,
            "query_index: got list, expected a tensor of positions [..., N].",
        ),
        (lambda u, at: dense_gates(u.sum(), u.sum()), ShapeError, "u: got a scalar, expected [..., S]."),
        (
            lambda u, at: gates(u.expand(2, 6), u.expand(2, 6), at.expand(3, 2), at.expand(3, 2)),
            ShapeError,
            "key_index: got shape (3, 2) beside query_index (3, 2), expected [..., N] whose leading dimensions "
            "broadcast with u's (2,).",
        ),
        (
            lambda u, at: slot_table(cast(Any, u), 1, 1),
            DtypeError,
            "selection: got Tensor, expected a CausalSelection, as causal_topk gives it.",
        ),
    ],
)
def test_what_the_others_refuse(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        call(torch.randn(6), torch.tensor([1, 2]))
    assert str(caught.value) == message


def test_budgets_beyond_64_bits_are_the_whole_row() -> None:
    u = torch.randn(6)
    assert torch.equal(sparsek(u, 10**30), torch.ones(6))
    assert torch.equal(causal_sparsek(u, 10**30, 10**30).tau, causal_sparsek(u, 6, 6).tau)


def test_vmap_is_a_batch_dimension() -> None:
    u = torch.randn(2, 3, 5, 40)
    for dim in (0, 1):
        got = torch.func.vmap(lambda x: causal_sparsek(x, 4, 1, IDS, validate=False).tau, in_dims=dim, out_dims=dim)(u)
        assert torch.equal(got, causal_sparsek(u, 4, 1, IDS).tau)


def test_autocast_changes_nothing() -> None:
    u = torch.randn(2, 40)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tau = causal_sparsek(u, 4).tau
    assert tau.dtype is torch.float32
    assert torch.equal(tau, causal_sparsek(u, 4).tau)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_scores_are_taken_as_they_are(dtype: torch.dtype) -> None:
    u = torch.randn(2, 40).to(dtype).requires_grad_()
    tau = causal_sparsek(u, 4).tau
    assert tau.dtype is torch.float32
    assert torch.equal(tau, causal_sparsek(u.detach().float(), 4).tau)
    (gradient,) = torch.autograd.grad(tau[:, 5:].sum(), u)
    assert gradient.dtype is dtype


def test_both_at_once_are_each_alone() -> None:
    u = torch.randn(2, 40)
    thresholds, selection = causal_select(u, 4, 3, IDS)
    for one, other in zip(thresholds, causal_sparsek(u, 4, 3, IDS), strict=True):
        assert torch.equal(one, other)
    for one, other in zip(selection, causal_topk(u, 4, 3, IDS), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("segments", [None, IDS])
def test_a_slot_holds_one_key_at_a_time_and_the_table_finds_it(regime: str, segments: Any) -> None:
    k, after, chunk = 5, 2, 4
    u = draw(regime, 40, 3)
    selection = causal_topk(u, k, after, segments)
    birth, death, slot = (x.tolist() for x in selection)
    table = slot_table(selection, k, chunk).tolist()
    for query in range(40):
        alive = [j for j in range(40) if birth[j] <= query < death[j]]
        held = [slot[j] for j in alive]
        assert len(set(held)) == len(held)
        assert all(0 <= s < k for s in held)
        if query % chunk == 0:
            wanted = [-1] * k
            for j in alive:
                wanted[slot[j]] = j
            assert table[query // chunk] == wanted
    assert all(slot[j] == -1 for j in range(40) if birth[j] == death[j])


def test_gates_of_chosen_pairs_are_entries_of_the_dense_form() -> None:
    u = torch.randn(2, 3, 12, dtype=torch.float64)
    tau = causal_sparsek(u, 4).tau
    dense = dense_gates(u, tau)
    queries, keys = torch.randint(0, 12, (2, 2, 3, 50)).unbind(0)
    assert torch.equal(gates(u, tau, queries, keys), dense.flatten(-2).gather(-1, 12 * queries + keys))
    # A shared list of pairs, and empty slots.
    pairs = gates(u, tau, torch.tensor([7, 7, 7]), torch.tensor([3, -1, 0]))
    assert torch.equal(pairs[..., 0], dense[..., 7, 3])
    assert (pairs[..., 1] == 0).all()


def test_gates_at_infinities() -> None:
    u = torch.tensor([math.inf, -math.inf, 0.0])
    tau = torch.tensor([-math.inf, math.inf, 0.5])
    assert dense_gates(u, tau).tolist() == [[1.0, 0.0, 1.0], [1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]


def test_gradients_flow_through_the_gates_and_sum_to_zero_where_nothing_saturates() -> None:
    u = torch.randn(9, dtype=torch.float64, requires_grad=True)

    def total(x: torch.Tensor) -> torch.Tensor:
        tau = causal_sparsek(x, 2).tau
        keys = torch.arange(9)
        return (gates(x, tau, torch.full((9,), 8), keys) * torch.linspace(-1, 1, 9, dtype=torch.float64)).sum()

    assert torch.autograd.gradcheck(total, (u,))
    (gradient,) = torch.autograd.grad(total(u), u)
    assert abs(float(gradient.sum())) < 1e-12


def test_bad_input_is_refused_in_words() -> None:
    u = torch.zeros(3, 8)
    with pytest.raises(ShapeError, match=r"tau: got shape \(3, 7\), expected u's shape, \(3, 8\)"):
        gates(u, u[:, :7], torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long))
    with pytest.raises(DtypeError, match=r"key_index: got torch\.float32, expected integers"):
        gates(u, u, torch.zeros(1, dtype=torch.long), torch.zeros(1))
    with pytest.raises(ShapeError, match=r"key_index: got shape \(2, 4\) beside query_index \(5,\)"):
        gates(u, u, torch.zeros(5, dtype=torch.long), torch.zeros(2, 4, dtype=torch.long))
    last = torch.tensor([7])
    with pytest.raises(PatternArgumentError, match="key_index: got 8, expected positions below 8"):
        gates(u, u, last, last + 1)
    with pytest.raises(PatternArgumentError, match="query_index: got -1, expected positions from 0 to 7"):
        gates(u, u, last - 8, last)
    with pytest.raises(PatternArgumentError, match="chunk: got 0, expected an integer of at least 1"):
        slot_table(causal_topk(u, 2), 2, 0)


def test_a_second_derivative_is_refused_by_name_under_any_batch() -> None:
    u = torch.randn(2, 9, requires_grad=True)
    (first,) = torch.autograd.grad(causal_sparsek(u, 2).tau[:, 3:].square().sum(), u, create_graph=True)
    with pytest.raises(GradientError, match="a second derivative of tau in u"):
        first.sum().backward()
