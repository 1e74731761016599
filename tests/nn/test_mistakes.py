"""What the module refuses: the class of the error and its whole text."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import flexsparse as fs
from flexsparse.errors import CapturedError, DtypeError, ExpressionError, FlexsparseError, SettingError, ShapeError
from flexsparse.language import captured, kv, q
from flexsparse.nn import SparseKAttention
from flexsparse.patterns.causal import causal

GATE = "one of 'kv', 'k', 'v', 'logit', 'none', 'ste', 'ste_identity', 'ste_sigmoid', 'capped_softmax'"

SETTINGS: list[tuple[dict[str, Any], type[FlexsparseError], str]] = [
    (
        {"dropout": 0.1},
        SettingError,
        "dropout: got 0.1, expected 0: a dropped key would still hold its slot, and the fused kernels have no dropout. "
        "Drop out what the layer returns instead.",
    ),
    ({"embed_dim": 0}, SettingError, "embed_dim: got 0, expected an integer of at least 1."),
    ({"heads": 2.0}, SettingError, "heads: got 2.0, expected an integer of at least 1."),
    (
        {"embed_dim": 18},
        SettingError,
        "embed_dim: got 18, expected a multiple of heads=4. Or say how wide a head is with head_dim=...",
    ),
    ({"kv_heads": 3}, SettingError, "kv_heads: got 3, expected a divisor of heads=4. Use one of [1, 2, 4]."),
    ({"kv_heads": 0}, SettingError, "kv_heads: got 0, expected an integer of at least 1."),
    (
        {"head_dim": 5},
        SettingError,
        "head_dim: got 5, expected an even number, as rotary embedding turns pairs. Or pass rope=False.",
    ),
    ({"head_dim": -1, "rope": False}, SettingError, "head_dim: got -1, expected an integer of at least 1."),
    ({"k": 0}, SettingError, "k: got 0, expected an integer of at least 1."),
    ({"k": True}, SettingError, "k: got True, expected an integer of at least 1."),
    ({"window": 0}, SettingError, "window: got 0, expected an integer of at least 1."),
    ({"gate": "logits"}, SettingError, f"gate: got 'logits', expected {GATE}. Did you mean 'logit'?"),
    (
        {"position_slope": -0.1},
        SettingError,
        "position_slope: got -0.1, expected a finite number of at least 0.",
    ),
    (
        {"position_slope": 0.0, "learnable_slope": True},
        SettingError,
        "position_slope: got 0.0, expected a finite number above 0.",
    ),
    (
        {"position_slope": float("nan")},
        SettingError,
        "position_slope: got nan, expected a finite number of at least 0.",
    ),
    ({"rope_base": 0}, SettingError, "rope_base: got 0, expected a finite number above 0."),
    ({"scale": "0.1"}, SettingError, "scale: got '0.1', expected a finite number of at least 0."),
    (
        {"backend": "chunk"},
        SettingError,
        "backend: got 'chunk', expected one of 'auto', 'gather', 'gather_flex', 'gather_flex_eager', "
        "'residue_flex', 'residue_flex_eager', 'flex', 'flex_eager', 'chunked', 'reference'. "
        "Did you mean 'chunked'?",
    ),
    (
        {"pattern": 3},
        ExpressionError,
        "pattern: got int, expected a pattern, its text, or a function from pattern to pattern.",
    ),
    (
        {"pattern": lambda p: None},
        ExpressionError,
        "pattern: got NoneType, expected a pattern, its text, or a function from pattern to pattern.",
    ),
    (
        {"pattern": "q - kv"},
        ExpressionError,
        "pattern: got Index, expected a pattern, its text, or a function from pattern to pattern.",
    ),
    (
        {"pattern": lambda p: causal()},
        ExpressionError,
        "pattern: got causal(), expected a pattern with a selection by the module's scores. Compose what is given.",
    ),
    (
        {"pattern": captured("positions", dims=("s",))[q] >= kv},
        CapturedError,
        "positions: got a captured tensor, expected captured tensors of other names than the arguments of forward, "
        "x and positions. Rename it.",
    ),
]


def make(**change: Any) -> SparseKAttention:
    settings = {"embed_dim": 16, "heads": 4, "kv_heads": 2, "k": 4, "window": 6, "backend": "chunked", **change}
    return SparseKAttention(**settings)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    SETTINGS,
    ids=[f"{number} {next(iter(c))}" for number, (c, _, _) in enumerate(SETTINGS)],
)
def test_settings(change: dict[str, Any], error: type[FlexsparseError], message: str) -> None:
    with pytest.raises(FlexsparseError) as caught:
        make(**change)
    assert str(caught.value) == message
    assert type(caught.value) is error


X = torch.zeros(2, 10, 16)
CALLS: list[tuple[dict[str, Any], type[FlexsparseError], str]] = [
    ({"x": [1.0]}, ShapeError, "x: got list, expected a tensor [B, S, 16] with B and S of at least 1."),
    (
        {"x": X[0]},
        ShapeError,
        "x: got shape (10, 16), expected [B, S, 16] with B and S of at least 1. Add the batch dimension: x[None].",
    ),
    (
        {"x": X[..., :8]},
        ShapeError,
        "x: got shape (2, 10, 8), expected [B, S, 16] with B and S of at least 1.",
    ),
    ({"x": X[:, :0]}, ShapeError, "x: got shape (2, 0, 16), expected [B, S, 16] with B and S of at least 1."),
    ({"x": X.long()}, DtypeError, "x: got torch.int64, expected the module's dtype, torch.float32."),
    (
        {"x": X.double()},
        DtypeError,
        "x: got torch.float64, expected the module's dtype, torch.float32. "
        "Convert it with x.to(...), or run under torch.autocast.",
    ),
    (
        {"x": X.to("meta")},
        fs.errors.DeviceError,
        "x: got meta, expected the module's device, cpu.",
    ),
    ({"positions": torch.arange(9)}, ShapeError, "positions: got shape (9,), expected [10] or [2, 10]."),
    ({"positions": 3}, ShapeError, "positions: got int, expected [10] or [2, 10]."),
    (
        {"positions": torch.zeros(10, dtype=torch.bool)},
        DtypeError,
        "positions: got torch.bool, expected integers or real numbers.",
    ),
    (
        {"scores": torch.zeros(2, 2, 10)},
        CapturedError,
        "scores: got a tensor, expected none, as the module's scorer makes them.",
    ),
    (
        {"doc": torch.zeros(10)},
        CapturedError,
        "doc: got a tensor that the pattern does not use, expected only scores. The pattern takes no other.",
    ),
]


@pytest.mark.parametrize(("change", "error", "message"), CALLS)
def test_calls(change: dict[str, Any], error: type[FlexsparseError], message: str) -> None:
    with pytest.raises(FlexsparseError) as caught:
        make()(**{"x": X, **change})
    assert str(caught.value) == message
    assert type(caught.value) is error


def test_a_missing_captured_tensor_is_named() -> None:
    with pytest.raises(CapturedError, match=r"^doc: got nothing, expected a tensor .* Pass doc=\.\.\. to the call\.$"):
        make(pattern="document")(X)


def test_autocast_does_not_reach_float64() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(DtypeError, match=r"^x: got torch\.float64"):
        make()(X.double())
