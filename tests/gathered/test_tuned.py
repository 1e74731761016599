"""Sizes that were found on a GPU: searched, kept, shared between processes, and read before the built-in ones."""

from __future__ import annotations

import json
import math
import os
import pathlib
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime.errors import OutOfResources

from flexsparse import files, tuning
from flexsparse.errors import BackendError, BackendNotice
from flexsparse.runtime import gathered, gathered_gradients, gathered_sizes, tuned
from flexsparse.runtime.gathered_sizes import KERNELS, Sizes, sizes_of
from flexsparse.runtime.inputs import Shapes

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
PLACE = tuned.Place("NVIDIA H200", "90", "3.6.0", 16, 64, 64)
SHAPES = Shapes(1, 16, 4, 4096, 4096, 64, 64, torch.bfloat16, torch.device("cuda", 0))
WIDE = Sizes(64, 64, 8, 6)
FOUND = {"forward": WIDE, "query": WIDE, "key": Sizes(16, 64, 8, 1), "slot": Sizes(64, 128, 4, 3)}


@pytest.fixture(autouse=True)
def an_h200(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cache of its own, and a GPU for all that asks for its name and its shared memory."""
    monkeypatch.setenv("FLEXSPARSE_CACHE_DIR", str(tmp_path))

    def place_of(device: torch.device, dtype: torch.dtype, head_dim: int, value_dim: int) -> tuned.Place:
        widths = (tuned.padded(head_dim), tuned.padded(value_dim))
        return replace(PLACE, bits=8 * dtype.itemsize, head_dim=widths[0], value_dim=widths[1])

    monkeypatch.setattr(gathered_sizes, "place_of", place_of)
    monkeypatch.setattr(gathered_sizes, "_shared_memory", lambda device: 232_448)
    tuned.tuned_sizes.cache_clear()
    yield
    tuned.tuned_sizes.cache_clear()


def test_what_was_kept_comes_before_the_table() -> None:
    before = {kernel: sizes_of(kernel, SHAPES) for kernel in KERNELS}
    tuned.keep_tuned(PLACE, FOUND)
    assert {kernel: sizes_of(kernel, SHAPES) for kernel in KERNELS} == FOUND
    # float16 is as wide as bfloat16, and 50 features are held in 64; other places keep the table's.
    assert sizes_of("forward", replace(SHAPES, dtype=torch.float16, head_dim=50)) == FOUND["forward"]
    assert sizes_of("slot", replace(SHAPES, head_dim=128)) == before["slot"]
    assert sizes_of("forward", replace(SHAPES, dtype=torch.float32)) not in (FOUND["forward"], before["forward"])


def test_what_does_not_fit_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    tuned.keep_tuned(PLACE, FOUND)
    monkeypatch.setattr(gathered_sizes, "_shared_memory", lambda device: 101_376)
    assert gathered_sizes.shared_bytes("forward", WIDE, SHAPES) > 101_376
    assert sizes_of("forward", SHAPES) == Sizes(64, 64, 4, 2, gathered_sizes.FOUR_BLOCKS)
    assert sizes_of("key", SHAPES) == FOUND["key"]


@pytest.mark.parametrize("kernel", KERNELS)
def test_only_sizes_that_cover_every_tile_are_tried(kernel: str) -> None:
    tried = tuning.candidates(kernel, SHAPES)
    assert len(tried) > 10
    assert kernel == "slot" or all(64 % sizes.keys == 0 for sizes in tried)
    assert all(64 % sizes.queries == 0 for sizes in tried)


def test_a_third_stage_is_taken_where_two_blocks_still_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = replace(SHAPES, head_dim=128, value_dim=128)
    three = Sizes(32, 64, 4, 3)
    one = gathered_sizes.shared_bytes("key", three, wide)
    monkeypatch.setattr(gathered_sizes, "_shared_memory", lambda device: 2 * one)
    assert sizes_of("key", wide) == three
    monkeypatch.setattr(gathered_sizes, "_shared_memory", lambda device: 2 * one - 1)
    assert sizes_of("key", wide) == replace(three, stages=2)


def test_sizes_with_which_a_kernel_faults_are_neither_tried_nor_read() -> None:
    assert not [s for s in tuning.candidates("slot", SHAPES) if s.queries == 64 and s.stages == 1]
    faulty = Sizes(64, 32, 4, 1)
    tuned.keep_tuned(PLACE, {**FOUND, "slot": faulty})
    with pytest.warns(BackendNotice, match="is not what `flexsparse tune` writes"):
        assert sizes_of("slot", SHAPES) != faulty


def test_no_gpu_has_no_place() -> None:
    tuned.place_of.cache_clear()
    assert tuned.place_of(torch.device("cpu"), torch.bfloat16, 64, 64) is None
    assert tuned.tuned_sizes(None) == {}


def test_a_file_is_read_once_a_process() -> None:
    path = tuned.keep_tuned(PLACE, FOUND)
    assert path.name == "nvidia_h200-sm90-triton3.6.0-16bit-64x64.json"
    assert sizes_of("slot", SHAPES) == FOUND["slot"]
    path.unlink()
    assert sizes_of("slot", SHAPES) == FOUND["slot"]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"kernels"', '"kernel"'),
        ('"keys": 64', '"keys": 100'),
        ('"keys": 64', '"keys": "64"'),
        # Wider than the tiles of the block mask, which would be passed over.
        ('"keys": 64', '"keys": 128'),
        ('"queries": 16', '"queries": 128'),
        ('"stages": 3', '"stages": 0'),
        ("NVIDIA H200", "NVIDIA H100"),
        ("\n}", ""),
    ],
)
def test_a_damaged_file_counts_as_none_and_says_so(old: str, new: str) -> None:
    table = sizes_of("forward", SHAPES)
    path = tuned.keep_tuned(PLACE, FOUND)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.warns(BackendNotice, match="is not what `flexsparse tune` writes"):
        assert sizes_of("forward", SHAPES) == table


def test_an_unreadable_cache_is_no_error(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    monkeypatch.setenv("FLEXSPARSE_CACHE_DIR", str(blocked))
    assert sizes_of("slot", SHAPES) == gathered_sizes._TRIED["slot"][0]
    with pytest.raises(OSError, match="file"):
        tuned.keep_tuned(PLACE, FOUND)


def test_many_writers_leave_one_whole_file(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "shared.json"
    texts = [json.dumps([n] * 20_000) for n in range(8)]
    with ThreadPoolExecutor(8) as pool:
        for _ in pool.map(lambda text: files.write_whole(path, text), texts * 5):
            assert path.read_text() in texts
    assert [entry.name for entry in tmp_path.iterdir()] == ["shared.json"]


def test_an_interrupted_write_leaves_what_was_there(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "one.json"
    files.write_whole(path, "old")

    def interrupted(*paths: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        files.write_whole(path, "new")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["one.json"]


def test_a_search_finds_the_fastest_that_can_be_built() -> None:
    """A made-up GPU: 64 keys and 8 warps are best, three stages cannot be built, and the slots do not care."""

    def measure(kernel: str, sizes: Sizes) -> float:
        if sizes.stages == 3:
            return math.inf
        return 1.0 if kernel == "slot" else abs(sizes.keys - 64) + 8 / sizes.warps + sizes.stages + sizes.queries / 64

    said: list[str] = []
    best, trials = tuning.search(SHAPES, measure, said.append)
    assert best["forward"] == best["query"] == Sizes(64, 64, 8, 1)
    assert best["key"] == Sizes(16, 64, 8, 1)
    assert best["slot"] == sizes_of("slot", SHAPES), "the sizes of today win a tie"
    assert len(trials) == len(said) == tuning.count([SHAPES])
    assert len({(trial.kernel, trial.sizes) for trial in trials}) == len(trials)


def test_everything_that_is_tried_fits() -> None:
    wide = replace(SHAPES, head_dim=256, value_dim=256)
    for kernel in KERNELS:
        tried = tuning.candidates(kernel, wide)
        assert len(tried) < len(tuning.candidates(kernel, SHAPES))
        assert all(gathered_sizes.shared_bytes(kernel, sizes, wide) <= 232_448 for sizes in tried)
        assert all(tuned._checked(kernel, sizes) for sizes in tried)


def test_a_search_that_builds_nothing_says_so() -> None:
    with pytest.raises(BackendError, match=r"the forward kernel: got no sizes of .* that could be built"):
        tuning.search(SHAPES, lambda kernel, sizes: math.inf)


def test_all_that_is_tried_is_built_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """With threads in place of processes, and a GPU on which tiles of 16 keys cannot be built."""
    built: list[tuple[str, Sizes]] = []
    told: list[str] = []

    class Builder:
        def __init__(self, shapes: Shapes) -> None:
            assert shapes == SHAPES

        def build(self, kernel: str, sizes: Sizes) -> bool:
            built.append((kernel, sizes))
            return sizes.keys != 16

    def threads(workers: int, context: Any, **options: Any) -> ThreadPoolExecutor:
        # 10 GiB are free, and there is a process for every 3 of them.
        assert 1 <= workers <= 3
        return ThreadPoolExecutor(workers, **options)

    monkeypatch.setattr(tuning, "OnGpu", Builder)
    monkeypatch.setattr(tuning, "_builder", None)
    monkeypatch.setattr(tuning, "ProcessPoolExecutor", threads)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10 << 30, 80 << 30))
    measure: Any = Builder(SHAPES)
    failed = tuning.build_ahead(SHAPES, measure, told.append)
    # What the others of a pass have is built first.
    assert built[0] == ("query", sizes_of("query", SHAPES))
    everything = {(kernel, sizes) for kernel in KERNELS for sizes in tuning.candidates(kernel, SHAPES)}
    assert set(built[1:]) == everything
    assert len(told) == len(built) - 1 == tuning.count([SHAPES])
    assert failed == {trial for trial in everything if trial[1].keys == 16}

    # An error that is none of building ends it, and what waits is not begun.
    def fails(self: Any, kernel: str, sizes: Sizes) -> bool:
        built.append((kernel, sizes))
        # Long enough for the one that waits to hear of it.
        time.sleep(0.02)
        raise RuntimeError("CUDA error")

    monkeypatch.setattr(Builder, "build", fails)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1, 80 << 30))
    monkeypatch.setattr(measure, "build", lambda *trial: True, raising=False)
    built.clear()
    with pytest.raises(RuntimeError, match="CUDA error"):
        tuning.build_ahead(SHAPES, measure, told.append)
    assert len(built) < len(everything)


@pytest.mark.gpu
@pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="needs a GPU or Triton's interpreter")
def test_a_measurement_runs_the_kernel_with_the_sizes_in_question(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU with its clock; in the interpreter with one that counts, and sizes that cannot be built are inf."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(torch.cuda, "Event", _Counting)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
        monkeypatch.setattr(tuning, "_AHEAD", 8)
    monkeypatch.setattr(tuning, "_REPEATS", 1)
    ran: list[tuple[int, int]] = []
    constants = gathered.constants_of  # type: ignore[attr-defined]

    def seen(sizes: Sizes, shapes: Shapes) -> Any:
        ran.append((sizes.queries, sizes.keys))
        return constants(sizes, shapes)

    for module in (gathered, gathered_gradients):
        monkeypatch.setattr(module, "constants_of", seen)
    where = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    measure = tuning.OnGpu(Shapes(1, 2, 1, 70, 70, 16, 16, torch.float16, where, needs_grad=True))
    assert 0 <= measure("forward", Sizes(64, 32, 4, 1)) < math.inf
    assert set(ran) == {(64, 32)}
    assert 0 <= measure("key", Sizes(16, 32, 4, 1)) < math.inf
    assert (16, 32) in ran
    ran.clear()

    def refuse(*x: Any) -> Any:
        raise OutOfResources(2, 1, "shared memory")

    monkeypatch.setattr(gathered, "_forward", refuse)
    assert measure("forward", Sizes(64, 32, 4, 1)) == math.inf


class _Counting:
    """An event whose time is how many were recorded before it."""

    count = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        _Counting.count += 1
        self.at = _Counting.count

    def elapsed_time(self, other: _Counting) -> float:
        return float(other.at - self.at)
