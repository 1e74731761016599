"""What the doctor says of machines with and without a GPU, Triton and a compiler; clearing the cache."""

from __future__ import annotations

import json
import pathlib
import shutil
from typing import Any

import pytest
import torch

from flexsparse import doctor
from flexsparse.codegen.gathered import load_module
from flexsparse.explorer import cross
from tests.cli.conftest import Invoke


def machine(monkeypatch: pytest.MonkeyPatch, *, gpus: int, triton: str, compiler: str | None) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda n: f"GPU {n}")
    for module in (doctor, cross):
        monkeypatch.setattr(module, "triton_version", lambda: triton)
    monkeypatch.setattr(shutil, "which", lambda name: compiler if name == compiler else None)


def found(invoke: Invoke) -> tuple[dict[str, Any], list[bool]]:
    data = json.loads(invoke("doctor", "--json").out)
    for finding in data["findings"]:
        assert finding["verdict"]["reason"]
        assert bool(finding["mend"]) is not finding["verdict"]["holds"]
    return data, [finding["verdict"]["holds"] for finding in data["findings"]]


def test_a_machine_with_everything(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, gpus=2, triton="3.7.1", compiler="clang++")
    data, holds = found(invoke)
    assert data["gpus"] == ["GPU 0", "GPU 1"]
    assert data["versions"]["triton"] == "3.7.1"
    assert data["versions"]["torch"] == torch.__version__
    assert holds[:4] == [True, True, True, True]
    assert "clang++ builds its kernels" in invoke("doctor").out


def test_a_machine_with_nothing(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, gpus=0, triton="", compiler=None)
    data, holds = found(invoke)
    assert data["gpus"] == []
    assert data["versions"]["triton"] == "none"
    assert not any(holds)
    text = invoke("doctor").out
    for mend in ("apt-get install g++", "pip install 'triton>=3.3'", "Use a machine with a GPU"):
        assert mend in text


def test_an_old_triton_on_a_gpu(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, gpus=1, triton="3.2.0", compiler="g++")
    _, holds = found(invoke)
    assert holds[:4] == [True, True, True, False]
    assert "triton 3.2.0 is too old." in invoke("doctor").out


def test_clearing_the_cache_removes_generated_modules_alone(
    invoke: Invoke, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    monkeypatch.setenv("FLEXSPARSE_CACHE_DIR", str(tmp_path))
    load_module("answer = 42  # a module of this test")
    mine = tmp_path / "kernels" / "notes.py"
    mine.write_text("kept")
    data = json.loads(invoke("doctor", "--json").out)
    assert (data["cache"], data["cache_files"]) == (str(tmp_path / "kernels"), 1)
    assert data["cache_bytes"] == len("answer = 42  # a module of this test")
    assert invoke("cache", "clear").out.startswith("kernel modules removed: 1, of 36 bytes, from ")
    assert json.loads(invoke("cache", "clear", "--json").out)["files"] == 0
    assert [path for path in (tmp_path / "kernels").iterdir() if path.is_file()] == [mine]
