"""Calls inside a graph of torch.compile(fullgraph=True): the bits of eager calls, for every pattern and any wrapper."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import flexsparse as fs
from flexsparse import traced
from flexsparse.errors import BackendError, GradientError, ShapeError
from flexsparse.runtime import gathered
from flexsparse.tolerance import Call, evaluate
from tests.gathered.calls import COMPOSITIONS, DEVICE, call_of
from tests.runtime import compositions
from tests.runtime.compositions import P

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [
    pytest.mark.gpu,
    # What Dynamo and Inductor say of themselves while they trace.
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
gathers = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="needs a GPU or Triton's interpreter"
)
HYBRID: Any = P["sliding_window"](40) | P["sparsek"](24, after=40)


@pytest.fixture(autouse=True)
def fresh_graphs() -> Iterator[None]:
    """No test inherits graphs, or the limit on their number, from another."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def whole(attention: Any, backend: str = "aot_eager", **options: Any) -> Any:
    """The attention as one graph."""
    return torch.compile(lambda *x, **y: attention(*x, **y), fullgraph=True, backend=backend, **options)


def differences(attention: Any, compiled: Any, call: Call) -> list[str]:
    wanted, got = evaluate(attention, call), evaluate(compiled, call)
    return [name for name, one in wanted.items() if not torch.equal(one, got[name])]


def check_bits(attention: Any, call: Call, name: str) -> None:
    """The bits of a call; where scores serve two selections, a GPU adds up their gradients in other pairs."""
    compiled = whole(attention)
    if name == "same scores twice" and torch.cuda.is_available():
        wanted, got = evaluate(attention, call), evaluate(compiled, call)
        torch.testing.assert_close(got.pop("d scores"), wanted.pop("d scores"), rtol=1e-5, atol=1e-6)
        assert all(torch.equal(one, got[key]) for key, one in wanted.items())
    else:
        assert differences(attention, compiled, call) == []


@gathers
@pytest.mark.parametrize("name", COMPOSITIONS)
def test_a_graph_of_any_gathered_pattern_gives_the_bits_of_a_call(name: str) -> None:
    attention = fs.compile(COMPOSITIONS[name], backend="gather")
    check_bits(attention, call_of(COMPOSITIONS[name], 40, batch=1), name)


@pytest.mark.parametrize("name", compositions.COMPOSITIONS)
def test_a_graph_of_any_pattern_gives_the_bits_of_the_chunked_path(name: str) -> None:
    pattern = compositions.COMPOSITIONS[name]
    check_bits(fs.compile(pattern, backend="chunked"), call_of(pattern, 40), name)


def test_a_tree_is_walked_inside_a_graph() -> None:
    attention = fs.compile("tree", backend="chunked")
    assert differences(attention, whole(attention), call_of(fs.parse("tree"), 40)) == []


@gathers
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_one_graph_serves_many_lengths(backend: str) -> None:
    attention = fs.compile(HYBRID, backend="gather")
    compiled = whole(attention, backend, dynamic=True)
    for size in (70, 66, 129):
        assert differences(attention, compiled, call_of(HYBRID, size, batch=1)) == []
        torch.compiler.set_stance("fail_on_recompile")
    torch.compiler.set_stance("default")


@gathers
def test_a_graph_reads_what_a_call_is_given() -> None:
    """Documents, an offset of nothing, a scale and lse are arguments of the graph, and not its constants."""
    pattern: Any = P["document"]() & (P["sliding_window"](9) | P["sparsek"](8, after=9, segments="doc"))
    attention = fs.compile(pattern, backend="gather")
    compiled = whole(attention)
    for seed in range(3):
        call = call_of(pattern, 70, batch=2)
        steps = torch.rand(2, 70, generator=torch.Generator().manual_seed(seed)) < 0.1
        call.captured["doc"].copy_(steps.long().cumsum(-1).to(DEVICE))
        assert differences(attention, compiled, call) == []


@gathers
def test_the_forward_kernels_run_once_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    forward = gathered._forward

    def counted(*x: Any) -> Any:
        runs.append(x)
        return forward(*x)

    monkeypatch.setattr(gathered, "_forward", counted)
    evaluate(whole(fs.compile(HYBRID, backend="gather")), call_of(HYBRID, 70, batch=1))
    assert len(runs) == 1


@gathers
def test_the_operator_keeps_torchs_rules() -> None:
    """Schema, fake shapes, autograd registration and tracing, as torch checks them."""
    call = call_of(HYBRID, 66, batch=1, heads=2, kv_heads=1)
    attention: Any = fs.compile(HYBRID, backend="gather")
    seen: list[Any] = []

    def catch(graph: Any, inputs: Any) -> Any:
        nodes = [n for n in graph.graph.nodes if "attend" in str(n.target)]
        assert len(nodes) == 1

        class Caught(torch.fx.Interpreter):
            def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
                if target is nodes[0].target:
                    seen.append(args)
                return super().call_function(target, args, kwargs)

        return lambda *x: Caught(graph).run(*x)

    torch.compile(attention, backend=catch, fullgraph=True)(call.query, call.key, call.value, **call.captured)
    query, key, value, tensors, *rest = seen[0]
    asking = [x.detach().requires_grad_(x.is_floating_point()) for x in (query, key, value)]
    torch.library.opcheck(torch.ops.flexsparse.attend.default, (*asking, tensors, *rest))


@gathers
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_layer_trains_in_one_graph(backend: str) -> None:
    torch.manual_seed(0)
    layer = fs.nn.SparseKAttention(32, heads=2, kv_heads=1, k=8, window=16, segments="doc", pattern="document").to(
        DEVICE
    )
    layer.attention = fs.compile(layer.pattern, backend="gather")
    x, goal = torch.randn(2, 1, 70, 32, device=DEVICE).unbind()
    doc = (torch.arange(70, device=DEVICE) // 30)[None]
    losses: list[list[float]] = []
    start = {name: value.clone() for name, value in layer.state_dict().items()}
    for run in (layer, torch.compile(layer, fullgraph=True, backend=backend)):
        layer.load_state_dict(start)
        optimizer = torch.optim.SGD(layer.parameters(), lr=5.0)
        losses.append([])
        for _ in range(6):
            optimizer.zero_grad()
            loss = (run(x, doc=doc) - goal).square().mean()
            loss.backward()
            optimizer.step()
            losses[-1].append(float(loss.detach()))
    assert losses[0][-1] < 0.95 * losses[0][0]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_mistakes_are_named_inside_a_graph_too() -> None:
    call = call_of(HYBRID, 70, batch=1)
    compiled = whole(fs.compile(HYBRID, backend="chunked"), "eager")
    # Dynamo raises what the traced function raises, or wraps it; the text is there in both cases.
    with pytest.raises(Exception, match=r"scores: got shape|ShapeError") as caught:
        compiled(call.query, call.key, call.value, scores=call.captured["scores"][..., 1:])
    assert isinstance(caught.value, ShapeError) or "ShapeError" in str(caught.value)


def test_a_second_derivative_is_refused_by_name() -> None:
    call = call_of(HYBRID, 40, batch=1)
    query = call.query.clone().requires_grad_()
    compiled = whole(fs.compile(HYBRID, backend="chunked"), "eager")
    out = compiled(query, call.key, call.value, **call.captured)
    (first,) = torch.autograd.grad(out.sum(), query, create_graph=True)
    with pytest.raises(GradientError, match="attention: got a second derivative"):
        first.square().sum().backward()


def test_another_process_makes_the_pattern_from_its_key() -> None:
    """What a cached graph of another process names is compiled here from its text."""
    key = fs.compile(HYBRID, backend="chunked").key
    assert json.loads(key)["pattern"] == str(HYBRID)
    program = (
        "import sys, torch, flexsparse.traced\n"
        "x = torch.ones(1, 1, 8, 4)\n"
        "names = 'birth_0,death_0,slot_0,u_0,tau_0,least_0'\n"
        "made = [torch.zeros(1, 1, 8, dtype=torch.int32)] * 3 + [torch.ones(1, 1, 8)] * 3\n"
        "out = torch.ops.flexsparse.attend(x, x, x, made, names, sys.argv[1], 'chunked', 0.5, 0, True)[0]\n"
        "print(float(out.sum()))\n"
    )
    root = pathlib.Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", program, key], capture_output=True, text=True, cwd=root, check=False)
    assert done.stdout == "32.0\n", done.stderr


def test_a_key_without_a_text_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    known = compositions.COMPOSITIONS["boolean tensor"]
    key = fs.compile(known, backend="chunked").key
    monkeypatch.setattr(traced, "_ATTENTIONS", {})
    with pytest.raises(BackendError, match=r"traced in another process, expected .* Call flexsparse\.compile"):
        traced._attention_of(key)


def leaves_of(call: Call) -> list[Tensor]:
    return [x.clone().requires_grad_() for x in (call.query, call.key, call.value, call.captured["scores"])]


@gathers
@pytest.mark.parametrize("graph", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
def test_checkpointing_changes_no_bit(reentrant: bool, graph: bool) -> None:
    call = call_of(HYBRID, 70, batch=1)
    attention: Any = fs.compile(HYBRID, backend="gather")
    leaves = leaves_of(call)

    def forward(query: Any, key: Any, value: Any, scores: Any) -> Any:
        return attention(query, key, value, scores=scores)

    plain = torch.autograd.grad(forward(*leaves), leaves, call.grad_out)
    run = torch.compile(forward, fullgraph=True, backend="aot_eager") if graph else forward
    checkpoint(run, *leaves, use_reentrant=reentrant).backward(call.grad_out)
    for one, leaf in zip(plain, leaves, strict=True):
        assert leaf.grad is not None
        assert torch.equal(one, leaf.grad)


@gathers
def test_checkpointing_inside_a_graph() -> None:
    call = call_of(HYBRID, 70, batch=1)
    attention: Any = fs.compile(HYBRID, backend="gather")
    leaves = leaves_of(call)

    def forward(*x: Any) -> Any:
        return attention(*x[:3], scores=x[3])

    plain = torch.autograd.grad(forward(*leaves), leaves, call.grad_out)
    run = torch.compile(lambda *x: checkpoint(forward, *x, use_reentrant=False), fullgraph=True, backend="aot_eager")
    again = torch.autograd.grad(run(*leaves), leaves, call.grad_out)
    for one, other in zip(plain, again, strict=True):
        assert torch.equal(one, other)


@gathers
@pytest.mark.parametrize("graph", [False, True], ids=["eager", "compiled"])
def test_autocast_changes_no_bit(graph: bool) -> None:
    call = call_of(HYBRID, 70, batch=1)
    attention: Any = fs.compile(HYBRID, backend="gather")
    leaves = leaves_of(call)
    plain = torch.autograd.grad(attention(*leaves[:3], scores=leaves[3]), leaves, call.grad_out)
    run = whole(attention) if graph else attention
    with torch.autocast(DEVICE, torch.bfloat16):
        cast = torch.autograd.grad(run(*leaves[:3], scores=leaves[3]), leaves, call.grad_out)
    for one, other in zip(plain, cast, strict=True):
        assert torch.equal(one, other)


@gathers
def test_gradients_accumulate_over_parts_of_a_batch() -> None:
    """Two backward passes into the same leaves give the sum of their gradients."""
    attention: Any = fs.compile(HYBRID, backend="gather")
    layer = fs.nn.SparseKAttention(16, heads=1, k=8, window=16).to(DEVICE)
    layer.attention = attention
    parts = torch.randn(2, 1, 70, 16, device=DEVICE)
    wanted = []
    for part in parts:
        layer.zero_grad()
        layer(part).square().sum().backward()
        wanted.append([p.grad.clone() for p in layer.parameters() if p.grad is not None])
    layer.zero_grad()
    for part in parts:
        layer(part).square().sum().backward()
    both = [p.grad for p in layer.parameters() if p.grad is not None]
    assert len(both) == len(wanted[0]) > 4
    for got, first, second in zip(both, *wanted, strict=True):
        assert torch.equal(got, first + second)


@gathers
@pytest.mark.parametrize("graph", [False, True], ids=["eager", "compiled"])
def test_data_parallel_training_of_one_process(graph: bool, tmp_path: pathlib.Path) -> None:
    """DistributedDataParallel over one rank gives the gradients of the layer itself."""
    torch.manual_seed(0)
    layer = fs.nn.SparseKAttention(16, heads=1, k=8, window=16).to(DEVICE)
    layer.attention = fs.compile(layer.pattern, backend="gather")
    x = torch.randn(1, 70, 16, device=DEVICE)
    layer(x).square().sum().backward()
    plain = {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
    layer.zero_grad()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parallel: Any = torch.nn.parallel.DistributedDataParallel(layer)
        run = torch.compile(parallel, backend="aot_eager") if graph else parallel
        run(x).square().sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    for name, p in layer.named_parameters():
        assert p.grad is not None, name
        torch.testing.assert_close(p.grad, plain[name], rtol=1e-5, atol=1e-6)


def test_positions_and_scales_that_change_from_call_to_call() -> None:
    """Of a position a graph knows whether it is 0; a scale is a constant of it."""
    attention = fs.compile(HYBRID, backend="chunked")
    query, key, value = torch.randn(3, 1, 2, 70, 8)
    scores = torch.randn(1, 2, 70)
    graphs: list[Any] = []

    def counted(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    def grown(query: Tensor, key: Tensor, value: Tensor, scores: Tensor) -> Tensor:
        return attention(query, key, value, scores=scores, q_offset=key.shape[2] - query.shape[2])

    run = torch.compile(grown, fullgraph=True, backend=counted)
    for size in range(60, 70):
        operands = query[:, :, :3], key[:, :, :size], value[:, :, :size], scores[:, :, :size]
        assert torch.equal(run(*operands), grown(*operands))
    assert len(graphs) == 2
    scaled = whole(attention)
    for scale in (0.1, 0.2, 1):
        wanted = attention(query, key, value, scores=scores, scale=scale)
        assert torch.equal(scaled(query, key, value, scores=scores, scale=scale), wanted)


def test_inductor_trains_a_layer_whose_operands_are_views() -> None:
    layer = fs.nn.SparseKAttention(16, heads=2, kv_heads=1, k=4, window=4, backend="chunked")
    x = torch.randn(2, 20, 16)
    found = []
    for run in (layer, torch.compile(layer, fullgraph=True)):
        layer.zero_grad()
        run(x).sin().sum().backward()
        found.append([p.grad.clone() for p in layer.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
