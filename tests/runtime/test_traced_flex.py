"""FlexAttention's backends inside torch.compile: a break in the graph, or one operator where there may be none."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import flexsparse as fs
from flexsparse.language import captured, h, kv, q
from flexsparse.tolerance import evaluate
from tests.gathered.calls import call_of
from tests.runtime.compositions import P

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
SLOPE: Any = captured("slope", dims=("h",), learnable=True)
WINDOW: Any = P["sliding_window"](20) | P["sinks"](2)
PATTERNS: dict[str, tuple[str, Any]] = {
    "mask and score": ("flex_eager", (WINDOW & P["document"]()).score(P["softcap"](5.0)) + P["alibi"]()),
    "learned": ("flex_eager", WINDOW - SLOPE[h] * abs(q - kv)),
    "sink": ("flex_eager", WINDOW.sink(0.5)),
    "gate on V": ("flex_eager", WINDOW | P["sparsek"](9, after=20)),
    "rows": ("gather_flex_eager", WINDOW | P["sparsek"](9, after=20)),
    "residues": ("residue_flex_eager", (q - kv) % 4 == 0),
}


@pytest.fixture(autouse=True)
def fresh_graphs() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def in_a_graph(attention: Any, graphs: list[Any], *, whole: bool) -> Any:
    """The attention between other operations, in graphs that are counted."""

    def counted(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    def forward(query: Tensor, key: Tensor, value: Tensor, **given: Any) -> Any:
        out, lse = attention(query * 1.0, key, value, **given)
        return out * 1.0, lse

    return torch.compile(forward, fullgraph=whole, backend=counted)


@pytest.mark.parametrize("whole", [False, True], ids=["with breaks", "whole"])
@pytest.mark.parametrize("name", PATTERNS)
def test_calls_in_a_graph_are_those_outside(name: str, whole: bool) -> None:
    backend, pattern = PATTERNS[name]
    attention, call = fs.compile(pattern, backend=backend), call_of(pattern, 60)
    graphs: list[Any] = []
    wanted = evaluate(attention, call)
    got = evaluate(in_a_graph(attention, graphs, whole=whole), call)
    assert wanted.keys() == got.keys()
    for part, one in wanted.items():
        torch.testing.assert_close(got[part], one, rtol=1e-5, atol=1e-5)
    calls = [str(node.target) for graph in graphs for node in graph.graph.nodes if "attend" in str(node.target)]
    assert (len(graphs) == 1) is whole
    assert calls == (["flexsparse.attend"] if whole else [])


def test_a_call_with_lengths_breaks_the_graph_and_is_the_same() -> None:
    attention = fs.compile(WINDOW, backend="flex_eager")
    query, key, value = torch.randn(3, 2, 4, 50, 16)
    lengths = torch.tensor([50, 31])
    graphs: list[Any] = []
    out, lse = in_a_graph(attention, graphs, whole=False)(query, key, value, lengths=lengths, return_lse=True)
    wanted = attention(query, key, value, lengths=lengths, return_lse=True)
    torch.testing.assert_close((out, lse), wanted)


def test_another_length_needs_no_other_build_of_flex_attention() -> None:
    attention = fs.compile(WINDOW, backend="flex")
    run = torch.compile(lambda *x: attention(*x) * 2)
    with torch.no_grad():
        for size in (140, 230, 300):
            query, key, value = torch.randn(3, 1, 2, size, 32)
            wanted = 2 * fs.reference(WINDOW, query, key, value)
            torch.testing.assert_close(run(query, key, value), wanted.float(), rtol=1e-5, atol=1e-5)
    assert attention.builds == 1


@pytest.mark.parametrize("backend", ["flex", "reference"])
def test_what_cannot_stand_in_one_graph_is_refused(backend: str) -> None:
    attention = fs.compile(WINDOW, backend=backend)
    query, key, value = torch.randn(3, 1, 2, 40, 16)
    expected = "traces, expected a backend that stands in one graph there. Leave fullgraph out"
    with torch.no_grad(), pytest.raises(Exception, match=expected):
        torch.compile(lambda *x: attention(*x), fullgraph=True, backend="eager")(query, key, value)
    run = torch.compile(lambda *x: attention(*x), backend="eager")
    if backend == "reference":
        assert torch.equal(run(query, key, value), attention(query, key, value))


def test_a_pattern_of_another_setting_is_another_operator() -> None:
    settings: list[dict[str, Any]] = [{}, {"kernel_options": {"BLOCK_M": 32}}, {"dynamic": False}]
    settings.append({"kernel_options": {"x": torch.float32}})  # which JSON cannot say
    assert len({fs.compile(WINDOW, **setting).key for setting in settings}) == 4


@pytest.mark.parametrize("name", ["mask and score", "residues", "rows"])
def test_autocast_changes_no_dtype(name: str) -> None:
    backend, pattern = PATTERNS[name]
    attention: Any = fs.compile(pattern, backend=backend)
    call = call_of(pattern, 60)
    wanted = attention(call.query, call.key, call.value, return_lse=True, **call.captured)
    with torch.autocast("cpu", torch.bfloat16):
        found = attention(call.query, call.key, call.value, return_lse=True, **call.captured)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
