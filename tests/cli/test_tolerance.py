"""The tolerance policy: right answers pass in every dtype, wrong ones do not."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

import flexsparse
from flexsparse import tolerance
from flexsparse.compiler import CompiledAttention
from flexsparse.dense import reference
from flexsparse.example_inputs import example_call
from flexsparse.pictures.mask import square_shapes
from flexsparse.tolerance import Call, Comparison, compare, evaluate, judge

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
HYBRID = "causal() & (sliding_window(8) | sparsek(6, after=8))"
PATTERNS = (
    "causal()",
    "causal() & sliding_window(1)",
    "causal() & (kv > 4)",
    HYBRID,
    "sparsek(1)",
    "sparsek(4, gate='logit')",
    "(causal() + relative_bias(3)).score(softcap(2.0))",
)


def _call(text: str, dtype: torch.dtype, length: int = 40) -> tuple[CompiledAttention, Call]:
    attention = flexsparse.compile(text, backend="chunked")
    shapes = replace(square_shapes(length, 4, 2), dtype=dtype, batch=2)
    return attention, example_call(attention, shapes, 0)


def _failing(text: str, wrong: str, dtype: torch.dtype, **named: float) -> set[str]:
    """Which results of a pattern fail when those of another stand in for them."""
    attention, call = _call(text, dtype)
    other = flexsparse.compile(wrong, backend="chunked")
    got = evaluate(lambda *x, **n: other(*x, **{**n, **named}), call)
    return {c.name for c in judge(attention.pattern, got, call) if not c.holds}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("text", PATTERNS)
@pytest.mark.parametrize("length", [1, 17, 40])
def test_right_answers_hold(text: str, dtype: torch.dtype, length: int) -> None:
    attention, call = _call(text, dtype, length)
    for run in (attention, lambda *x, **n: reference(text, *x, **n)):
        assert [c for c in judge(attention.pattern, evaluate(run, call), call) if not c.holds] == []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("causal()", "kv < q"),
        ("causal() & sliding_window(8)", "causal() & sliding_window(9)"),
        (HYBRID, HYBRID.replace("after=8", "after=7")),
        (HYBRID, HYBRID.replace("after=8", "after=8, gate='none'")),
        (HYBRID, HYBRID.replace("after=8", "after=8, gate='v'")),
        ("causal() + alibi()", "causal()"),
        ("causal().score(softcap(1.0))", "causal()"),
    ],
    ids=["diagonal", "window", "after", "no gate", "gate on v only", "no bias", "no softcap"],
)
def test_wrong_answers_fail(text: str, wrong: str, dtype: torch.dtype) -> None:
    assert {"out", "d query", "d value"} <= _failing(text, wrong, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_wrong_scale_fails(dtype: torch.dtype) -> None:
    assert "lse" in _failing("causal()", "causal()", dtype, scale=0.25 * 1.1)
    assert {"out", "lse", "d query"} <= _failing("causal()", "causal()", dtype, scale=0.5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["d query", "d key", "d value", "d scores", "d bias"])
@pytest.mark.parametrize(
    "spoil",
    [lambda x: 0 * x, lambda x: -x, lambda x: 1.2 * x, lambda x: x.roll(1, -1)],
    ids=["0", "-x", "1.2 x", "roll"],
)
def test_wrong_gradients_fail(name: str, dtype: torch.dtype, spoil: Callable[[torch.Tensor], torch.Tensor]) -> None:
    attention, call = _call(f"({HYBRID}) + relative_bias(5)", dtype)
    got = evaluate(attention, call)
    got[name] = spoil(got[name])
    assert [c.name for c in judge(attention.pattern, got, call) if not c.holds] == [name]


def test_an_oracle_that_the_plain_formula_contradicts_forgives_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tolerance, "reference", lambda _, *x, **n: reference("causal() & sliding_window(3)", *x, **n))
    attention, call = _call("causal() & sliding_window(4)", torch.bfloat16)
    assert {c.name for c in judge(attention.pattern, evaluate(attention, call), call) if not c.holds} >= {"out", "lse"}


def test_a_plain_formula_that_overflows_forgives_nothing() -> None:
    one = torch.ones(3)
    assert not compare("out", one + 1, one, one * math.inf, torch.float16).holds
    assert compare("out", one, one, one * math.inf, torch.float16).holds


def test_a_nan_never_holds() -> None:
    one = torch.ones(3)
    bad = compare("out", torch.tensor([1.0, math.nan, 1.0]), one, one, torch.float32)
    assert bad.error == math.inf
    assert not bad.holds
    assert not Comparison("out", torch.float32, math.nan, 1.0).holds


def test_shapes_and_infinities() -> None:
    low = torch.tensor([-math.inf, 1.0])
    assert compare("lse", low, low, low, torch.float32).holds
    assert not compare("lse", torch.tensor([0.0, 1.0]), low, low, torch.float32).holds
    assert not compare("lse", torch.tensor([-math.inf] * 2), low, low, torch.float32).holds
    assert not compare("out", torch.ones(2, 1), torch.ones(2), torch.ones(2), torch.float32).holds


def test_no_error_holds_where_nothing_is_allowed() -> None:
    zero = torch.zeros(4)
    found = compare("d query", zero, zero, zero, torch.bfloat16)
    assert (found.error, found.allowed, found.share) == (0, 0, 0)
    assert found.holds
    assert not compare("d query", zero + 1e-30, zero, zero, torch.bfloat16).holds


def test_what_is_allowed_is_twice_plain_and_four_units() -> None:
    exact = torch.tensor([1.5, -3.0], dtype=torch.float64)
    plain = exact + 0.25
    eps = torch.finfo(torch.float32).eps
    assert tolerance.allowed(exact, plain, torch.float32) == 0.5 + 4 * 2 * eps
    assert tolerance.allowed(exact, exact, torch.float32, size=5) == 4 * 4 * eps
    wide = torch.finfo(torch.float64).eps
    assert tolerance.allowed(exact, exact, torch.float64, terms=10) == 4 * 10 * 2 * wide


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1e-30, 0.3, 1.0, 1.5, 2.0, 1000.0])
def test_ulp_is_the_spacing(size: float, dtype: torch.dtype) -> None:
    if size < torch.finfo(dtype).tiny:
        pytest.skip("below the normal numbers")
    x = torch.tensor(size, dtype=dtype)
    assert tolerance.ulp(float(x), dtype) == float(torch.nextafter(x, torch.tensor(math.inf, dtype=dtype)) - x)
