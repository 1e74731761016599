"""``sparsek`` of single rows against exact fractions, and the properties that define it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from flexsparse.errors import DtypeError, GradientError, NonFiniteScoresError, PatternArgumentError, ShapeError
from flexsparse.ops import sparsek
from tests.ops.regimes import FINITE, REGIMES, draw, grid_step
from tests.twins import differentiable_gates, exact_gates, exact_tau

BUDGETS = [1, 2, 3, 7, 12, 13, 14, 10**9]


def exact(z: Tensor, k: int) -> Tensor:
    return torch.tensor([float(g) for g in exact_gates(z.tolist(), k)], dtype=torch.float64)


@pytest.mark.parametrize("size", [1, 2, 13])
@pytest.mark.parametrize("regime", REGIMES)
def test_gates_are_the_exact_ones(regime: str, size: int) -> None:
    for seed in range(3):
        z = draw(regime, size, seed)
        for k in BUDGETS:
            error = float((sparsek(z, k) - exact(z, k)).abs().max())
            assert error <= grid_step(z), f"k={k}, seed={seed}: {error}"


@pytest.mark.parametrize("regime", FINITE)
def test_gates_sum_to_k(regime: str) -> None:
    z = torch.stack([draw(regime, 129, seed) for seed in range(3)])
    for k in (1, 2, 64, 128):
        total = sparsek(z, k).sum(-1)
        # Each of 129 gates may carry the rounding of its row.
        assert float((total - k).abs().max()) <= 129 * max(grid_step(row) for row in z)
    assert (sparsek(z, 129) == 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_low_precision_scores_give_float32_gates_of_the_rounded_scores(dtype: torch.dtype) -> None:
    z = (draw("normal", 40) * 3).to(dtype)
    gates = sparsek(z, 5)
    assert gates.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    wanted = exact(z.double(), 5)
    # Gates are at most 1, and rounded once.
    assert float((gates.double() - wanted).abs().max()) <= max(torch.finfo(gates.dtype).eps, grid_step(z.double()))


def test_k_of_one_is_sparsemax() -> None:
    z = draw("normal", 30)
    ordered = z.sort(descending=True).values
    support = max(j for j in range(1, 31) if 1 + j * ordered[j - 1] > ordered[:j].sum())
    tau = (ordered[:support].sum() - 1) / support
    assert float((sparsek(z, 1) - (z - tau).clamp(min=0)).abs().max()) <= grid_step(z)


def test_a_plateau_takes_the_lower_end() -> None:
    # Two gates of 1 and a gap of 5: every tau in [0, 4] gives the sum 2, and the least is taken.
    assert exact_tau([5.0, 5.0, 0.0], 2) == 0
    assert sparsek(torch.tensor([5.0, 5.0, 0.0]), 2).tolist() == [1.0, 1.0, 0.0]


def test_integers_sit_on_kinks_exactly() -> None:
    z = torch.tensor([3.0, 2.0, 1.0, 0.0, -1.0])
    assert sparsek(z, 2).tolist() == [1.0, 1.0, 0.0, 0.0, 0.0]
    assert sparsek(torch.tensor([1.0, 1.0, 0.0, 0.0]), 3).tolist() == [1.0, 1.0, 0.5, 0.5]


def test_infinities_follow_their_rules() -> None:
    inf = math.inf
    assert sparsek(torch.tensor([inf, inf, inf, 9.0]), 2).tolist() == [1.0, 1.0, 0.0, 0.0]
    assert sparsek(torch.tensor([9.0, inf, inf]), 2).tolist() == [0.0, 1.0, 1.0]
    assert sparsek(torch.tensor([-inf, 0.5, inf]), 2).tolist() == [0.0, 1.0, 1.0]
    # -inf is no candidate while n <= k as well: this is how padding is left out.
    assert sparsek(torch.tensor([-inf, 0.5, 0.25]), 9).tolist() == [0.0, 1.0, 1.0]
    assert sparsek(torch.tensor([-inf, -inf]), 1).tolist() == [0.0, 0.0]


def test_shift_invariance_and_permutation_equivariance() -> None:
    z = draw("half integers", 33)
    order = torch.randperm(33)
    for k in (1, 4, 20):
        shifted = sparsek(z + 1024.0, k)
        assert float((shifted - sparsek(z, k)).abs().max()) <= grid_step(z + 1024.0)
        assert torch.equal(shifted == 1, sparsek(z, k) == 1), "saturation is decided by order, not by rounding"
        assert torch.equal(sparsek(z[order], k), sparsek(z, k)[order])


def test_rows_and_dimensions_are_independent() -> None:
    z = torch.randn(3, 5, 4, dtype=torch.float64)
    for dim in (0, 1, 2, -1, -2):
        rows = sparsek(z, 2, dim=dim).movedim(dim, -1)
        for index in range(rows.shape[0]):
            for other in range(rows.shape[1]):
                one = sparsek(z.movedim(dim, -1)[index, other].contiguous(), 2)
                assert torch.equal(rows[index, other], one)


def test_strided_and_expanded_inputs_give_what_their_copies_give() -> None:
    wide = torch.randn(6, 40, dtype=torch.float64)
    for view in (wide[:, ::3], wide.t()[5:20], wide[:1].expand(4, 40), wide[::2, 3:]):
        assert torch.equal(sparsek(view, 4), sparsek(view.clone(memory_format=torch.contiguous_format), 4))


def interior(size: int, k: int, seed: int) -> Tensor:
    """A row whose gates all keep clear of their kinks, so that differences are smooth there."""
    for attempt in range(100):
        z = draw("normal", size, 1000 * seed + attempt)
        tau = float(exact_tau(z.tolist(), k))
        if float(torch.minimum((z - tau).abs(), (z - tau - 1).abs()).min()) > 1e-3:
            return z.requires_grad_()
    raise AssertionError("no row found")


@pytest.mark.parametrize("k", [1, 3, 8])
def test_gradcheck_away_from_kinks(k: int) -> None:
    z = interior(11, k, k)
    assert torch.autograd.gradcheck(lambda x: sparsek(x, k), (z,), eps=1e-6, atol=1e-8)


@pytest.mark.parametrize("regime", REGIMES)
def test_gradient_is_that_of_the_sorted_formula(regime: str) -> None:
    for seed in range(3):
        z = draw(regime, 13, seed)
        flow = torch.randn(13, dtype=torch.float64)
        for k in BUDGETS:
            mine, theirs = z.clone().requires_grad_(), z.clone().requires_grad_()
            sparsek(mine, k).backward(flow)
            differentiable_gates(theirs, k).backward(flow)
            assert mine.grad is not None
            assert theirs.grad is not None
            # The difference of a number and a mean of thirteen.
            assert float((mine.grad - theirs.grad).abs().max()) <= 32 * 2.0**-53 * float(flow.abs().max())


@pytest.mark.parametrize(
    ("z", "k"),
    [
        ([3.0, 2.0, 1.0], 2),
        ([5.0, 5.0, 0.0], 2),
        ([1.0, 2.0], 2),
        ([1.0, 2.0], 7),
        ([-math.inf, -math.inf], 1),
        ([math.inf, math.inf, 0.0], 2),
    ],
)
def test_gradient_is_zero_where_no_gate_lies_strictly_between(z: list[float], k: int) -> None:
    row = torch.tensor(z, requires_grad=True)
    sparsek(row, k).backward(torch.randn(len(z)))
    assert row.grad is not None
    assert row.grad.tolist() == [0.0] * len(z)


def test_gradient_has_the_scores_dtype() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        z = torch.randn(9).to(dtype).requires_grad_()
        sparsek(z, 3).sum().backward()
        assert z.grad is not None
        assert z.grad.dtype is dtype


def test_second_derivative_is_refused() -> None:
    z = torch.randn(9, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad((sparsek(z, 3) ** 2).sum(), z, create_graph=True)
    with pytest.raises(GradientError, match="sparsek: got a second derivative of the gates in z"):
        first.sum().backward()


def test_nan_raises_and_names_the_position() -> None:
    z = torch.zeros(2, 5)
    z[1, 3] = z[1, 4] = math.nan
    with pytest.raises(NonFiniteScoresError) as caught:
        sparsek(z, 2)
    assert str(caught.value) == (
        "z: got NaN at (1, 3) and 1 more, expected numbers; -inf excludes a key. "
        "Find where the scorer diverged, or mask padding with -inf."
    )


def test_without_validation_a_row_with_nan_is_nan_and_the_others_are_not() -> None:
    z = torch.randn(3, 5)
    z[1, 3] = math.nan
    gates = sparsek(z, 2, validate=False)
    assert torch.isnan(gates[1]).all()
    assert torch.equal(gates[[0, 2]], sparsek(z[[0, 2]], 2))


REFUSED: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: sparsek(torch.zeros(3), 0), PatternArgumentError, "k: got 0, expected an integer of at least 1."),
    (lambda: sparsek(torch.zeros(3), True), PatternArgumentError, "k: got True, expected an integer of at least 1."),
    (
        lambda: sparsek(torch.zeros(3, dtype=torch.long), 1),
        DtypeError,
        "z: got torch.int64, expected a tensor of float16, bfloat16, float32 or float64.",
    ),
    (
        lambda: sparsek([1.0], 1),  # type: ignore[arg-type]
        DtypeError,
        "z: got list, expected a tensor of float16, bfloat16, float32 or float64.",
    ),
    (lambda: sparsek(torch.tensor(1.0), 1), ShapeError, "z: got a scalar, expected at least one dimension."),
    (
        lambda: sparsek(torch.zeros(3, 0), 1),
        ShapeError,
        "z: got size 0 along dim -1, expected at least one score.",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), REFUSED, ids=[m for _, _, m in REFUSED])
def test_bad_input_is_refused_in_words(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message


def test_pytorch_takes_it_as_an_operator_of_its_own() -> None:
    z = torch.randn(3, 20, requires_grad=True)
    torch.library.opcheck(torch.ops.flexsparse.sparsek.default, (z, 4))

    def loss(x: Tensor) -> Tensor:
        return (sparsek(x, 4, validate=False) * torch.arange(20)).sum()

    found = [torch.autograd.grad(run(z), z)[0] for run in (loss, torch.compile(loss, fullgraph=True, backend="eager"))]
    assert torch.equal(*found)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(sparsek(z, 4), sparsek(z.detach(), 4))


def test_vmap_is_a_batch_dimension_of_scores_and_of_gradients() -> None:
    z, flow = torch.randn(2, 5, 3, 12), torch.randn(4, 2, 12)
    got = torch.func.vmap(lambda x: sparsek(x, 3, dim=0, validate=False), in_dims=1)(z)
    assert torch.equal(got, sparsek(z.movedim(1, 0), 3, dim=1))
    leaf = torch.randn(2, 12, requires_grad=True)
    gates = sparsek(leaf, 3)
    (batch,) = torch.autograd.grad(gates, leaf, flow, is_grads_batched=True, retain_graph=True)
    for one, g in zip(batch, flow, strict=True):
        assert torch.equal(one, torch.autograd.grad(gates, leaf, g, retain_graph=True)[0])


def test_no_rows_give_no_gates() -> None:
    assert sparsek(torch.zeros(0, 4), 2).shape == (0, 4)
