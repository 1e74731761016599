"""Does flexsparse hold on this GPU? Runs the GPU tests and the demo, and keeps what they said as JSON.

python benchmarks/gpu_check.py --out benchmarks/results/gpu_check_h200.json
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import platform
import re
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import torch
import triton

ROOT = pathlib.Path(__file__).resolve().parent.parent


def environment(commit: str) -> dict[str, object]:
    """The device and every version that a number depends on."""
    properties = torch.cuda.get_device_properties(0)
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True
    ).stdout.strip()
    return {
        "device": properties.name,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
        "driver": driver,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "commit": commit,
        "date": time.strftime("%Y-%m-%d"),
    }


def run(*command: str, limit: float) -> dict[str, object]:
    """A command with its exit code, its seconds and the end of what it printed, shown while it runs.

    After ``limit`` seconds it is ended, and its exit code is negative.
    """
    start = time.perf_counter()
    lines = []
    # In a group of its own: processes that it started hold its output open too.
    options: dict[str, Any] = {"text": True, "cwd": ROOT, "start_new_session": True}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options) as process:
        assert process.stdout is not None
        clock = threading.Timer(limit, os.killpg, (process.pid, signal.SIGKILL))
        clock.start()
        try:
            for line in process.stdout:
                print(line, end="", flush=True)
                lines.append(line)
        finally:
            clock.cancel()
    return {
        "command": " ".join(["python", *command[1:]]),
        "exit_code": process.returncode,
        "seconds": round(time.perf_counter() - start, 1),
        "output": _portable("".join(lines)),
    }


def counted(output: str) -> dict[str, int]:
    """How the tests ended: from their summary, or where it is missing as they were cut off, one by one."""
    found = {what: int(n) for n, what in re.findall(r"(\d+) (passed|failed|skipped|error)", output)}
    ended = re.findall(r"^\[gw\d+\] \[ *\d+%\] (PASSED|FAILED|SKIPPED|ERROR) ", output, re.MULTILINE)
    return found or {what.lower(): ended.count(what) for what in sorted(set(ended))}


def _portable(text: str) -> str:
    """The times and the summary of a test run, or the whole output, without paths of this machine."""
    text = re.sub(r"\S*/(?=flexsparse/|tests/|site-packages/)", "", text.replace(str(ROOT), "."))
    for start in ("slowest 20 durations", "short test summary"):
        if start in text:
            return text[text.index(start) :]
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=pathlib.Path, help="the JSON file to write")
    parser.add_argument("--commit", default="unknown", help="the commit that is measured")
    folders = ["tests/gpu", "tests/gathered", "tests/gather_flex", "tests/codegen/kernels"]
    parser.add_argument("--tests", nargs="+", default=folders, metavar="PATH", help="test files or folders")
    parser.add_argument("--no-demo", action="store_true", help="leave the demo out")
    parser.add_argument("--workers", type=int, default=16, help="test processes; most of the time is compilation")
    parser.add_argument("--limit", type=float, default=3600, help="seconds of the tests; those that end before count")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("No CUDA device here: this program measures one.", file=sys.stderr)
        return 2
    options = ["-v", "--durations=20", "-n", str(arguments.workers), "-p", "no:cacheprovider", "-p", "no:benchmark"]
    tests = run(sys.executable, "-m", "pytest", *arguments.tests, "-m", "gpu", *options, limit=arguments.limit)
    demo = None if arguments.no_demo else run(sys.executable, "-m", "flexsparse", "demo", limit=arguments.limit)
    result = {
        "environment": environment(arguments.commit),
        "tests": {**counted(str(tests["output"])), **tests},
        "demo": demo,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    ran = [tests] if demo is None else [tests, demo]
    return int(any(part["exit_code"] for part in ran))


if __name__ == "__main__":
    sys.exit(main())
