"""Batch rows of different length and packed documents: every row and document gets what it would get alone."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import flexsparse as fs
from flexsparse.language import b, captured, kv
from flexsparse.tolerance import Call, evaluate, judge
from tests.gathered.calls import DEVICE, call_of
from tests.runtime.compositions import CAUSAL, P

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
gathers = pytest.param(
    "gather",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(
            not INTERPRETED and not torch.cuda.is_available(), reason="needs a GPU or Triton's interpreter"
        ),
    ],
)
on_each_backend = pytest.mark.parametrize("backend", ["chunked", gathers])
HYBRID: Any = P["sliding_window"](20) | P["sparsek"](12, after=20)
LENGTHS = [90, 37, 1, 64]
STARTS: Any = captured("starts", dims=("b",))


def outside(pattern: Any, call: Call, backend: str) -> list[str]:
    got = evaluate(fs.compile(pattern, backend=backend), call)
    return [f"{c.name}: {c.error:.3g} > {c.allowed:.3g}" for c in judge(pattern, got, call) if not c.holds]


def padded_call(pattern: Any, flows: Tensor) -> Call:
    """Four rows of which ``flows`` [B, S] says where a loss reads the output."""
    call = call_of(pattern, max(LENGTHS), batch=len(LENGTHS), heads=2, kv_heads=1)
    call.grad_out.mul_(flows[:, None, :, None])
    call.grad_lse.mul_(flows[:, None, :])
    return call


def alone(pattern: Any, call: Call, backend: str, row: int, part: slice) -> dict[str, Tensor]:
    """What one row gives without the others and without its padding."""
    at = (slice(row, row + 1), slice(None), part)
    query, key, value = (x[at] for x in (call.query, call.key, call.value))
    scores = {"scores": call.captured["scores"][at]}
    own = Call(query, key, value, scores, ("scores",), call.grad_out[at], call.grad_lse[at])
    return evaluate(fs.compile(pattern, backend=backend), own)


def assert_rows_alone(pattern: Any, call: Call, backend: str, parts: list[tuple[int, slice]], plain: Any) -> None:
    got = evaluate(fs.compile(pattern, backend=backend), call)
    for row, part in parts:
        for name, wanted in alone(plain, call, backend, row, part).items():
            mine = got[name][row : row + 1, :, part]
            assert torch.allclose(mine, wanted, rtol=1e-4, atol=1e-5), (row, name)


@on_each_backend
def test_rows_padded_at_their_end(backend: str) -> None:
    """``padding`` beside a selection: real queries are as alone, keys of the padding get no gradient."""
    pattern: Any = P["padding"]() & HYBRID
    lengths = torch.tensor(LENGTHS, device=DEVICE)
    real = torch.arange(max(LENGTHS), device=DEVICE) < lengths[:, None]
    call = padded_call(pattern, real)
    call.captured["lengths"].copy_(lengths)
    assert outside(pattern, call, backend) == []
    assert_rows_alone(pattern, call, backend, [(n, slice(0, size)) for n, size in enumerate(LENGTHS)], HYBRID)
    got = evaluate(fs.compile(pattern, backend=backend), call)
    # Through thresholds a score's gradient is a difference of running sums, which a GPU adds up as a tree.
    for name, most in (("d key", 0.0), ("d value", 0.0), ("d scores", 1e-15 if DEVICE == "cuda" else 0.0)):
        assert (got[name].movedim(1, -1)[~real].abs() <= most).all(), name


@on_each_backend
def test_rows_padded_at_their_start(backend: str) -> None:
    """Scores of -inf keep the padding out of the selection, and a mask keeps it out of the window."""
    pattern: Any = (kv >= STARTS[b]) & HYBRID
    starts = max(LENGTHS) - torch.tensor(LENGTHS, device=DEVICE)
    real = torch.arange(max(LENGTHS), device=DEVICE) >= starts[:, None]
    # ``starts`` is none of the names that call_of knows.
    call = padded_call(HYBRID, real)
    call = replace(call, captured={**call.captured, "starts": starts})
    call.captured["scores"].masked_fill_(~real[:, None], -torch.inf)
    assert outside(pattern, call, backend) == []
    parts = [(n, slice(max(LENGTHS) - size, None)) for n, size in enumerate(LENGTHS)]
    assert_rows_alone(pattern, call, backend, parts, HYBRID)


@on_each_backend
def test_a_row_that_is_all_padding(backend: str) -> None:
    pattern: Any = P["padding"]() & HYBRID
    call = call_of(pattern, 70, batch=2)
    call.captured["lengths"].copy_(torch.tensor([0, 70]))
    got = evaluate(fs.compile(pattern, backend=backend), call)
    assert (got["out"][0] == 0).all()
    assert (got["lse"][0] == -torch.inf).all()
    for name in ("d query", "d key", "d value", "d scores"):
        assert (got[name][0] == 0).all(), name
    assert outside(pattern, call, backend) == []


@on_each_backend
@pytest.mark.parametrize("encoding", ["ids", "cumulative lengths"])
def test_packed_documents_whose_prefix_restarts(backend: str, encoding: str) -> None:
    """Documents in one row, of one token and of many, are as alone: each selects from its own prefix."""
    ends = [30, 31, 90]
    if encoding == "ids":
        document, segments = P["document"](), "doc"
        given = (torch.arange(90)[None] >= torch.tensor(ends)[:, None]).sum(0)[None]
    else:
        document, segments = P["document"](cu_seqlens="cu_seqlens"), "cu_seqlens"
        given = torch.tensor([0, *ends])
    pattern: Any = document & (P["sliding_window"](20) | P["sparsek"](12, after=20, segments=segments))
    call = call_of(HYBRID, 90, batch=1, heads=2, kv_heads=1)
    call = replace(call, captured={**call.captured, segments: given.to(DEVICE)})
    assert outside(pattern, call, backend) == []
    parts = [(0, slice(first, last)) for first, last in zip([0, *ends], ends, strict=False)]
    assert_rows_alone(pattern, call, backend, parts, HYBRID)


@on_each_backend
def test_packed_rows_of_different_length(backend: str) -> None:
    """Documents that lie differently in each row, and padding behind the last."""
    pattern: Any = P["padding"]() & P["document"]() & CAUSAL & P["sparsek"](12, segments="doc")
    call = call_of(pattern, 90, batch=3, heads=2, kv_heads=1)
    call.captured["lengths"].copy_(torch.tensor([90, 50, 7]))
    assert outside(pattern, call, backend) == []


@on_each_backend
def test_a_layer_takes_rows_of_different_length(backend: str) -> None:
    layer = fs.nn.SparseKAttention(32, heads=2, kv_heads=1, k=12, window=20, pattern="padding").to(DEVICE)
    layer.attention = fs.compile(layer.pattern, backend=backend)
    x = torch.randn(2, 70, 32, device=DEVICE)
    both = layer(x, lengths=torch.tensor([70, 33], device=DEVICE))
    short = layer(x[1:, :33], lengths=torch.tensor([33], device=DEVICE))
    torch.testing.assert_close(both[1:, :33], short, rtol=1e-4, atol=1e-5)
