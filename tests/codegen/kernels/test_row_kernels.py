"""The kernels for independent rows give the bits of their PyTorch form. Where they run: see test_selection_kernels."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from flexsparse.ops.projection import project, project_gradient, result_dtype
from tests.ops.regimes import REGIMES, draw

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = [
    *([] if INTERPRETED else [pytest.mark.gpu]),
    pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="needs a GPU or the interpreter"),
]
# One program with the row in one block or in several; several programs of (parts, keys each), of one block each or
# more. None: what the library itself would choose.
ONE: list[tuple[int, int, Any]] = [(1, 1, None), (13, 3, None), (300, 1, 128), (300, 299, 128), (257, 20, None)]
SEVERAL: list[tuple[int, int, Any]] = [(1, 1, (1, 64)), (300, 1, (5, 64)), (300, 40, (3, 128)), (600, 599, (10, 64))]
CHOSEN = ("nearly equal", "falling", "rising", "huge", "both infinities", "many +inf", "gap wider than one")
if not INTERPRETED:
    ONE += [(1000, 7, None), (5000, 1, None), (20000, 300, None)]
    SEVERAL += [(8193, 1, None), (40000, 512, None), (40000, 39000, None), (300001, 1, None)]
ROWS = {**REGIMES, "position slope, long": lambda n, g: torch.randn(n, generator=g).double() + 1e-4 * torch.arange(n)}
ROWS["one outlier"] = lambda n, g: torch.cat((draw("normal", n - 1, 5), torch.tensor([1e4], dtype=torch.float64)))


def filled(form: Any, z: Tensor, k: int, cut: Any) -> tuple[Tensor, Tensor]:
    from flexsparse.codegen.kernels import rows

    there = z.to(DEVICE)
    gates, inside = rows.empty_gates(there, result_dtype(z))
    form.gates_of_rows(there, min(k, z.shape[1]), gates, inside, *(() if cut is None else (cut,)))
    return gates.cpu(), inside.cpu().bool()


def check(form: Any, z: Tensor, k: int, cut: Any) -> None:
    wanted = project(z, k)
    gates, inside = filled(form, z, k, cut)
    assert gates.dtype is wanted.gates.dtype
    apart = (gates != wanted.gates) & ~(torch.isnan(gates) & torch.isnan(wanted.gates))
    assert not apart.any(), f"{int(apart.sum())} differ, first at {apart.nonzero()[0].tolist()}"
    assert torch.equal(inside, wanted.inside)


@pytest.mark.parametrize("regime", CHOSEN if INTERPRETED else ROWS)
@pytest.mark.parametrize(("size", "k", "cut"), ONE)
def test_one_program_gives_the_bits_of_the_sort(regime: str, size: int, k: int, cut: Any) -> None:
    from flexsparse.codegen.kernels import rows

    z = torch.stack([ROWS[regime](size, torch.Generator().manual_seed(seed)) for seed in range(2)])
    check(rows, z, k, cut)
    check(rows, z.float(), k, cut)


@pytest.mark.parametrize("regime", CHOSEN if INTERPRETED else ROWS)
@pytest.mark.parametrize(("size", "k", "cut"), SEVERAL)
def test_several_programs_give_the_bits_of_the_sort(regime: str, size: int, k: int, cut: Any) -> None:
    from flexsparse.codegen.kernels import long_rows

    z = torch.stack([ROWS[regime](size, torch.Generator().manual_seed(seed)) for seed in range(2)])
    check(long_rows, z, k, cut)
    check(long_rows, z.float(), k, cut)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_ties_and_nan(dtype: torch.dtype) -> None:
    from flexsparse.codegen.kernels import long_rows, rows

    z = torch.stack([draw("normal", 200, seed) for seed in range(3)]).to(dtype)
    z[1, 150] = torch.nan
    check(rows, z, 9, None)
    check(long_rows, z, 9, (4, 64))


def test_a_wrong_bracket_costs_time_and_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    if not INTERPRETED:
        pytest.skip("replaces a part of a kernel")
    from triton import language

    from flexsparse.codegen.kernels import long_rows

    calls = []

    def wrong(*_: Any) -> Any:
        calls.append(1)
        return tuple(language.full([], x, language.float32) for x in (-0.001, 0.0, -0.0005))

    z = torch.stack([draw("normal", 200, seed) for seed in range(2)])
    monkeypatch.setattr(long_rows, "_bracket", wrong)
    check(long_rows, z, 9, (4, 64))
    assert calls


@pytest.mark.parametrize("cut", [None, (4, 64)])
def test_gradients_are_those_of_the_pytorch_form(cut: Any) -> None:
    from flexsparse.codegen.kernels import long_rows, rows

    z = torch.stack([draw("normal", 200, seed) for seed in range(2)])
    z[1] = -torch.inf
    inside = project(z, 9).inside
    for dtype in (torch.float32, torch.float64):
        grad = torch.randn(2, 200, generator=torch.Generator().manual_seed(3), dtype=dtype)
        found = torch.empty_like(grad).to(DEVICE)
        form = rows if cut is None else long_rows
        more = () if cut is None else (cut,)
        form.flow_of_rows(grad.to(DEVICE), inside.to(DEVICE).to(torch.int8), found, *more)
        wanted = project_gradient(grad, inside, dtype)
        # Both sum in float64, in different orders, and round once.
        bound = (200 * 2.0**-52 + torch.finfo(dtype).eps) * float(grad.abs().max())
        assert float((found.cpu() - wanted).abs().max()) <= bound


@pytest.mark.skipif(INTERPRETED, reason="goes through CUDA tensors")
def test_cuda_tensors_take_the_kernels_forward_and_backward() -> None:
    from flexsparse.ops import sparsek

    for shape, k in (((3, 500), 5), ((1, 70000), 1), ((100, 9000), 40), ((0, 7), 2)):
        z = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        flow = torch.randn(shape, generator=torch.Generator().manual_seed(2))
        here, there = z.clone().requires_grad_(), z.cuda().requires_grad_()
        wanted, got = sparsek(here, k), sparsek(there, k)
        assert torch.equal(got.cpu(), wanted)
        (a,) = torch.autograd.grad(wanted, here, flow)
        (b,) = torch.autograd.grad(got, there, flow.cuda())
        assert a.numel() == 0 or float((a - b.cpu()).abs().max()) <= 2 * torch.finfo(torch.float32).eps * 5


@pytest.mark.skipif(INTERPRETED, reason="CUDA graphs")
@pytest.mark.parametrize("shape", [(2, 3000), (1, 100_000)])
def test_a_cuda_graph_replays_on_new_scores_of_any_kind(shape: tuple[int, int]) -> None:
    from flexsparse.ops import sparsek

    z = torch.randn(shape, device="cuda")
    sparsek(z, 3, validate=False)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gates = sparsek(z, 3, validate=False)
    for regime in REGIMES:
        new = torch.stack([draw(regime, shape[1], seed) for seed in range(shape[0])]).float()
        z.copy_(new.cuda())
        graph.replay()
        assert torch.equal(gates.cpu(), sparsek(new, 3)), regime
