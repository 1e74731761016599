"""Rows of a batch that end before its tensors do: each gets what it would get alone, whatever stands behind it."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import flexsparse as fs
from flexsparse.errors import DeviceError, DtypeError, ShapeError
from flexsparse.nn import SparseKAttention
from flexsparse.tolerance import Call, evaluate
from tests.gathered.calls import DEVICE, call_of
from tests.runtime.compositions import P

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" or torch.cuda.is_available()
gathers = pytest.param(
    "gather", marks=pytest.mark.skipif(not INTERPRETED, reason="needs a GPU or Triton's interpreter")
)
pytestmark = [
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]
HYBRID: Any = P["sliding_window"](9) | P["sparsek"](6, after=9)
PLAIN: dict[str, Any] = {
    "causal": P["causal"](),
    "both directions": P["longformer"](5, 3) + P["alibi"](),
    "a sink": P["full"]() & P["learned_sinks"](),
}
SELECTED: dict[str, Any] = {
    "hybrid": HYBRID,
    "not causal beside it": HYBRID | P["sliding_window"](4, causal=False),
    "documents": P["document"]() & (P["sinks"](2) | P["sparsek"](5, segments="doc", gate="logit")),
    "capped": (P["sliding_window"](4) | P["sparsek"](5, gate="capped_softmax")).sink(0.5),
}
LENGTHS = [40, 17, 1, 0]
SIZE = max(LENGTHS)


def poisoned(pattern: Any) -> Call:
    """Four rows of these lengths, with NaN behind them wherever a number can be NaN, and other ids elsewhere."""
    call = call_of(pattern, SIZE, batch=len(LENGTHS), heads=4, kv_heads=2)
    tensors = [call.query, call.key, call.value, call.grad_out, call.grad_lse]
    tensors += [x for name, x in call.captured.items() if name == "scores"]
    for row, size in enumerate(LENGTHS):
        for tensor in tensors:
            tensor[row, :, size:] = torch.nan
        if "doc" in call.captured:
            call.captured["doc"][row, size:] = -row
    return replace(call, captured={**call.captured, "lengths": torch.tensor(LENGTHS, device=DEVICE)})


def alone(pattern: Any, call: Call, backend: str, row: int) -> dict[str, Tensor]:
    """What one row gives without the others and without its padding."""
    at = (slice(row, row + 1), slice(None), slice(LENGTHS[row]))
    query, key, value = (x[at] for x in (call.query, call.key, call.value))
    captured = {n: x for n, x in call.captured.items() if n not in ("lengths", "scores", "doc")}
    captured |= {n: x[at] for n, x in call.captured.items() if n == "scores"}
    captured |= {n: x[at[0], at[2]] for n, x in call.captured.items() if n == "doc"}
    own = Call(query, key, value, captured, call.learned, call.grad_out[at], call.grad_lse[at])
    return evaluate(fs.compile(pattern, backend=backend), own)


def check_rows(pattern: Any, backend: str) -> None:
    call = poisoned(pattern)
    got = evaluate(fs.compile(pattern, backend=backend), call)
    shared = {name: torch.zeros_like(x) for name, x in got.items() if x.shape[0] != len(LENGTHS) or x.dim() < 3}
    for row, size in enumerate(LENGTHS):
        for name, x in got.items():
            if name not in shared:
                assert (x[row, :, size:] == (-torch.inf if name == "lse" else 0)).all(), (row, name)
        if not size:
            continue
        for name, wanted in alone(pattern, call, backend, row).items():
            if name in shared:
                shared[name] += wanted
            else:
                assert torch.allclose(got[name][row : row + 1, :, :size], wanted, rtol=1e-4, atol=1e-5), (row, name)
    for name, wanted in shared.items():
        assert torch.allclose(got[name], wanted, rtol=1e-4, atol=1e-5), name


@pytest.mark.parametrize("backend", ["chunked", "reference", "flex_eager"])
@pytest.mark.parametrize("name", PLAIN)
def test_each_row_is_as_alone(name: str, backend: str) -> None:
    check_rows(PLAIN[name], backend)


@pytest.mark.parametrize("backend", ["chunked", "reference", "flex_eager", "gather_flex_eager", gathers])
@pytest.mark.parametrize("name", SELECTED)
def test_each_row_selects_as_alone(name: str, backend: str) -> None:
    check_rows(SELECTED[name], backend)


def operands(size: int = 30, batch: int = 2) -> Any:
    return torch.randn(3, batch, 2, size, 16)


def test_lengths_are_data() -> None:
    """Another set of lengths builds and writes nothing, and tiles are kept for the same tensor."""
    attention = fs.compile(HYBRID, backend="chunked")
    (query, key, value), scores = operands(), torch.randn(2, 1, 30)
    within = attention.within_lengths
    for lengths in ([30, 4], [7, 0]):
        given = torch.tensor(lengths, dtype=torch.int32)
        got = attention(query, key, value, scores=scores, lengths=given)
        wanted = fs.reference(HYBRID, query, key, value, scores=scores, lengths=given)
        assert (got - wanted).abs().max() < 1e-5
        assert attention.within_lengths is within
    causal = fs.compile("causal", backend="chunked")
    given = torch.tensor([30, 4], dtype=torch.int32)
    causal(query, key, value, lengths=given)
    tiles = causal.plan
    causal(query, key, value, lengths=given)
    assert causal.plan is tiles
    given[1] = 9
    got = causal(query, key, value, lengths=given)
    assert torch.allclose(got[1, :, :9], causal(query, key, value)[1, :, :9])
    assert (got[1, :, 9:] == 0).all()


@pytest.mark.slow
def test_compiled_flex_is_built_once() -> None:
    attention = fs.compile("causal & sliding_window(40)", backend="flex", recompile_budget=1)
    query, key, value = operands(150)
    for lengths in ([150, 3], [0, 149], [64, 128]):
        given = torch.tensor(lengths)
        got = attention(query, key, value, lengths=given)
        assert (got - fs.reference(attention.pattern, query, key, value, lengths=given)).abs().max() < 1e-5
        assert attention.builds == 1


@pytest.mark.parametrize("backend", ["chunked", gathers])
def test_under_torch_compile(backend: str) -> None:
    attention = fs.compile(HYBRID, backend=backend)
    (query, key, value), scores = operands(), torch.randn(2, 2, 30)
    query.requires_grad_()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def traced(lengths: Tensor) -> Any:
        return attention(query, key, value, scores=scores, lengths=lengths)

    for lengths in (torch.tensor([30, 11]), torch.tensor([2, 0])):
        got, wanted = traced(lengths), attention(query, key, value, scores=scores, lengths=lengths)
        assert torch.equal(got, wanted)
        assert torch.equal(torch.autograd.grad(got.sum(), query)[0], torch.autograd.grad(wanted.sum(), query)[0])


def test_queries_that_start_later() -> None:
    """``q_offset`` counts in positions, and lengths with it: the last queries of a row, and a row that is over."""
    (query, key, value), lengths = operands(), torch.tensor([30, 22])
    attention = fs.compile("causal", backend="chunked")
    whole = attention(query, key, value, lengths=lengths)
    assert torch.allclose(attention(query[:, :, 20:], key, value, lengths=lengths, q_offset=20), whole[:, :, 20:])
    assert (whole[1, :, 22:] == 0).all()


def test_numbers_and_lengths() -> None:
    (query, key, value), lengths = operands(), torch.tensor([30, 12])
    attention = fs.compile(P["sliding_window"](fs.scalar("window", 5)), backend="chunked")
    wanted = fs.compile("sliding_window(9)", backend="chunked")(query, key, value, lengths=lengths)
    assert torch.equal(attention(query, key, value, window=9, lengths=lengths), wanted)


def test_mass_counts_real_queries() -> None:
    (query, key, _), lengths = operands(), torch.tensor([30, 12])
    query[1, :, 12:] = key[1, :, 12:] = torch.nan
    attention = fs.compile("causal", backend="chunked")
    mass = attention.mass(query, key, lengths=lengths)
    assert torch.allclose(mass[1:, :, :12], attention.mass(query[1:, :, :12], key[1:, :, :12]))
    assert (mass[1, :, 12:] == 0).all()
    assert torch.allclose(mass.sum(-1), lengths[:, None].expand(2, 2).float())


def test_a_pattern_may_have_lengths_of_its_own() -> None:
    """``padding()`` hides keys and no queries; a call gives it what it asks for."""
    (query, key, value), lengths = operands(), torch.tensor([30, 12])
    attention = fs.compile("padding", backend="chunked")
    got = attention(query, key, value, lengths=lengths)
    assert torch.allclose(got[1:], fs.compile("full", backend="chunked")(query[1:], key[1:, :, :12], value[1:, :, :12]))


def test_a_layer_reads_no_padding() -> None:
    layer = SparseKAttention(32, 4, 2, k=4, window=5, backend="chunked", bias=True)
    x = torch.randn(2, 20, 32)
    x[1, 8:] = torch.nan
    y = layer(x, lengths=torch.tensor([20, 8]))
    assert torch.allclose(y[1:, :8], layer(x[1:, :8]), atol=1e-6)
    assert torch.equal(y[1, 8:], layer.o_proj.bias.expand(12, 32))
    y[0].sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in layer.parameters() if p.grad is not None)
    assert layer.q_proj.weight.grad is not None


@pytest.mark.parametrize(
    ("lengths", "error", "says"),
    [
        ([3, 4], ShapeError, r"lengths: got list, expected a tensor \[2\], how many positions each row has"),
        (torch.tensor([3]), ShapeError, r"lengths: got shape \(1,\), expected a tensor \[2\]"),
        (torch.tensor([3, 31]), ShapeError, "lengths: got lengths from 3 to 31, expected lengths from 0 to .* 30"),
        (torch.tensor([-1, 3]), ShapeError, "lengths: got lengths from -1 to 3"),
        (torch.tensor([1.0, 3.0]), DtypeError, r"lengths: got torch\.float32, expected integers"),
        (torch.tensor([True, False]), DtypeError, r"expected integers\. A mask of what is real is counted"),
        (
            torch.empty(2, dtype=torch.int64, device="meta"),
            DeviceError,
            "lengths: got meta, expected query's device, cpu",
        ),
    ],
)
def test_wrong_lengths_are_refused(lengths: Any, error: Any, says: str) -> None:
    query, key, value = operands()
    with pytest.raises(error, match=says):
        fs.compile("causal", backend="chunked")(query, key, value, lengths=lengths)
    with pytest.raises(error, match=says):
        fs.reference("causal", query, key, value, lengths=lengths)


def test_unchecked_values_are_only_longer() -> None:
    query, key, value = operands()
    attention = fs.compile("causal", backend="chunked")
    got = attention(query, key, value, lengths=torch.tensor([99, 30]), validate=False)
    assert torch.equal(got, attention(query, key, value))


def test_a_check_takes_lengths() -> None:
    query, key, value = operands()
    found = fs.check(fs.compile("causal", backend="chunked"), query, key, value, lengths=torch.tensor([30, 12]))
    assert found, str(found)
    assert found.empty_rows == 2 * 18
