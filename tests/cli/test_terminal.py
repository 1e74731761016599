"""Processes of their own: start-up, pipes, terminals, colour, interruption."""

from __future__ import annotations

import json
import os
import pathlib
import re
import signal
import statistics
import subprocess
import sys
import time
from typing import Any

import pytest

from tests.cli.conftest import environment, shell

posix = pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals and SIGINT are POSIX")
# A process in the background of a shell's script ignores SIGINT, and hands that on.
INTERRUPTIBLE: Any = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}

START = """
import sys, time
from_here = time.perf_counter()
from flexsparse.cli import main
try:
    main({arguments!r}, prog_name="flexsparse")
except SystemExit as left:
    assert left.code == 0, left.code
loaded = [name for name in ("torch", "sympy", "rich", "numpy") if name in sys.modules]
print(time.perf_counter() - from_here, *loaded, file=sys.stderr)
"""


@pytest.mark.parametrize("arguments", [["--help"], ["show", "--help"], ["demo", "--help"]])
def test_help_starts_without_torch(arguments: list[str]) -> None:
    fastest = float("inf")
    for _ in range(3):
        command = [sys.executable, "-c", START.format(arguments=arguments)]
        found = subprocess.run(command, capture_output=True, text=True, check=True, env=environment())
        seconds, *loaded = found.stderr.split()
        assert loaded == []
        fastest = min(fastest, float(seconds))
    assert fastest < 0.3


def test_help_answers_at_once() -> None:
    """The whole process, interpreter included; the bound leaves room for a busy machine."""
    took = []
    for _ in range(7):
        start = time.perf_counter()
        assert shell("--help").code == 0
        took.append(time.perf_counter() - start)
    assert statistics.median(took) < 0.6


def test_help_documents_commands_and_exit_codes() -> None:
    text = shell("--help").out
    for name in ("list", "show", "explain", "code", "check", "demo"):
        assert f"\n  {name} " in text
    assert "130  interrupted" in text
    assert "3    an error that flexsparse did not foresee" in text
    assert max(map(len, text.splitlines())) <= 80


def test_a_pipe_gets_text_in_80_columns_even_in_ascii() -> None:
    answer = shell("show", "causal() & sliding_window(256)", PYTHONIOENCODING="ascii")
    assert answer.code == 0
    assert answer.err == ""
    assert answer.out.isascii()
    assert "\x1b" not in answer.out
    assert "####++.." in answer.out
    assert max(map(len, answer.out.splitlines())) <= 80


def _on_a_terminal(*arguments: str, **variables: str) -> str:
    """What a command writes to a pseudo-terminal of 80 columns."""
    import pty

    ours, theirs = pty.openpty()
    variables = {"TERM": "xterm-256color", "COLUMNS": "80", **variables}
    process = subprocess.Popen(
        [sys.executable, "-m", "flexsparse", *arguments],
        stdin=theirs,
        stdout=theirs,
        stderr=subprocess.DEVNULL,
        env=environment(**variables),
    )
    os.close(theirs)
    parts = []
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # Linux's answer once the other side is closed.
            break
        if not part:
            break
        parts.append(part)
    os.close(ours)
    assert process.wait(60) == 0
    return b"".join(parts).decode()


@posix
def test_a_terminal_gets_colour() -> None:
    text = _on_a_terminal("show", "causal()", "--length", "64")
    assert "\x1b[96m" in text
    assert "\x1b[33m" in text


@posix
def test_no_color_is_respected() -> None:
    text = _on_a_terminal("code", "causal()", "--stage", "mask_mod", NO_COLOR="1")
    assert text.splitlines()[0] == "def mask_mod(b, h, q, kv):"
    assert "\x1b" not in text


@posix
def test_long_texts_go_through_the_pager_of_a_terminal(tmp_path: pathlib.Path) -> None:
    pager = tmp_path / "pager"
    pager.write_text("#!/bin/sh\necho PAGED\nexec cat\n")
    pager.chmod(0o755)
    ours = {"PAGER": str(pager), "NO_COLOR": "1", "LINES": "24"}
    triton = ("code", "sparsek(64)", "--stage", "triton", "--length", "512")
    paged = _on_a_terminal(*triton, **ours)
    assert paged.splitlines()[0] == "PAGED"
    # A terminal has the pattern's lines and folds the others.
    assert " lines" in paged
    assert "# mask from sparsek(64): selected_0" in paged
    assert "\x1b" not in paged
    # Generated functions are the user's from end to end, and short ones need no pager.
    whole = _on_a_terminal("code", "sparsek_window(8, 8)", "--no-pager", **ours)
    assert whole.splitlines()[0] == "# sparsek_window(8, 8)"
    assert " lines" not in whole
    assert "PAGED" not in _on_a_terminal("code", "causal()", **ours)


@posix
def test_marks_are_coloured() -> None:
    text = _on_a_terminal("code", "sparsek(64)", "--stage", "triton", "--length", "512", "--full", "--no-pager")
    assert "\x1b[1;36m# mask from sparsek(64): selected_0" in text
    assert "def rows_of" in re.sub(r"\x1b\[[0-9;]*m", "", text)
    changed = _on_a_terminal("code", "sliding_window(8)", "--diff", "sliding_window(9)")
    assert "\x1b[32m+" in changed


@posix
def test_interruption_is_quiet() -> None:
    command = [sys.executable, "-m", "flexsparse", "check", "sparsek(64)", "--length", "1500"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(), **INTERRUPTIBLE
    )
    assert process.stderr is not None
    # The note is said when the first call runs, so everything is loaded by then.
    assert process.stderr.readline().startswith("note:")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in out + err


@posix
def test_interruption_leaves_a_whole_file(tmp_path: pathlib.Path) -> None:
    save = tmp_path / "bench.json"
    options = ["--device", "cpu", "--lengths", "32,64,96", "--seconds", "2", "--peers", "sdpa", "--save", str(save)]
    command = [sys.executable, "-m", "flexsparse", "bench", "causal()", *options]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(), **INTERRUPTIBLE
    )
    assert process.stdout is not None
    # A line is printed once its row is in the file.
    while "flexsparse " not in (line := process.stdout.readline()) or "this pattern" not in line:
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in out + err
    data = json.loads(save.read_text())
    assert data["complete"] is False
    assert data["rows"][0]["by"] == "flexsparse"
    assert [path.name for path in tmp_path.iterdir()] == ["bench.json"]


@posix
def test_bench_grows_on_a_terminal() -> None:
    options = ("--device", "cpu", "--lengths", "32", "--seconds", "0.01", "--peers", "sdpa")
    text = _on_a_terminal("bench", "causal()", *options)
    assert "Measuring SDPA math at 32" in text
    # The table is drawn again with each row, so its first row appears many times.
    assert text.count("32 tokens") > 3
    assert "SDPA flash" in text
    plain = _on_a_terminal("bench", "causal()", *options, NO_COLOR="1")
    assert "\x1b[1;36m" in text
    assert "\x1b[1;36m" not in plain


@posix
def test_a_reader_that_leaves_changes_nothing() -> None:
    command = [sys.executable, "-m", "flexsparse", "code", "causal()"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment())
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    err = process.stderr.read().decode()
    process.stderr.close()
    assert process.wait(60) == 0
    assert err == ""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device that is always full")
@pytest.mark.parametrize("arguments", [("code", "causal"), ("code", "causal", "--json"), ("show", "causal")])
def test_output_that_has_no_room_is_an_error_without_a_traceback(arguments: tuple[str, ...]) -> None:
    with open("/dev/full", "w") as full:
        found = subprocess.run(
            [sys.executable, "-m", "flexsparse", *arguments],
            stdout=full, stderr=subprocess.PIPE, text=True, env=environment(), timeout=120, check=False,
        )  # fmt: skip
    assert found.returncode == 2
    assert found.stderr == "Error: No space left on device: not all of the output could be written.\n"
