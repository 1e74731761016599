"""Runs the kernel tests in Triton's interpreter, on any machine with Triton."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys

import pytest

TESTS = pathlib.Path(__file__).resolve().parents[2]
pytest.importorskip("triton")


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this is the inner run")
@pytest.mark.parametrize(
    ("file", "chosen", "least", "skipped"),
    [
        ("codegen/kernels/test_selection_kernels.py", "", 36, 0),
        ("codegen/kernels/test_pruning.py", "", 16, 0),
        ("codegen/kernels/test_row_kernels.py", "", 65, 3),
        ("codegen/kernels/test_staircase.py", "", 21, 0),
        ("gather_flex/test_kernel.py", "", 24, 0),
        ("gathered/test_kernels.py", "composition and (gate or sink)", 14, 0),
        ("gathered/test_kernels.py", "composition and not (gate or sink)", 16, 0),
        ("gathered/test_kernels.py", "not composition", 50, 0),
        ("gathered/test_short_calls.py", "", 1, 0),
        ("runtime/test_scalars.py", "(inside and -gather]) or kernel or (torch_compile and gather)", 3, 0),
        ("runtime/test_lengths.py", "gather]", 5, 0),
    ],
)
def test_kernels_in_the_interpreter(file: str, chosen: str, least: int, skipped: int) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS / file), "-k", chosen]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    # A run that skipped everything would also end well.
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) >= least
    left = re.search(r"(\d+) skipped", done.stdout)
    assert int(left[1] if left else 0) == skipped
