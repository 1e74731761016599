"""Every tutorial runs from start to end and prints what it promises."""

from __future__ import annotations

import pathlib
import subprocess
import sys

import pytest

FOLDER = pathlib.Path(__file__).resolve().parent.parent / "tutorials"
TUTORIALS = sorted(FOLDER.glob("*.py"))


def test_there_are_tutorials() -> None:
    assert TUTORIALS


@pytest.mark.parametrize("tutorial", TUTORIALS, ids=lambda path: path.stem)
def test_tutorial_runs(tutorial: pathlib.Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", str(tutorial)], capture_output=True, text=True, cwd=FOLDER, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("===") >= 3, "a tutorial prints a heading for each step"
