"""The causal operators on a GPU: under CUDA graphs and the compiler, at length, with the same bits in every run."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flexsparse.ops import causal_select, causal_sparsek, slot_table

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning"),
]


def everything(u: Tensor) -> list[Tensor]:
    thresholds, selection = causal_select(u, 64, 10, validate=False)
    return [*thresholds, *selection, slot_table(selection, 64, 128)]


def test_a_cuda_graph_replays_on_new_scores() -> None:
    u = torch.randn(4, 3000, device="cuda")
    everything(u)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = everything(u)
    u.copy_(torch.randn(4, 3000).cuda())
    graph.replay()
    for got, wanted in zip(captured, everything(u.clone()), strict=True):
        assert torch.equal(got, wanted)


def test_the_compiler_takes_the_whole_graph() -> None:
    def loss(u: Tensor) -> Tensor:
        tau = causal_sparsek(u, 64, validate=False).tau
        return torch.where(torch.isinf(tau), 0.0, tau).square().sum()

    u = torch.randn(2, 2000, device="cuda", requires_grad=True)
    results = (loss(u), torch.compile(loss, fullgraph=True)(u))
    eager, compiled = (x.detach() for x in results)
    assert float((eager - compiled).abs()) <= 1e-5 * float(eager.abs())
    one, other = (torch.autograd.grad(x, u)[0] for x in results)
    assert float((one - other).abs().max()) <= 1e-5 * float(one.abs().max())


@pytest.mark.parametrize("slope", [0.0, 1e-4, 1.0])
def test_two_runs_and_the_cpu_give_the_same_bits_at_length(slope: float) -> None:
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(2, 1 << 17, generator=generator) + slope * torch.arange(1 << 17)
    there = u.cuda()
    first, second = everything(there), everything(there)
    for one, other, here in zip(first, second, everything(u), strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one.cpu(), here)
    gradients: list[Tensor] = []
    for _ in range(2):
        leaf = there.clone().requires_grad_()
        tau = causal_sparsek(leaf, 64, 10).tau
        gradients += torch.autograd.grad(tau[:, 100:].square().sum(), leaf)
    assert torch.equal(*gradients)
