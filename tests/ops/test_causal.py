"""``causal_sparsek`` and ``causal_topk`` against their naive twins, in every regime, prefix by prefix."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from flexsparse.errors import GradientError
from flexsparse.ops import causal_sparsek, causal_topk, sparsek
from tests.ops.regimes import REGIMES, draw, grid_step
from tests.twins import candidates, differentiable_prefix_tau, exact_gates, exact_prefix_taus, exact_selection

SIZE = 29
IDS = [0] * 3 + [1] + [4] * 11 + [5, 6] + [9] * 12
SETTINGS = list(itertools.product([1, 2, 5, 40, 10**9], [0, 1, 5, 30], [None, IDS]))


def assert_same_taus(got: Tensor, wanted: list[float], allowed: float) -> None:
    expected = torch.tensor(wanted, dtype=torch.float64)
    infinite = torch.isinf(expected)
    assert torch.equal(torch.isinf(got), infinite)
    assert torch.equal(got[infinite].double(), expected[infinite])
    assert not torch.isnan(got).any()
    if not infinite.all():
        assert float((got.double() - expected)[~infinite].abs().max()) <= allowed


def selected(u: Tensor, k: int, after: int = 0, segments: Tensor | None = None) -> list[set[int]]:
    """The keys that each query selects, from the lifetimes of one row."""
    birth, death, _ = (x.tolist() for x in causal_topk(u, k, after, segments))
    return [{j for j in range(len(birth)) if birth[j] <= i < death[j]} for i in range(len(birth))]


@pytest.mark.parametrize("regime", REGIMES)
def test_taus_are_the_exact_ones(regime: str) -> None:
    u = draw(regime, SIZE)
    for k, after, ids in SETTINGS:
        segments = None if ids is None else torch.tensor(ids)
        wanted = exact_prefix_taus(u.tolist(), k, after, ids)
        assert_same_taus(causal_sparsek(u, k, after, segments).tau, wanted, grid_step(u))


@pytest.mark.parametrize("regime", REGIMES)
def test_lifetimes_are_the_hard_top_k(regime: str) -> None:
    u = draw(regime, SIZE)
    for k, after, ids in SETTINGS:
        segments = None if ids is None else torch.tensor(ids)
        assert selected(u, k, after, segments) == exact_selection(u.tolist(), k, after, ids)


def test_long_rows_agree_with_one_row_at_a_time() -> None:
    for regime in ("normal", "position slope", "widely spread", "integers"):
        u = draw(regime, 300)
        tau = causal_sparsek(u, 17).tau
        for i in (16, 17, 18, 100, 299):
            gates = (u[: i + 1] - tau[i]).clamp(0, 1)
            assert float((gates - sparsek(u[: i + 1], 17)).abs().max()) <= 2 * grid_step(u)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_scores_give_float32_taus_of_the_rounded_scores(dtype: torch.dtype) -> None:
    u = (draw("normal", SIZE) * 4).to(dtype)
    tau = causal_sparsek(u, 4).tau
    assert tau.dtype is torch.float32
    largest = float(u.abs().max()) + 1
    # The thresholds are computed exactly and rounded once to float32.
    assert_same_taus(tau, exact_prefix_taus(u.double().tolist(), 4), largest * torch.finfo(torch.float32).eps)
    assert selected(u, 4) == exact_selection(u.double().tolist(), 4)


def test_batches_and_strides_give_what_single_rows_give() -> None:
    wide = torch.randn(2, 3, 2 * SIZE, dtype=torch.float64)
    for view in (wide, wide[..., ::2], wide[:, ::2, 5:], wide.transpose(0, 1), wide[:1].expand(4, 3, 2 * SIZE)):
        tau, (birth, death, _) = causal_sparsek(view, 3, 2).tau, causal_topk(view, 3, 2)
        assert tau.shape == birth.shape == death.shape == view.shape
        for row, column in itertools.product(range(view.shape[0]), range(view.shape[1])):
            alone = view[row, column].clone()
            assert_same_taus(tau[row, column], causal_sparsek(alone, 3, 2).tau.tolist(), grid_step(alone))
            assert torch.equal(death[row, column], causal_topk(alone, 3, 2).death)


def test_segments_broadcast_over_batch_and_heads() -> None:
    u = torch.randn(2, 3, SIZE, dtype=torch.float64)
    ids = torch.stack([torch.tensor(IDS), torch.arange(SIZE) // 10])
    tau = causal_sparsek(u, 3, 1, ids[:, None]).tau
    for row, column in itertools.product(range(2), range(3)):
        wanted = exact_prefix_taus(u[row, column].tolist(), 3, 1, ids[row].tolist())
        assert_same_taus(tau[row, column], wanted, grid_step(u))


@pytest.mark.parametrize("regime", ["normal", "integers", "rising", "some -inf", "some +inf", "heavy ties"])
def test_tau_never_falls_within_a_segment(regime: str) -> None:
    u = draw(regime, 200)
    tau = causal_sparsek(u, 9).tau
    steps = torch.where(tau[1:] == tau[:-1], 0.0, tau[1:] - tau[:-1])
    assert float(steps.min()) >= 0


@pytest.mark.parametrize("regime", REGIMES)
def test_at_most_k_lifetimes_overlap_and_each_is_one_interval_in_its_segment(regime: str) -> None:
    u, segments = draw(regime, SIZE), torch.tensor(IDS)
    for k, after in ((1, 0), (3, 2), (40, 0)):
        birth, death, _ = causal_topk(u, k, after, segments)
        assert birth.dtype is torch.int32
        assert (death >= birth).all()
        alive = [(birth <= i) & (i < death) for i in range(SIZE)]
        assert max(int(a.sum()) for a in alive) <= k
        for i, a in enumerate(alive):
            assert (segments[a] == segments[i]).all()
        # After its birth, and before it dies, a key is never missing: eviction is final.
        assert (birth == torch.minimum(torch.arange(SIZE) + after, ends(segments))).all()


def ends(segments: Tensor) -> Tensor:
    """The position after each position's segment."""
    return torch.tensor([int((segments <= s).sum()) for s in segments])


@pytest.mark.parametrize("regime", ["normal", "nearly equal", "widely spread", "integers", "position slope"])
def test_hard_top_k_lies_inside_the_soft_support_with_gates_of_at_least_a_share(regime: str) -> None:
    u = draw(regime, 60)
    for k in (1, 4, 30):
        tau = causal_sparsek(u, k).tau
        for i, keys in enumerate(exact_selection(u.tolist(), k)):
            for j in keys:
                gate = min(1.0, float(u[j] - tau[i]))
                assert gate >= 1 / max(1, i + 1 - k + 1) - 2 * grid_step(u)


def test_support_can_be_the_whole_prefix() -> None:
    u = draw("nearly equal", 50)
    tau = causal_sparsek(u, 3).tau
    assert int((u > tau[-1]).sum()) == 50


def test_queries_without_candidates_select_nothing() -> None:
    u = torch.randn(8, dtype=torch.float64)
    assert causal_sparsek(u, 2, 3).tau[:3].tolist() == [-math.inf] * 3
    assert selected(u, 2, 3)[:3] == [set(), set(), set()]
    assert causal_sparsek(u, 2, 100).tau.tolist() == [-math.inf] * 8
    assert selected(u, 2, 100) == [set()] * 8


def test_more_than_k_infinite_scores_keep_the_earliest() -> None:
    u = torch.tensor([1.0, math.inf, math.inf, 5.0, math.inf])
    assert causal_sparsek(u, 2).tau.tolist() == [-math.inf, -math.inf, 1.0, 5.0, math.inf]
    assert selected(u, 2) == [{0}, {0, 1}, {1, 2}, {1, 2}, {1, 2}]


def test_one_position() -> None:
    u = torch.tensor([0.25])
    assert causal_sparsek(u, 1).tau.tolist() == [-math.inf]
    assert selected(u, 1) == [{0}]
    assert selected(torch.tensor([-math.inf]), 1) == [set()]


def gradient_by_autograd(u: Tensor, flow: Tensor, k: int, after: int, ids: list[int] | None) -> Tensor:
    """The gradient of the dense sorted formula, one prefix at a time; 0 where no gate lies strictly between."""
    leaf = u.clone().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for i in range(len(u)):
        tau = differentiable_prefix_tau(leaf, k, i, after, ids)
        if tau is not None:
            total = total + flow[i] * tau
    if total.requires_grad:
        total.backward()
    return torch.zeros_like(u) if leaf.grad is None else leaf.grad


@pytest.mark.parametrize("regime", REGIMES)
def test_gradient_is_that_of_the_sorted_formula(regime: str) -> None:
    u = draw(regime, SIZE)
    flow = torch.randn(SIZE, dtype=torch.float64)
    for k, after, ids in SETTINGS:
        leaf = u.clone().requires_grad_()
        causal_sparsek(leaf, k, after, None if ids is None else torch.tensor(ids)).tau.backward(flow)
        assert leaf.grad is not None
        error = (leaf.grad - gradient_by_autograd(u, flow, k, after, ids)).abs().max()
        # Differences of cumulative sums of 29 shares.
        assert float(error) <= 4 * SIZE * SIZE * 2.0**-53 * float(flow.abs().max())


def clear_of_kinks(k: int, size: int, after: int) -> Tensor:
    for seed in range(200):
        u = draw("normal", size, seed)
        taus = exact_prefix_taus(u.tolist(), k, after)
        gaps = [
            abs(float(u[j]) - t - s) for i, t in enumerate(taus) for j in candidates(i, after, None) for s in (0, 1)
        ]
        if min(gaps) > 1e-4:
            return u.requires_grad_()
    raise AssertionError("no row found")


@pytest.mark.parametrize(("k", "after"), [(1, 0), (3, 0), (2, 2)])
def test_gradcheck_away_from_kinks(k: int, after: int) -> None:
    u = clear_of_kinks(k, 9, after)

    def finite_taus(x: Tensor) -> Tensor:
        tau = causal_sparsek(x, k, after).tau
        return tau[torch.isfinite(tau)]

    assert torch.autograd.gradcheck(finite_taus, (u,), eps=1e-6, atol=1e-8)


def test_infinite_scores_and_infinite_taus_receive_no_gradient() -> None:
    u = torch.tensor([0.5, math.inf, -math.inf, 0.25, 0.1], dtype=torch.float64, requires_grad=True)
    causal_sparsek(u, 2).tau.backward(torch.ones(5, dtype=torch.float64))
    assert u.grad is not None
    assert u.grad[1] == 0
    assert u.grad[2] == 0
    assert torch.isfinite(u.grad).all()
    assert float(u.grad.abs().sum()) > 0


def test_second_derivative_is_refused() -> None:
    u = torch.randn(9, dtype=torch.float64, requires_grad=True)
    tau = causal_sparsek(u, 2).tau
    (first,) = torch.autograd.grad((tau[2:] ** 2).sum(), u, create_graph=True)
    with pytest.raises(GradientError, match="causal_sparsek: got a second derivative of tau in u, expected first"):
        first.sum().backward()


def test_gates_of_a_prefix_sum_to_k() -> None:
    u = draw("position slope", 150)
    tau = causal_sparsek(u, 11).tau
    for i in range(11, 150):
        gates = exact_gates(u[: i + 1].tolist(), 11) if i % 50 == 0 else (u[: i + 1] - tau[i]).clamp(0, 1).tolist()
        assert math.fsum(gates) == pytest.approx(11, abs=(i + 1) * grid_step(u))


def test_two_runs_give_the_same_bits() -> None:
    u = torch.randn(3, 400, requires_grad=True)
    flow = torch.randn(3, 400)
    runs = []
    for _ in range(2):
        tau = causal_sparsek(u, 20, 3).tau
        runs.append((tau, *torch.autograd.grad(tau, u, torch.where(torch.isfinite(tau), flow, 0.0))))
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


def test_uninitialised_memory_is_never_read(poisoned_memory: None) -> None:
    u = draw("integers", SIZE)
    tau = causal_sparsek(u, 3, 1, torch.tensor(IDS)).tau
    assert_same_taus(tau, exact_prefix_taus(u.tolist(), 3, 1, IDS), grid_step(u))
    assert selected(u, 3, 1, torch.tensor(IDS)) == exact_selection(u.tolist(), 3, 1, IDS)
