"""Running the command line, in this process and in one of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from flexsparse import compiler
from flexsparse.cli import main


@dataclass(frozen=True)
class Answer:
    """What a command gave."""

    code: int
    out: str
    err: str


Invoke = Callable[..., Answer]


@pytest.fixture(autouse=True)
def notices_are_said_again() -> Iterator[None]:
    """The notice about the CPU is said once a process; other tests may wait for it."""
    yield
    compiler._say_once.cache_clear()


@pytest.fixture
def invoke(capsys: pytest.CaptureFixture[str]) -> Invoke:
    """Run a command in this process, as in a pipe."""

    def run(*arguments: str) -> Answer:
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main(arguments, prog_name="flexsparse")
        said = capsys.readouterr()
        return Answer(int(left.value.code or 0), said.out, said.err)

    return run


def shell(*arguments: str, **variables: str) -> Answer:
    """Run a command in a process of its own, its output in a pipe."""
    found = subprocess.run(
        [sys.executable, "-m", "flexsparse", *arguments],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env=environment(**variables),
        timeout=120,
        check=False,
    )
    return Answer(found.returncode, found.stdout, found.stderr)


def environment(**variables: str) -> dict[str, str]:
    """This environment without what changes colour and width, and with ``variables``."""
    usual = {n: v for n, v in os.environ.items() if n not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "TERM")}
    return {**usual, "PYTHONIOENCODING": "utf-8", **variables}
