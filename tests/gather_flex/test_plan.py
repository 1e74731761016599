"""When copies of selected keys are made, what the plan says of it, and what becomes of calls that cannot be."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import flexsparse as fs
from flexsparse import _torch
from flexsparse.codegen.gathering.rows import program_of_rows
from flexsparse.errors import BackendError, DeviceError
from flexsparse.execution import launchers_of
from flexsparse.ir.program import program_text

HYBRID = "sliding_window(512) | sparsek(512, after=512)"
ON_GPU: dict[str, Any] = {"q_len": 16384, "head_dim": 128, "heads": 16, "device": "cuda"}


def test_auto_takes_copies_where_our_kernels_cannot_run_and_they_spare_work() -> None:
    assert fs.compile(HYBRID).bind(**ON_GPU).plan.backend == "gather"
    assert fs.compile(HYBRID).bind(**{**ON_GPU, "head_dim": 320}).plan.backend == "gather_flex"
    # Blocks chosen by the query can be anywhere: no tile is spared.
    assert fs.compile(f"{HYBRID} | moba(64, 2)").bind(**ON_GPU).plan.backend == "flex"
    assert fs.compile("causal").bind(**ON_GPU).plan.backend == "flex"


def test_a_plan_counts_tiles_of_keys_and_of_copies() -> None:
    plan = fs.compile(HYBRID, backend="gather_flex").bind(**{**ON_GPU, "needs_grad": True}).plan
    near = fs.compile("sliding_window(512)").bind(**ON_GPU).plan
    assert plan.tiles is not None
    assert near.tiles is not None
    chunks = 16384 // 256
    assert plan.tiles.total == 16 * 128 * (128 + chunks * 4)
    assert plan.tiles.full == near.tiles.full
    # Two tiles of queries share a chunk. Slots take 1 and 3 tiles in the third and fourth chunk, then 4; of the fresh
    # keys one tile is near as well, and the second tile of a chunk has another from the third chunk on.
    assert plan.tiles.partial - near.tiles.partial == 16 * (2 * (1 + 3 + 4 * (chunks - 4)) + chunks - 2)
    assert plan.tiles.undecided == (plan.tiles.partial - near.tiles.partial) / 16
    assert plan.gathered == 0
    assert plan.calls == 2
    text = str(fs.compile(HYBRID, backend="gather_flex").bind(**{**ON_GPU, "needs_grad": True}).explain())
    for said in (
        "256 queries share copies of the keys in the slots as their chunk starts: 49,152 rows for 16,384 keys, 3.0 "
        "times the memory of key and value. No key counts twice.",
        "Gradients of the copies are added to their keys in a fixed order, without atomics.",
        "Gradients of the scores: FlexAttention's atomics, so the last bits may differ between runs.",
        "two FlexAttention calls",
    ):
        assert said in text
    assert "classified at each call" not in text


@pytest.mark.parametrize(
    ("text", "shape", "reason"),
    [
        ("causal", {}, "the pattern selects none"),
        (HYBRID, {"kv_len": 32768}, "as many queries as keys, from position 0 on"),
        (HYBRID, {"q_offset": 5}, "as many queries as keys, from position 0 on"),
        (HYBRID, {"dtype": torch.float64}, "takes no float64"),
        (HYBRID, {"head_dim": 8}, "head_dim of at least 16, not 8"),
        (HYBRID, {"device": "cpu"}, "A gate on V needs the LSE"),
        ("sparsek(8, gate='k')", {"device": "cpu", "needs_grad": True}, "no gradients on CPU"),
    ],
)
def test_what_has_no_copies_is_refused_in_words(text: str, shape: dict[str, Any], reason: str) -> None:
    with pytest.raises(BackendError, match=reason) as caught:
        fs.compile(text, backend="gather_flex").bind(**{**ON_GPU, **shape})
    assert "backend='chunked' runs it exactly" in str(caught.value)
    assert str(caught.value).startswith("backend='gather_flex': got ")


def test_a_device_that_flex_attention_does_not_know_is_refused() -> None:
    with pytest.raises(DeviceError, match="not on mps"):
        fs.compile(HYBRID, backend="gather_flex").bind(**{**ON_GPU, "device": "mps"})


def test_gradients_of_scores_are_refused_where_torch_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_torch, "HAS_CAPTURED_GRADIENTS", False)
    attention = fs.compile(HYBRID, backend="gather_flex")
    with pytest.raises(BackendError, match=r"Gradients of the scores need torch 2\.6"):
        attention.bind(**{**ON_GPU, "needs_grad": True})
    assert attention.bind(**ON_GPU).plan.backend == "gather_flex"


def test_the_eager_form_is_refused_as_the_compiled_one() -> None:
    with pytest.raises(BackendError, match="the pattern selects none"):
        fs.compile("causal", backend="gather_flex_eager").bind(q_len=64, head_dim=16)


def test_an_allowed_fallback_is_the_oracle() -> None:
    query, key, value = (torch.randn(1, 1, n, 16) for n in (4, 20, 20))
    attention: Any = fs.compile("sparsek(3)", backend="gather_flex_eager", fallback="reference")
    with pytest.warns(fs.errors.BackendNotice, match="as many queries as keys"):
        out = attention(query, key, value, scores=torch.randn(1, 1, 20), q_offset=16)
    assert out.shape == query.shape


@pytest.mark.parametrize(
    ("text", "mask"),
    [
        (HYBRID, "((kv <= q) & (q - kv < 512) & own) | held_0"),
        ("sparsek(4) & document", "held_0 & (doc[b, q] == doc[b, kv])"),
        ("sparsek(4) | sparsek(5, scores='u')", "held_0 | (held_1 & ~selected_0)"),
    ],
)
def test_the_mask_of_rows(text: str, mask: str) -> None:
    assert program_text(program_of_rows(fs.compile(text).ir).mask) == mask


def test_functions_of_rows_can_be_read() -> None:
    attention = fs.compile(HYBRID)
    assert "def mask_mod(b, h, q, row):" in attention.code("rows")
    assert "kv = key_of_row[b, h // row_group, row]" in attention.code("rows")
    assert fs.compile("causal").code("rows") == "# no copies of keys: nothing is selected"


def test_what_cannot_be_built_names_the_backend() -> None:
    query = torch.randn(1, 1, 40, 16)
    attention: Any = fs.compile("sparsek(3, gate='k')", backend="gather_flex_eager", recompile_budget=3)
    launchers = launchers_of(fs.parse("sparsek(3, gate='k')").node, attention._settings, False, "gather_flex_eager")
    launchers.plain.run = _refusing
    with pytest.raises(BackendError) as caught:
        attention(query, query, query, scores=torch.randn(1, 1, 40))
    assert str(caught.value).startswith("backend='gather_flex_eager': got RuntimeError: no such kernel, expected")
    assert "attn.code('rows') shows the generated functions" in str(caught.value)


def _refusing(*_: Any) -> Any:
    raise RuntimeError("no such kernel")
