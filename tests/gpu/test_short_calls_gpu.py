"""Short calls without gradients are started again as a whole, and give the bits of calls that are not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import flexsparse as fs
from flexsparse.errors import CapturedError, DeviceError

pytest.importorskip("triton")
from flexsparse.codegen.kernels import recording

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "_recordings", {})


def operands(seed: int, size: int = 700, *, heads: int = 4, kv_heads: int = 2) -> list[Tensor]:
    generator = torch.Generator("cuda").manual_seed(seed)
    shapes = [(1, h, size, 64) for h in (heads, kv_heads, kv_heads)]
    return [torch.randn(shape, device="cuda", generator=generator).bfloat16() for shape in shapes]


def scores(seed: int, size: int = 700) -> Tensor:
    return torch.randn(1, 2, size, device="cuda", generator=torch.Generator("cuda").manual_seed(seed))


def kinds() -> list[str]:
    """Of everything that is repeated, what it is."""
    kept: Any = recording._recordings
    return [key[0][0] for key, made in kept.items() if made is not None]


PATTERNS = [
    "sliding_window(64) | sparsek(50, after=64)",
    "(sliding_window(40) | topk(9, after=40, gate='v')) + alibi",
    "topk(30, gate='logit')",
    "sliding_window(32) | sparsek(17, after=32, scores='near') | sparsek(9, scores='far')",
]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("return_lse", [False, True])
def test_every_repetition_has_the_bits_of_a_call_with_gradients(pattern: str, return_lse: bool) -> None:
    attention: Any = fs.compile(pattern, backend="gather")
    names = sorted({s.scores for s in attention.ir.selections})
    kept = []
    for n in range(8):
        query, key, value = operands(n)
        given = {name: scores(n + 7 * place) for place, name in enumerate(names)}
        # In any order of their names.
        turned = dict(reversed(given.items())) if n % 2 else given
        found: Any = attention(query, key, value, validate=False, return_lse=return_lse, **turned)
        query.requires_grad_()
        wanted: Any = attention(query, key, value, validate=False, return_lse=return_lse, **given)
        pairs = zip(found, wanted, strict=True) if return_lse else [(found, wanted)]
        for one, other in pairs:
            assert torch.equal(one, other), n
            assert not one.requires_grad
        # Some are dropped, so that addresses come back, and some stay.
        kept += [found] * (n % 3 == 0)
    assert attention.plan.backend == "gather"
    assert len({x.data_ptr() for x in ([y[0] for y in kept] if return_lse else kept)}) == len(kept)


def test_a_loop_is_one_recording_and_one_graph() -> None:
    attention = fs.compile(PATTERNS[0], backend="gather")
    query, key, value = operands(0)
    given = scores(1)
    for _ in range(6):
        attention(query, key, value, scores=given, validate=False)
    assert kinds().count("attention") == 1
    whole = next(made for made in recording._recordings.values() if made is not None and made.constants)
    assert any(isinstance(x, list) and len(x) == 1 for x in whole.known.values())
    # New numbers at old addresses.
    for seed in range(2, 5):
        for tensor, other in zip((query, key, value, given), (*operands(seed), scores(seed)), strict=True):
            tensor.copy_(other)
        found = attention(query, key, value, scores=given, validate=False)
        assert torch.equal(found, attention(query, key, value, scores=given))


def test_lengths_scales_and_budgets_are_calls_of_their_own() -> None:
    attention = fs.compile("sliding_window(scalar('w', 64)) | sparsek(scalar('k', 50), after=64)", backend="gather")
    for size in (700, 701):
        query, key, value = operands(size, size)
        given = scores(size, size)
        for options in ({}, {"scale": 0.5}, {"k": 20}, {"w": 30}, {"k": 20, "w": 64}):
            call: Any = dict(options, scores=given)
            found = [attention(query, key, value, validate=False, **call) for _ in range(4)]
            wanted = attention(query, key, value, **call)
            assert all(torch.equal(x, wanted) for x in found), (size, options)
    assert attention.plan.shapes.q_len == 701


def test_what_needs_more_than_kernels_is_not_repeated_as_a_whole() -> None:
    ids = torch.arange(700, device="cuda").div(100, rounding_mode="floor")[None]
    query, key, value = operands(0)
    documents = fs.compile("(sliding_window(64) | sparsek(50)) & document", backend="gather")
    sinks = fs.compile("(sliding_window(64) | sparsek(50)).sink(1.0)", backend="gather")
    for seed in range(4):
        given = scores(seed)
        moved = (ids + (torch.arange(700, device="cuda") > 50 * seed)).contiguous()
        found = documents(query, key, value, scores=given, doc=moved, validate=False)
        assert torch.equal(found, documents(query, key, value, scores=given, doc=moved))
        assert torch.equal(
            sinks(query, key, value, scores=given, validate=False), sinks(query, key, value, scores=given)
        )
    assert "attention" not in kinds()


def test_wrong_tensors_are_refused_as_ever() -> None:
    attention = fs.compile(PATTERNS[0], backend="gather")
    query, key, value = operands(0)
    for _ in range(4):
        attention(query, key, value, scores=scores(0), validate=False)
    with pytest.raises(DeviceError, match="scores"):
        attention(query, key, value, scores=scores(0).cpu(), validate=False)
    with pytest.raises(CapturedError, match="more"):
        attention(query, key, value, scores=scores(0), more=scores(0), validate=False)


def test_it_is_captured_in_a_graph_of_the_caller() -> None:
    attention = fs.compile(PATTERNS[0], backend="gather")
    query, key, value = operands(0)
    given, stream, graph = scores(0), torch.cuda.Stream(), torch.cuda.CUDAGraph()
    for _ in range(5):
        wanted = attention(query, key, value, scores=given, validate=False)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        out = attention(query, key, value, scores=given, validate=False)
    graph.replay()
    assert torch.equal(out, wanted)
