"""When selected keys are gathered, what the plan says of it, and what becomes of calls that cannot be."""

from __future__ import annotations

import os
import pathlib
from typing import Any

import pytest
import torch

import flexsparse as fs
from flexsparse.codegen import gathered as source
from flexsparse.codegen.gathering.parts import near_mask, parts_of
from flexsparse.errors import BackendError
from flexsparse.ir.nodes import FALSE
from flexsparse.ir.program import program_text
from flexsparse.runtime import gathered_sizes
from flexsparse.runtime.inputs import Shapes
from flexsparse.runtime.next_changes import next_changes

HYBRID = "sliding_window(512) | sparsek(512, after=512)"
ON_GPU: dict[str, Any] = {"q_len": 4096, "head_dim": 128, "heads": 16, "device": "cuda"}


def test_auto_gathers_on_a_gpu_where_keys_are_selected() -> None:
    assert fs.compile(HYBRID).bind(**ON_GPU).plan.backend == "gather"
    assert fs.compile("sliding_window(512)").bind(**ON_GPU).plan.backend == "flex"
    assert fs.compile(HYBRID, backend="flex").bind(**ON_GPU).plan.backend == "flex"


def test_a_plan_says_what_is_slow() -> None:
    slow = "Gradients of bias: recomputed by PyTorch operations"
    learned = fs.compile(f"({HYBRID}) + relative_bias(64)").bind(**ON_GPU, needs_grad=True).plan
    assert any(note.startswith(slow) for note in learned.notes)
    assert not any(slow in note for note in fs.compile(HYBRID).bind(**ON_GPU, needs_grad=True).plan.notes)
    assert not any(slow in note for note in fs.compile(f"({HYBRID}) + relative_bias(64)").bind(**ON_GPU).plan.notes)


def test_a_plan_counts_the_tiles_that_are_near_and_the_keys_that_are_gathered() -> None:
    plan = fs.compile(HYBRID).bind(**ON_GPU).plan
    near = fs.compile("sliding_window(512)", block_size=64).bind(**ON_GPU).plan
    assert plan.tiles == near.tiles
    assert plan.gathered == 512 + 64
    assert plan.flops is not None
    assert near.flops is not None
    assert plan.flops - near.flops == 2 * 16 * 4096 * (512 + 64) * 256
    assert plan.calls == 1


@pytest.mark.parametrize(
    ("text", "shape", "reason"),
    [
        ("causal", {}, "the pattern selects none"),
        (HYBRID, {"device": "cpu"}, "need a GPU, not cpu"),
        (HYBRID, {"dtype": torch.float64}, "take no float64"),
        (HYBRID, {"kv_len": 8192}, "as many queries as keys"),
        (HYBRID, {"head_dim": 320}, "head_dim up to 256, not 320"),
        ("sparsek(8) | moba(64, 2)", {}, "Blocks chosen by the query"),
    ],
)
def test_what_cannot_be_gathered_is_refused_in_words(text: str, shape: dict[str, Any], reason: str) -> None:
    with pytest.raises(BackendError, match=reason):
        fs.compile(text, backend="gather").bind(**{**ON_GPU, **shape})


@pytest.mark.parametrize(
    ("text", "near"),
    [
        (HYBRID, "(kv <= q) & (q - kv < 512)"),
        ("sparsek(4) & document", "False"),
        ("(sparsek(4) | sinks(2)) & document", "(kv < 2) & (doc[b, q] == doc[b, kv])"),
    ],
)
def test_near_is_what_is_allowed_whatever_is_selected(text: str, near: str) -> None:
    assert program_text(near_mask(fs.compile(text).ir)) == near


def test_a_window_before_the_selection_costs_gathered_keys_no_comparison() -> None:
    """With after=512 no selected key is in the window, so nothing but its death is asked of it."""
    parts = parts_of(fs.compile(HYBRID).ir)
    assert program_text(parts["selected 0"].mask) == "True"
    overlapping = parts_of(fs.compile("sliding_window(512) | sparsek(512, after=511)").ir)
    assert program_text(overlapping["selected 0"].mask) != "True"
    assert FALSE not in (part.mask for part in parts.values())


def test_the_next_change_of_a_block_of_slots() -> None:
    table = torch.tensor([[0, 1, 2, -1, -1], [0, 1, 2, -1, -1], [0, 5, 2, -1, -1], [0, 5, 2, 7, -1], [0, 5, 2, 7, 9]])
    assert next_changes(table, 2).tolist() == [[2, 2, 5, 5, 5], [3, 3, 3, 5, 5], [4, 4, 4, 4, 5]]
    assert next_changes(table[:1], 4).tolist() == [[1], [1]]


def test_sizes_shrink_until_they_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = Shapes(1, 1, 1, 64, 64, 256, 256, torch.bfloat16, torch.device("cpu"))
    found = []
    for limit in (232_448, 101_376, 20_000):
        monkeypatch.setattr(gathered_sizes, "_shared_memory", lambda device, limit=limit: limit)
        if limit == 20_000:
            with pytest.raises(BackendError, match="tiles that fit 20000 bytes of shared memory"):
                gathered_sizes.sizes_of("forward", shapes)
        else:
            found.append(gathered_sizes.sizes_of("forward", shapes))
            assert gathered_sizes.shared_bytes("forward", found[-1], shapes) <= limit
    assert found[1].keys * found[1].stages < found[0].keys * found[0].stages


def test_a_module_is_kept_once_and_elsewhere_where_the_cache_is_read_only(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLEXSPARSE_CACHE_DIR", str(tmp_path))
    path = source._kept("one.py", "x = 1\n")
    assert path == tmp_path / "kernels" / "one.py"
    written = path.stat().st_mtime_ns
    assert source._kept("one.py", "x = 1\n") == path
    assert path.stat().st_mtime_ns == written
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    monkeypatch.setenv("FLEXSPARSE_CACHE_DIR", str(blocked))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    elsewhere = source._kept("one.py", "x = 1\n")
    assert elsewhere == tmp_path / f"flexsparse-{os.getuid()}" / "one.py"
    assert elsewhere.read_text() == "x = 1\n"


def test_one_text_serves_every_k() -> None:
    program = fs.compile(HYBRID).ir
    assert "tl.atomic" not in source.gathered_source(program).text
    # What a selected key's score is, is in the kernels and not in their title.
    scored = fs.compile("sliding_window(96) | sparsek(64, after=96).score(softcap(30.0))").ir
    assert "beside (kv <= q) & (q - kv < 96)" in source.gathered_source(scored).text
    other = fs.compile(fs.compile(HYBRID).pattern.with_k(96)).ir
    assert other.selections[0].k == 96
    assert source.gathered_source(other).text == source.gathered_source(program).text
    assert source.gathered_source(fs.compile(HYBRID.replace("window(512)", "window(500)")).ir).text != (
        source.gathered_source(program).text
    )
