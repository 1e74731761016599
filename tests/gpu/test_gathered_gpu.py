"""The kernels that gather on a GPU, where the interpreter cannot go: at length, in CUDA graphs, under checkpointing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import flexsparse as fs
from flexsparse.codegen.kernels import recording
from flexsparse.tolerance import evaluate
from tests.gathered.calls import call_of, failures
from tests.runtime.compositions import P

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

HYBRID: Any = P["sliding_window"](200) | P["sparsek"](256, after=200)


def test_auto_gathers_what_is_selected() -> None:
    call = call_of(HYBRID, 300, torch.bfloat16, head_dim=64)
    attention: Any = fs.compile(HYBRID)
    attention(call.query, call.key, call.value, **call.captured)
    assert attention.plan.backend == "gather"


@pytest.mark.parametrize("head_dim", [64, 80, 128, 192, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_any_head_dim_at_length(head_dim: int, dtype: torch.dtype) -> None:
    assert not failures(HYBRID, call_of(HYBRID, 3000, dtype, head_dim=head_dim, batch=1))


@pytest.mark.parametrize("slope", [0.0, 1e-3, 1.0])
def test_any_turnover_of_slots(slope: float) -> None:
    """From scores whose winners stay to scores under which every newcomer enters."""
    call = call_of(HYBRID, 4000, torch.bfloat16, head_dim=64, batch=1)
    call.captured["scores"].add_(slope * torch.arange(4000, device="cuda"))
    assert not failures(HYBRID, call)


def test_two_runs_at_length_have_the_same_bits() -> None:
    call = call_of(HYBRID, 20_000, torch.bfloat16, head_dim=128, batch=1, heads=2, kv_heads=1)
    leaves = [x.clone().requires_grad_() for x in (call.query, call.key, call.value, call.captured["scores"])]
    attention = fs.compile(HYBRID)

    def step() -> tuple[torch.Tensor, ...]:
        out = attention(*leaves[:3], scores=leaves[3])
        return (out.detach(), *torch.autograd.grad(out, leaves, call.grad_out))

    for one, other in zip(step(), step(), strict=True):
        assert torch.equal(one, other)


def test_a_graph_replays_what_a_call_gives() -> None:
    call = call_of(HYBRID, 1000, torch.bfloat16, head_dim=64)
    attention: Any = fs.compile(HYBRID)

    def forward() -> Any:
        return attention(call.query, call.key, call.value, validate=False, **call.captured)

    wanted = forward().clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        forward()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = forward()
    out.zero_()
    graph.replay()
    assert torch.equal(out, wanted)


def test_checkpointing_and_autocast_change_no_bit() -> None:
    call = call_of(HYBRID, 500, torch.bfloat16, head_dim=64, batch=1)
    attention: Any = fs.compile(HYBRID)
    leaves = [x.clone().requires_grad_() for x in (call.query, call.key, call.value, call.captured["scores"])]

    def forward(query: Any, key: Any, value: Any, scores: Any) -> Any:
        return attention(query, key, value, scores=scores)

    plain = torch.autograd.grad(forward(*leaves), leaves, call.grad_out)
    again = torch.autograd.grad(checkpoint(forward, *leaves, use_reentrant=False), leaves, call.grad_out)
    with torch.autocast("cuda", torch.float16):
        cast = torch.autograd.grad(forward(*leaves), leaves, call.grad_out)
    for one, other, third in zip(plain, again, cast, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one, third)


def test_memory_grows_with_the_length(monkeypatch: pytest.MonkeyPatch) -> None:
    # A call that is recorded keeps all that it allocates.
    monkeypatch.setattr(recording, "_recordings", {})
    peaks = []
    # From here on the kernel of slots has the same tiles.
    for size in (16384, 32768):
        call = call_of(HYBRID, size, torch.bfloat16, head_dim=64, batch=1, heads=2, kv_heads=2)
        attention = fs.compile(HYBRID, backend="gather")
        for _ in range(2):
            evaluate(attention, call)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        evaluate(attention, call)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] <= 2.2 * peaks[0]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_layer_trains_in_one_graph(mode: str) -> None:
    """The bits of out and gradients are those of eager attention; what Inductor fuses around it may round apart."""
    torch.compiler.reset()
    layer = fs.nn.SparseKAttention(256, heads=4, kv_heads=2, k=64, window=128).to("cuda", torch.bfloat16)
    compiled = torch.compile(layer, fullgraph=True, mode=mode)
    for _ in range(4):
        x = torch.randn(2, 1000, 256, device="cuda", dtype=torch.bfloat16)
        found = []
        for run in (layer, compiled):
            layer.zero_grad()
            out = run(x)
            out.square().mean().backward()
            found.append([out.detach().clone(), *(p.grad.clone() for p in layer.parameters() if p.grad is not None)])
        assert layer.attention.plan.backend == "gather"
        assert len(found[0]) == len(found[1]) > 5
        for one, other in zip(*found, strict=True):
            assert float((one - other).abs().max()) <= 0.05 * float(one.abs().max()) + 1e-6


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_attention_alone_in_a_graph_gives_the_bits_of_a_call() -> None:
    torch.compiler.reset()
    attention: Any = fs.compile(HYBRID)
    compiled = torch.compile(lambda *x, **y: attention(*x, **y), fullgraph=True, dynamic=True)
    for size in (1000, 2048):
        call = call_of(HYBRID, size, torch.bfloat16, head_dim=64)
        wanted, got = evaluate(attention, call), evaluate(compiled, call)
        for name, one in wanted.items():
            assert torch.equal(one, got[name]), name


@pytest.mark.parametrize("reentrant", [False, True])
def test_both_ways_of_checkpointing_change_no_bit(reentrant: bool) -> None:
    call = call_of(HYBRID, 500, torch.bfloat16, head_dim=64, batch=1)
    attention: Any = fs.compile(HYBRID)
    leaves = [x.clone().requires_grad_() for x in (call.query, call.key, call.value, call.captured["scores"])]

    def forward(query: Any, key: Any, value: Any, scores: Any) -> Any:
        return attention(query, key, value, scores=scores)

    plain = torch.autograd.grad(forward(*leaves), leaves, call.grad_out)
    checkpoint(forward, *leaves, use_reentrant=reentrant).backward(call.grad_out)
    for one, leaf in zip(plain, leaves, strict=True):
        assert leaf.grad is not None
        assert torch.equal(one, leaf.grad)


def test_a_graph_of_a_training_step_replays() -> None:
    """Forward and backward captured together, replayed on other values in the same memory."""
    call = call_of(HYBRID, 1000, torch.bfloat16, head_dim=64, batch=1)
    attention: Any = fs.compile(HYBRID)
    leaves = [x.clone().requires_grad_() for x in (call.query, call.key, call.value, call.captured["scores"])]

    def step() -> Any:
        out = attention(*leaves[:3], scores=leaves[3], validate=False)
        return (out.detach(), *torch.autograd.grad(out, leaves, call.grad_out))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for leaf in leaves:
            leaf.copy_(torch.randn_like(leaf))
    graph.replay()
    replayed = [x.clone() for x in captured]
    for one, other in zip(replayed, step(), strict=True):
        assert torch.equal(one, other)
