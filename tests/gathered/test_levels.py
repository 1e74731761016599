"""Rows keep the level that near keys give them; where that is too far from what they see, their chunk runs again."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

import flexsparse as fs
from flexsparse.language import kv, q
from flexsparse.runtime import gathered
from flexsparse.tolerance import Call, evaluate
from tests.gathered.calls import COMPOSITIONS, call_of, failures
from tests.runtime.compositions import P

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="needs a GPU or Triton's interpreter"),
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning"),
]
# The interpreter's bfloat16 is wrong; there float32 takes its place.
DTYPE = torch.float32 if INTERPRETED else torch.bfloat16
# Three chunks.
SIZE = 130
SHAPE = {"batch": 1, "heads": 2, "kv_heads": 1}
WINDOW = 40
HYBRID: Any = P["sliding_window"](WINDOW) | P["sparsek"](24, after=WINDOW)


@pytest.fixture(autouse=True)
def _held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathered, "HELD", (DTYPE,))


@pytest.fixture
def marks(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The marks of each forward pass: of the chunks that ran again."""
    found: list[torch.Tensor] = []

    def kept(kernel: Any, *given: Any, **named: Any) -> None:
        launch(kernel, *given, **named)
        if "marks" in named:
            found.append(named["p_again"])

    launch = getattr(gathered, "launch")  # noqa: B009
    monkeypatch.setattr(gathered, "launch", kept)
    return found


def with_outlier(far: float) -> Call:
    """A call in which each query's product with key 20 is far more than others, times scale; and 20 stays selected."""
    call = call_of(HYBRID, SIZE, DTYPE, **SHAPE)
    call.query[..., 0] = 4.0
    call.key[..., 0] = 0.0
    call.key[:, :, 20, 0] = far
    call.captured["scores"][:, :, 20] = 30.0
    return call


# On a GPU the compositions of bfloat16 are those of ``test_kernels``.
@pytest.mark.skipif(not INTERPRETED, reason="tested with bfloat16 elsewhere")
@pytest.mark.parametrize("name", ["softcap on a selection", "two selections, either", "hybrid gate logit"])
def test_compositions_with_held_levels(name: str) -> None:
    assert not failures(COMPOSITIONS[name], call_of(COMPOSITIONS[name], 100, DTYPE, **SHAPE))


def test_usual_scores_run_once(marks: list[torch.Tensor]) -> None:
    assert not failures(HYBRID, call_of(HYBRID, SIZE, DTYPE, **SHAPE))
    assert [int(m.sum()) for m in marks] == [0] * len(marks)
    assert marks


def test_chunks_with_a_far_key_run_again(marks: list[torch.Tensor]) -> None:
    """Key 20 leaves the window at query 60; from then on the chunks that have it in a slot want its level."""
    # Scores of 60 beside those of a few, after the usual scale of 1/4.
    call = with_outlier(60.0)
    assert not failures(HYBRID, call)
    n_chunks = -(-SIZE // 64)
    again = marks[0].view(*call.query.shape[:2], n_chunks).bool().cpu()
    assert again[..., 1:].all()


@pytest.mark.parametrize("far", [40.0, 4000.0] if INTERPRETED else [20.0, 30.0, 40.0, 4000.0])
def test_far_keys_near_the_bounds(far: float) -> None:
    assert not failures(HYBRID, with_outlier(far))


# Near keys for the first queries alone.
EARLY: Any = (kv < 1) & (q < 32)


def test_scores_that_are_far_below_what_no_near_key_sets(marks: list[torch.Tensor]) -> None:
    """Where they see no near key rows are measured against 0, from which all of these are too far."""
    pattern: Any = EARLY | P["sparsek"](24)
    call = call_of(pattern, SIZE, DTYPE, **SHAPE)
    call.query[..., 0] = 20.0
    call.key[..., 0] = -20.0
    assert not failures(pattern, call)
    assert all(int(m.min()) == 1 for m in marks)
    assert marks


def test_rows_that_see_nothing_give_nothing() -> None:
    pattern: Any = EARLY | P["sparsek"](24, after=70)
    call = call_of(pattern, SIZE, DTYPE, **SHAPE)
    assert not failures(pattern, call)
    got = evaluate(fs.compile(pattern, backend="gather"), call)
    assert (got["out"][:, :, 32:70] == 0).all()
    assert (got["lse"][:, :, 32:70] == -torch.inf).all()


def test_a_selection_alone_raises_levels_as_it_goes(marks: list[torch.Tensor]) -> None:
    pattern: Any = P["sparsek"](24)
    assert not failures(pattern, call_of(pattern, SIZE, DTYPE, **SHAPE))
    assert not marks


def test_what_is_not_a_number_comes_out() -> None:
    call = call_of(HYBRID, SIZE, DTYPE, **SHAPE)
    call.key[0, 0, 60] = torch.nan
    out = fs.compile(HYBRID, backend="gather")(call.query, call.key, call.value, scores=call.captured["scores"])
    bad = out.isnan().any(-1)
    # Both query heads share the KV head; the key is in the window of 40 queries, and none before sees it.
    assert bad[..., 60 : 60 + WINDOW].all()
    assert not bad[..., :60].any()


@pytest.mark.skipif(INTERPRETED, reason="the interpreter runs in one order")
def test_runs_again_give_the_same_bits() -> None:
    call = with_outlier(60.0)
    attention = fs.compile(HYBRID, backend="gather")
    first, second = (evaluate(attention, call) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
