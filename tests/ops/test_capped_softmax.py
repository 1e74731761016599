"""``causal_capped_softmax`` against a float64 form of one prefix at a time, in every regime."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from flexsparse.errors import GradientError, NonFiniteScoresError, PatternArgumentError
from flexsparse.ops import causal_capped_softmax, causal_sparsek, dense_gates, gates
from tests.ops.regimes import FINITE, REGIMES, draw
from tests.twins import candidates, exact_selection, prefix_tau

SIZE = 29
IDS = [0] * 3 + [1] + [4] * 11 + [5, 6] + [9] * 12
SETTINGS = list(itertools.product([1, 2, 5, 40, 10**9], [0, 1, 5, 30], [None, IDS]))


@pytest.mark.parametrize("regime", REGIMES)
def test_taus_and_gradients_are_those_of_one_prefix_at_a_time(regime: str) -> None:
    u = draw(regime, SIZE)
    flow = torch.randn(SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for k, after, ids in SETTINGS:
        mine, theirs = u.clone().requires_grad_(), u.clone().requires_grad_()
        got = causal_capped_softmax(mine, k, after, None if ids is None else torch.tensor(ids)).tau
        wanted = torch.stack([prefix_tau(theirs[candidates(i, after, ids)], k) for i in range(SIZE)])
        finite = torch.isfinite(wanted)
        assert torch.equal(got[~finite], wanted[~finite]), (k, after)
        if not finite.any():
            continue
        # Sums of at most 29 exponentials, in another order, and their logarithm.
        scale = wanted[finite].detach().abs().clamp(min=1)
        assert float(((got - wanted).detach()[finite].abs() / scale).max()) <= 2.0**-46
        (a,) = torch.autograd.grad(got[finite], mine, flow[finite])
        (b,) = torch.autograd.grad(wanted[finite], theirs, flow[finite])
        # Shares differ by the rounding of the scores' differences.
        allowed = SIZE**2 * 2.0**-50 * min(float(scale.max()), 1e5)
        assert float((a - b).abs().max()) <= allowed, (k, after, ids is not None)


@pytest.mark.parametrize("regime", FINITE)
def test_gates_sum_to_k_and_selected_ones_are_at_least_a_share(regime: str) -> None:
    u = draw(regime, 60)
    for k in (1, 4, 30):
        tau = causal_capped_softmax(u, k).tau
        dense = dense_gates(u, tau, form="capped_softmax")
        for i, keys in enumerate(exact_selection(u.tolist(), k)):
            row = dense[i, : i + 1]
            wide = float(u.abs().max()) > 1e6  # there a rounding of tau is larger than 1
            if not wide:
                assert float(row.sum()) == pytest.approx(min(k, i + 1), abs=1e-9)
                assert min(float(row[j]) for j in keys) >= 1 / max(1, i + 2 - k) - 1e-9
        step = torch.where(tau[1:] == tau[:-1], 0.0, tau[1:] - tau[:-1])
        assert float(step.min()) >= -(2.0**-46) * max(1.0, float(u.abs().max())), "tau never falls: eviction is final"


def test_a_long_row_agrees_with_bisection_of_chosen_prefixes() -> None:
    u = draw("position slope", 3000)
    tau = causal_capped_softmax(u, 40, 7).tau
    for i in (46, 47, 48, 1000, 2999):
        z = u[: i - 6]
        low, high = float(z.min()) - 1, float(z.max()) + 10
        for _ in range(80):
            middle = (low + high) / 2
            total = float((z - middle).clamp(max=0).exp().sum())
            low, high = (middle, high) if total > 40 else (low, middle)
        if len(z) > 40:
            assert float(tau[i]) == pytest.approx(high, abs=1e-11)
        else:
            assert tau[i] == -math.inf


def test_gradcheck_through_the_gates() -> None:
    u = draw("normal", 9, 3).requires_grad_()

    def total(x: Tensor) -> Tensor:
        tau = causal_capped_softmax(x, 3, 1).tau
        pairs = torch.arange(9)
        return (gates(x, tau, torch.full((9,), 8), pairs, form="capped_softmax") * torch.linspace(-1, 1, 9)).sum()

    assert torch.autograd.gradcheck(total, (u,), eps=1e-6, atol=1e-7)


def test_pytorch_takes_it_as_an_operator_of_its_own() -> None:
    u = torch.randn(2, 3, 20, requires_grad=True)
    torch.library.opcheck(
        torch.ops.flexsparse.capped_softmax.default, (torch.randn(3, 20, requires_grad=True), 4, 1, None)
    )

    def loss(x: Tensor) -> Any:
        tau = causal_capped_softmax(x, 4, 1, validate=False).tau
        return torch.where(torch.isinf(tau), 0.0, tau).square().sum()

    found = [torch.autograd.grad(run(u), u)[0] for run in (loss, torch.compile(loss, fullgraph=True, backend="eager"))]
    assert torch.equal(*found)
    alone = causal_capped_softmax(u[1, 2], 4, 1)
    assert torch.equal(causal_capped_softmax(u, 4, 1).tau[1, 2], alone.tau)
    assert torch.equal(alone.candidates, causal_sparsek(u[1, 2], 4, 1).candidates)
    mapped = torch.func.vmap(lambda x: causal_capped_softmax(x, 4, 1, validate=False).tau, in_dims=1)(u)
    assert torch.equal(mapped, causal_capped_softmax(u.movedim(1, 0), 4, 1).tau)


def test_bad_input_is_refused_in_words() -> None:
    u = torch.randn(9, requires_grad=True)
    tau = causal_capped_softmax(u, 2).tau
    (first,) = torch.autograd.grad(tau[3:].square().sum(), u, create_graph=True)
    with pytest.raises(GradientError, match="causal_capped_softmax: got a second derivative of tau in u"):
        first.sum().backward()
    bad = torch.tensor([1.0, math.nan, 0.0])
    with pytest.raises(NonFiniteScoresError, match=r"u: got NaN at \(1,\)"):
        causal_capped_softmax(bad, 1)
    assert torch.isnan(causal_capped_softmax(bad, 1, validate=False).tau).tolist() == [False, True, True]
    with pytest.raises(PatternArgumentError, match="form: got 'softmax', expected one of 'sparsek', 'capped_softmax'"):
        dense_gates(u, tau, form="softmax")
