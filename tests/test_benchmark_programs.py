"""What the benchmark programs keep of runs that are cut off."""

from __future__ import annotations

import pathlib
import queue
import sys
from typing import Any

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def programs(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def test_tests_count_by_their_summary_or_one_by_one() -> None:
    from gpu_check import counted  # type: ignore[import-not-found]

    lines = "[gw0] [  1%] PASSED a.py::one \n[gw12] [ 50%] FAILED a.py::two \n[gw1] [100%] PASSED a.py::three \n"
    assert counted(lines + "a.py::four \n") == {"passed": 2, "failed": 1}
    assert counted(lines + "=== 2 failed, 7 passed, 1 skipped in 3.0s ===") == {"failed": 2, "passed": 7, "skipped": 1}


def test_a_command_is_ended_at_its_limit_and_what_it_said_is_kept() -> None:
    from gpu_check import run

    waits = "import time; print('said', flush=True); time.sleep(60)"
    # A process that it started holds the output open, as test workers do.
    program = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {waits!r}])"
    done = run(sys.executable, "-c", program, limit=2.0)
    assert done["output"] == "said\n"
    assert int(str(done["exit_code"])) < 0
    assert float(str(done["seconds"])) < 30


def test_calls_that_were_measured_in_time_are_kept(capsys: pytest.CaptureFixture[str]) -> None:
    from choices import gathered  # type: ignore[import-not-found]

    measured: Any = queue.Queue()
    for number in range(3):
        measured.put({"number": number})
    assert gathered(measured, 2, 0.0) == [{"number": 0}, {"number": 1}]
    assert gathered(measured, 2, 0.05) == [{"number": 2}]
    assert "Only 1 of 2 calls" in capsys.readouterr().err
