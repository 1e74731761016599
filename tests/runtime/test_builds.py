"""One compiled pattern serves many lengths, and a budget ends in an error that lists what was built."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import flexsparse as fs
from flexsparse.errors import RecompileBudgetError, SettingError

LENGTHS = (300, 129, 200, 255, 256, 257, 384, 390, 400, 420, 444, 500, 511, 512, 513, 600, 640, 700, 768, 900)


def run(attention: fs.CompiledAttention, length: int) -> None:
    """One inference call with documents that change with the length, compared with the oracle."""
    query, key, value = (torch.randn(1, 2, length, 16) for _ in range(3))
    doc = torch.arange(length).div(100, rounding_mode="floor")
    got = attention(query, key, value, doc=doc)
    assert (got - fs.reference(attention.pattern, query, key, value, doc=doc)).abs().max() < 1e-5


@pytest.mark.slow
def test_twenty_lengths_take_one_build() -> None:
    attention = fs.compile("document & causal", backend="flex")
    for length in LENGTHS:
        run(attention, length)
    assert attention.builds == 1


@pytest.mark.slow
def test_static_lengths_spend_the_budget_and_the_error_lists_them() -> None:
    """The counter of the test above does count: without dynamic lengths every length is a build."""
    attention = fs.compile("document & causal & sliding_window(64)", backend="flex", dynamic=False, recompile_budget=2)
    run(attention, 300)
    run(attention, 400)
    assert attention.builds == 2
    with pytest.raises(RecompileBudgetError) as caught:
        run(attention, 500)
    text = str(caught.value)
    assert "recompile_budget: got a call that needs build 3: query [1, 2, 500, 16]" in text
    assert "expected at most 2 builds" in text
    assert "1: query [1, 2, 300, 16]" in text
    assert "2: query [1, 2, 400, 16]" in text
    assert attention.builds == 2


@pytest.mark.slow
def test_warmup_builds_what_later_calls_need(capsys: pytest.CaptureFixture[str]) -> None:
    attention = fs.compile("document & causal & sliding_window(70)", backend="flex")

    def documents(length: int) -> dict[str, torch.Tensor]:
        return {"doc": torch.zeros(length, dtype=torch.long)}

    made = attention.warmup([300, 400], head_dim=16, heads=2, dtype=torch.float32, device="cpu", captured=documents)
    assert made == 1
    assert "Building" in capsys.readouterr().err
    run(attention, 500)
    assert attention.builds == 1


def test_warmup_refuses_no_lengths() -> None:
    with pytest.raises(SettingError, match=r"lengths: got \[\], expected lengths of at least 1"):
        fs.compile("causal").warmup([], head_dim=16)


def test_the_budget_is_checked() -> None:
    with pytest.raises(SettingError, match="recompile_budget: got 0, expected an integer of at least 1"):
        fs.compile("causal", recompile_budget=0)


@pytest.mark.parametrize(
    ("q_len", "heads", "block_size", "options", "told"),
    [
        (66, 4, 128, {}, True),
        (64, 4, 128, {}, False),
        (1, 64, 128, {}, False),
        (128, 4, 128, {}, False),
        (40, 4, 64, {}, True),
        (66, 4, 128, {"BACKEND": "TRITON"}, False),
    ],
)
def test_short_queries_that_decoding_cannot_stack_take_the_other_kernel(
    q_len: int, heads: int, block_size: int, options: dict[str, Any], told: bool
) -> None:
    from flexsparse.runtime.inputs import Shapes
    from flexsparse.runtime.launcher import Launcher
    from flexsparse.settings import Settings

    launcher = Launcher("attend_test", Settings(block_size=block_size, kernel_options=tuple(options.items())), "flex")
    names = {"batch": 1, "heads": heads, "kv_heads": 2, "q_len": q_len, "kv_len": 256, "head_dim": 32}
    shapes = Shapes(**names, value_dim=32, dtype=torch.float32, device=torch.device("cuda"), needs_grad=False)
    assert launcher._without_decoding(shapes) == ({"FORCE_USE_FLEX_ATTENTION": True} if told else {})
