"""The cache that processes share: found whole, no error where it cannot be written, cleared by several at once."""

from __future__ import annotations

import pathlib
import subprocess
import sys

import pytest

from flexsparse.codegen import gathered
from tests.cli.conftest import Invoke, environment, shell

# Every process writes and reads the same modules, as fast as it can.
WORK = """
from flexsparse.codegen.gathered import load_module
for number in range(30):
    text = f"numbers = {list(range(20000))}\\nend = {number}\\n"
    module = load_module(text)
    assert (len(module.numbers), module.end) == (20000, number)
"""


def test_processes_share_the_cache(tmp_path: pathlib.Path) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WORK],
            stderr=subprocess.PIPE,
            text=True,
            env=environment(FLEXSPARSE_CACHE_DIR=str(tmp_path)),
        )
        for _ in range(3)
    ]
    for process in processes:
        _, said = process.communicate(timeout=120)
        assert (process.returncode, said) == (0, "")
    kept = [path for path in (tmp_path / "kernels").iterdir() if path.is_file()]
    assert len(kept) == 30


@pytest.mark.parametrize(
    "command",
    [
        ("doctor",),
        ("cache", "clear"),
        ("code", "sparsek(8)", "--stage", "kernels"),
        ("explain", "sparsek(8)", "--device", "cuda", "--length", "256"),
    ],
    ids=" ".join,
)
def test_a_cache_that_cannot_be_written_is_no_error(command: tuple[str, ...], tmp_path: pathlib.Path) -> None:
    # A file in its place refuses everybody, the superuser included.
    blocked = tmp_path / "blocked"
    blocked.write_text("in the way")
    answer = shell(*command, FLEXSPARSE_CACHE_DIR=str(blocked))
    assert (answer.code, answer.err) == (0, "")
    assert blocked.read_text() == "in the way"


def test_two_may_clear_at_once(invoke: Invoke, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    """Another process removes a module between its listing and its turn."""
    monkeypatch.setenv("FLEXSPARSE_CACHE_DIR", str(tmp_path))
    gathered.load_module("answer = 43  # another module of this test")
    listed = [tmp_path / "kernels" / "gone.py", *gathered.cached_files()]
    monkeypatch.setattr(gathered, "cached_files", lambda: listed)
    assert invoke("cache", "clear").out.startswith("kernel modules removed: 1, of 42 bytes, from ")
    monkeypatch.setattr("flexsparse.doctor.cached_files", lambda: listed)
    assert invoke("doctor").code == 0
