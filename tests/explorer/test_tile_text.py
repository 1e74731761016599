"""The stages between the expression and the plan: the canonical form, and the tiles."""

from __future__ import annotations

import pytest

import flexsparse as fs
from flexsparse.errors import NotBoundError


def test_equal_masks_have_one_canonical_form() -> None:
    forms = [fs.compile(text).code("canonical") for text in ("(q - kv < 8) & causal()", "sliding_window(8)")]
    assert forms[0] == forms[1]
    assert forms[0].startswith("mask       = (kv - q <= 0) & (q - kv <= 7)\n")
    assert "gate_k     = m_0" in fs.compile("sparsek(4)").code("canonical")


def test_tiles_are_listed_by_the_queries_that_see_them() -> None:
    attention = fs.compile("sliding_window(512)")
    with pytest.raises(NotBoundError, match=r"^tiles: got a compiled pattern that has met no shapes"):
        attention.code("tiles")
    attention.bind(q_len=1024, head_dim=64, heads=8)
    lines = attention.code("tiles").splitlines()
    assert lines[0].endswith("144 full, 96 partial, 272 empty (46.9% computed)")
    assert lines[1] == "# the same for all heads and rows of the batch"
    # Query 512 sees keys 1 to 512: neither the first tile whole, nor its own.
    assert lines[6] == "q 512  partial kv 0:128, full kv 128:512, partial kv 512:640"
    assert len(lines) == 2 + 8


def test_heads_that_differ_are_listed_apart() -> None:
    attention = fs.compile("causal() & (h < 1)")
    attention.bind(q_len=256, head_dim=64, heads=2)
    lines = attention.code("tiles").splitlines()
    assert lines[1:] == [
        *("# row 0 of the batch, head 0", "q   0  partial kv 0:128", "q 128  full kv 0:128, partial kv 128:256"),
        *("# row 0 of the batch, head 1", "q   0  nothing", "q 128  nothing"),
    ]


def test_tiles_of_the_call_are_said_to_be_that() -> None:
    attention = fs.compile("document()")
    attention.bind(q_len=256, head_dim=64)
    assert attention.code("tiles").startswith("# Tiles depend on tensors of the call; `flexsparse show`")
