"""Which calls are started again as a whole, and what decides that two are alike. They run in tests/gpu."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace
from typing import Any

import pytest
import torch

import flexsparse as fs
from flexsparse import short_calls
from flexsparse.runtime import gathered_sizes
from flexsparse.runtime.inputs import Shapes
from flexsparse.settings import Settings
from flexsparse.short_calls import ShortCalls, short_call

HYBRID = "sliding_window(64) | sparsek(50, after=64)"
SHAPES = Shapes(1, 16, 16, 4096, 4096, 128, 128, torch.bfloat16, torch.device("cuda"))


@pytest.fixture(autouse=True)
def a_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathered_sizes, "_shared_memory", lambda _: 227 * 1024)
    monkeypatch.setattr(gathered_sizes, "place_of", lambda *_: None)


def key_of(
    pattern: Any = HYBRID, shapes: Shapes = SHAPES, given: Any = None, *numbers: Hashable, **settings: Any
) -> Hashable:
    compiled = fs.compile(pattern)
    settings = {**vars(compiled.settings), **settings}
    found = short_call(compiled._compiled, shapes, Settings(**settings), (), given or {}, *numbers)
    return None if found is None else found.key


def test_the_hybrid_is_and_so_are_scores_of_positions() -> None:
    assert key_of() is not None
    assert key_of(f"({HYBRID}) + alibi") is not None
    assert key_of("(sliding_window(64) | sparsek(50)) & (kv % 2 == 0)") is not None


@pytest.mark.parametrize(
    ("pattern", "change", "settings"),
    [
        (f"({HYBRID}) & document", {}, {}),
        (f"({HYBRID}).sink(1.0)", {}, {}),
        (f"({HYBRID}) + relative_bias(8)", {}, {}),
        ("causal", {}, {}),
        (HYBRID, {}, {"backend": "gather_flex"}),
        (HYBRID, {"q_len": 32768, "kv_len": 32768}, {}),
        (HYBRID, {"batch": 5}, {}),
        (HYBRID, {"device": torch.device("cpu")}, {}),
    ],
    ids=["documents", "a sink", "learned", "no selection", "another backend", "long", "many rows", "a CPU"],
)
def test_what_is_not_decided_by_shapes_or_not_short_is_not(pattern: str, change: Any, settings: Any) -> None:
    assert key_of(pattern, replace(SHAPES, **change), **settings) is None


def test_tensors_on_another_device_are_not() -> None:
    assert key_of(given={"scores": torch.zeros(1, 16, 4096)}) is None


def test_numbers_and_sizes_are_part_of_the_key() -> None:
    keys = [key_of(HYBRID, SHAPES, None, "a", 0.5), key_of(HYBRID, SHAPES, None, "b", 0.5)]
    keys += [
        key_of(HYBRID, SHAPES, None, "a", 0.25),
        key_of(HYBRID, replace(SHAPES, q_len=64, kv_len=64), None, "a", 0.5),
    ]
    assert len(set(keys)) == 4
    assert key_of(HYBRID, SHAPES, None, "a", 0.5) == keys[0]


def test_kinds_of_calls_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(short_calls, "_KEPT", 3)
    calls = ShortCalls()
    for number in range(10):
        assert calls.find(number) is None
        calls.keep(number, str(number))
        assert calls.find(number) == str(number)
        assert len(calls._bound) <= 3
