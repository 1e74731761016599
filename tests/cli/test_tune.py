"""``flexsparse tune`` with a made-up GPU and a measurer that only says numbers."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import pytest
import torch

from flexsparse import tuning
from flexsparse.cli import options, tune
from flexsparse.runtime import gathered_sizes, tuned
from flexsparse.runtime.gathered_sizes import Sizes
from flexsparse.runtime.inputs import Shapes
from tests.cli.conftest import Invoke

ASK = ("tune", "--head-dim", "64", "--length", "256")


@pytest.fixture
def a_gpu(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[pathlib.Path]:
    """The cache of a machine whose GPU likes 32 keys; nothing runs on it."""

    def place_of(device: torch.device, dtype: torch.dtype, head_dim: int, value_dim: int) -> tuned.Place:
        return tuned.Place("Made Up 1", "90", "3.6.0", 8 * dtype.itemsize, head_dim, value_dim)

    monkeypatch.setenv("FLEXSPARSE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(options, "read_device", lambda name, exists=True: torch.device("cuda", 0))
    for module in (tuned, gathered_sizes):
        monkeypatch.setattr(module, "place_of", place_of)
    monkeypatch.setattr(tune, "_measure", lambda *_: lambda kernel, sizes: abs(sizes.keys - 32) + sizes.stages)
    tuned.tuned_sizes.cache_clear()
    yield tmp_path / "cache"
    tuned.tuned_sizes.cache_clear()


def test_it_says_that_there_is_no_gpu(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for name, got in (("auto", "cpu, as this machine has no GPU"), ("cpu", "'cpu'"), ("cuda", "'cuda'")):
        answer = invoke("tune", "--device", name)
        assert (answer.code, answer.out) == (2, "")
        assert f"--device: got {got}" in answer.err


def test_it_keeps_what_it_finds(a_gpu: pathlib.Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    answer = invoke(*ASK)
    assert answer.code == 0, answer.err
    assert "Made Up 1, 16 bits, head_dim 64" in answer.out
    assert "\x1b" not in answer.out
    (file,) = (a_gpu / "tuned").iterdir()
    kernels = json.loads(file.read_text())["kernels"]
    assert kernels["forward"] == {"queries": 64, "keys": 32, "warps": 4, "stages": 1, "registers": 0}
    shapes = tune._shapes({"dtype": "bf16", "length": 9, "heads": 1, "kv_heads": 1, "head_dim": 64, "device": "cuda"})
    assert gathered_sizes.sizes_of("forward", shapes) == Sizes(64, 32, 4, 1)


def test_json_and_out_say_the_same(a_gpu: pathlib.Path, invoke: Invoke, tmp_path: pathlib.Path) -> None:
    out = tmp_path / "sizes.json"
    answer = invoke(*ASK, "--head-dim", "128", "--json", "--out", str(out))
    data = json.loads(answer.out)
    assert data == json.loads(out.read_text())
    assert [one["place"]["head_dim"] for one in data] == [64, 128]
    first = data[0]
    assert first["kept"] == str(next(path for path in (a_gpu / "tuned").iterdir() if "64x64" in path.name))
    assert first["kernels"]["forward"]["ms"] == 1 < first["kernels"]["forward"]["ms_before"]
    assert {trial["kernel"] for trial in first["trials"]} == set(gathered_sizes.KERNELS)


def test_a_read_only_cache_is_no_error(
    a_gpu: pathlib.Path, invoke: Invoke, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    monkeypatch.setenv("FLEXSPARSE_CACHE_DIR", str(blocked))
    answer = invoke(*ASK, "--json")
    assert answer.code == 0
    assert json.loads(answer.out)[0]["kept"] is None
    assert "note: not kept" in answer.err


def test_an_interrupt_leaves_no_half_of_a_file(
    a_gpu: pathlib.Path, invoke: Invoke, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while the second head_dim is measured: the first is kept, whole."""

    def measure_of(shapes: Any, advance: Any) -> Any:
        def measure(kernel: str, sizes: Sizes) -> float:
            if shapes.head_dim == 128 and kernel == "key":
                raise KeyboardInterrupt
            return 1.0

        return measure

    monkeypatch.setattr(tune, "_measure", measure_of)
    out = tmp_path / "sizes.json"
    answer = invoke(*ASK, "--head-dim", "128", "--out", str(out))
    assert answer.code == 130
    assert [one["place"]["head_dim"] for one in json.loads(out.read_text())] == [64]
    (file,) = (a_gpu / "tuned").iterdir()
    assert json.loads(file.read_text())["place"]["head_dim"] == 64


def test_mistakes_exit_with_2(
    a_gpu: pathlib.Path, invoke: Invoke, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune, "_measure", lambda shapes: pytest.fail("measured before the mistake was found"))
    for more, said in (
        (("--heads", "6"), "4 for 6 query heads"),
        (("--dtype", "float64"), "take no float64"),
        (("--out", str(tmp_path / "nowhere" / "x.json")), "--out: got"),
        (("--head-dim", "0"), "not in the range"),
    ):
        answer = invoke(*ASK, *more)
        assert (answer.code, answer.out) == (2, "")
        assert said in answer.err


def test_what_cannot_be_built_is_not_tried_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor does a search end because a process that builds was."""
    sizes, shapes = Sizes(64, 32, 4, 1), Shapes(1, 1, 1, 9, 9, 16, 16, torch.float16, torch.device("cuda", 0))
    monkeypatch.setattr(tuning, "OnGpu", lambda shapes: lambda kernel, sizes: 1.0)
    monkeypatch.setattr(tuning, "build_ahead", lambda shapes, measure, advance: {("forward", sizes)})
    measure = tune._measure(shapes, str)
    assert (measure("forward", sizes), measure("query", sizes)) == (float("inf"), 1.0)

    def ended(*_: Any) -> Any:
        raise BrokenProcessPool("out of memory")

    monkeypatch.setattr(tuning, "build_ahead", ended)
    assert tune._measure(shapes, str)("forward", sizes) == 1.0
    assert "a process that builds was ended (out of memory)" in capsys.readouterr().err
