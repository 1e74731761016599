"""What the shells complete, and that it is what the commands take."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import subprocess
import sys

import click
import pytest
from click.shell_completion import ShellComplete

from flexsparse.cli import main
from flexsparse.cli.show_figure import VIEWS
from flexsparse.explorer.targets import TARGETS
from flexsparse.hardware import DEVICES
from flexsparse.parser import NAMES
from flexsparse.patterns import catalogue
from flexsparse.settings import BACKENDS
from flexsparse.stages import STAGES
from tests.cli.conftest import Invoke, environment


def _completed(*words: str) -> list[str]:
    """What is offered for the last of the words."""
    *before, last = words
    return [item.value for item in ShellComplete(main, {}, "flexsparse", "_").get_completions(before, last)]


def test_commands_and_options() -> None:
    assert set(_completed("")) == set(main.commands)
    assert _completed("ca") == ["cache"]
    assert _completed("cache", "") == ["clear"]
    assert _completed("check", "causal", "--de") == ["--deterministic", "--device"]


@pytest.mark.parametrize(
    ("words", "values"),
    [
        (("code", "causal", "--stage"), STAGES),
        (("code", "causal", "--target"), TARGETS),
        (("code", "causal", "--backend"), BACKENDS),
        (("show", "causal", "--view"), VIEWS),
        (("explain", "causal", "--hardware"), DEVICES),
        (("explain", "causal", "--dtype"), ("float64", "float32", "bfloat16", "float16")),
        (("bench", "causal", "--device"), ("auto", "cpu", "cuda")),
        (("completion",), ("bash", "zsh", "fish")),
        (("list",), catalogue()),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, tuple) else "",
)
def test_values_are_those_that_the_command_takes(words: tuple[str, ...], values: tuple[str, ...]) -> None:
    assert sorted(_completed(*words, "")) == sorted(values)
    first = sorted(values)[0]
    assert first in _completed(*words, first[:2])


def test_expressions_are_completed_at_their_end() -> None:
    for name in ("show", "explain", "code", "check", "bench"):
        assert _completed(name, "caus") == ["causal"]
    assert set(_completed("show", "")) == set(catalogue())
    assert _completed("show", "causal() & (sliding_w") == ["causal() & (sliding_window"]
    assert _completed("show", "causal & per_h") == ["causal & per_head"]
    assert _completed("show", "sliding_window(4) ") == ["sliding_window(4) " + name for name in catalogue()]
    assert {"kv", "kv_len", "kerple"} <= set(_completed("show", "k"))
    assert set(NAMES) >= {"q", "kv", "where", "captured", "abs"}


def test_lists_and_files() -> None:
    assert _completed("bench", "causal", "--peers", "sdpa,") == ["sdpa,flex", "sdpa,others"]
    assert _completed("bench", "causal", "--peers", "n") == ["none"]
    for words in (("bench", "causal", "--save"), ("show", "causal", "--out"), ("demo", "--svg"), ("demo", "--file")):
        (item,) = ShellComplete(main, {}, "flexsparse", "_").get_completions(list(words), "x")
        assert item.type == "file"


def test_every_option_with_known_values_is_completed() -> None:
    """One that is added to a command later is either completed, or one of these that nobody can know."""
    free = {"length", "lengths", "batch", "heads", "kv_heads", "head_dim", "block", "zoom", "head", "raw", "query"}
    free |= {"cells", "seed", "k", "window", "seconds", "against"}
    for one in main.commands.values():
        for parameter in one.params:
            flag = isinstance(parameter, click.Option) and parameter.is_flag
            assert flag or "shell_complete" in vars(parameter) or parameter.name in free, f"{one.name} {parameter.name}"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_scripts_call_the_program(shell: str, invoke: Invoke) -> None:
    answer = invoke("completion", shell)
    assert answer.code == 0
    assert f"_FLEXSPARSE_COMPLETE={shell}_complete" in answer.out
    data = json.loads(invoke("completion", shell, "--json").out)
    assert data["script"] + "\n" == answer.out
    assert f"flexsparse completion {shell}" in data["install"]


def test_an_unknown_shell_gets_the_nearest(invoke: Invoke) -> None:
    answer = invoke("completion", "fsh")
    assert (answer.code, answer.out) == (2, "")
    assert "SHELL: got 'fsh', expected bash, zsh or fish. Did you mean 'fish'?" in answer.err


@pytest.mark.skipif(shutil.which("bash") is None or sys.platform == "win32", reason="there is no bash")
def test_bash_itself_completes(tmp_path: pathlib.Path) -> None:
    program = tmp_path / "flexsparse"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m flexsparse "$@"\n')
    program.chmod(0o755)
    script = """
    eval "$(flexsparse completion bash)"
    complete -p flexsparse
    COMP_WORDS=(flexsparse show '"causal() & sliding_w') COMP_CWORD=2
    _flexsparse_completion flexsparse
    printf '%s\\n' "${COMPREPLY[@]}"
    """
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    found = subprocess.run(
        ["bash", "--norc", "-c", script], capture_output=True, text=True, env=environment(PATH=path), check=False
    )
    assert found.stderr == ""
    first, *rest = found.stdout.splitlines()
    assert "_flexsparse_completion flexsparse" in first
    assert rest == ["causal() & sliding_window"]


def test_completion_needs_no_torch() -> None:
    code = (
        "import sys\nfrom flexsparse.cli import main\n"
        "try:\n    main(prog_name='flexsparse')\nexcept SystemExit as left:\n    assert not left.code\n"
        "print([name for name in ('torch', 'sympy', 'numpy') if name in sys.modules], file=sys.stderr)"
    )
    for words in ("flexsparse show cau", "flexsparse code causal --stage p", "flexsparse explain causal --backend g"):
        variables = {"COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
        variables["_FLEXSPARSE_COMPLETE"] = "bash_complete"
        found = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=environment(**variables), check=True
        )
        assert found.stderr.strip() == "[]"
        assert found.stdout
