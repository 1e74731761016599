"""Is every kernel of ours clean under compute-sanitizer: memcheck, racecheck and initcheck?

    python benchmarks/sanitizer.py --out benchmarks/results/sanitizer_h200.json

Each tool watches one process that runs the selection operators and attention that gathers, forward and backward, at
small and odd sizes, all three at once. PyTorch's memory caching is off, so that reads of memory that nobody wrote are
found. What the compiler builds is built before, without a tool.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import torch
from gpu_check import environment

import flexsparse as fs
from flexsparse import ops

TOOLS = ("memcheck", "racecheck", "initcheck")
PATTERNS = ("sliding_window(40) | sparsek(24, after=40)", "causal() & (sinks(2) | topk(9, after=3, gate='v'))")
# Rows in one program and rows in several, with refinements and without.
SCORES = ((3, 300), (2, 5000), (2, 40_000))
_BEGUN = time.perf_counter()


def watched() -> list[str]:
    """Run every kernel; the names of those that ran."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        _run_all()
        torch.cuda.synchronize()
    own = [event.key for event in profile.key_averages() if re.fullmatch(r"_?[a-z][a-z_0-9]*", event.key)]
    return sorted(name for name in own if not name.startswith("mem"))


def _run_all() -> None:
    torch.manual_seed(0)
    for rows, size in SCORES:
        u = torch.randn(rows, size, device="cuda", requires_grad=True)
        documents = torch.arange(size, device="cuda").div(size // 3, rounding_mode="floor").expand(rows, size)
        # With segments no key is left out.
        for segments in (None, documents):
            thresholds, selection = ops.causal_select(u, 33, 7, segments)
            torch.autograd.grad(thresholds.tau.nan_to_num(neginf=0.0).sum(), u)
            ops.slot_table(selection, 33, 64)
        z = torch.randn(rows, size, device="cuda", requires_grad=True)
        torch.autograd.grad(ops.sparsek(z, 5).square().sum(), z)
        _done(f"{rows} rows of {size}")
    for pattern in PATTERNS:
        for dtype, head_dim in ((torch.bfloat16, 64), (torch.bfloat16, 128), (torch.float32, 24)):
            query = torch.randn(1, 4, 333, head_dim, device="cuda", dtype=dtype, requires_grad=True)
            key, value = (
                torch.randn(1, 2, 333, head_dim, device="cuda", dtype=dtype, requires_grad=True) for _ in "kv"
            )
            scores = torch.randn(1, 2, 333, device="cuda", requires_grad=True)
            out = fs.compile(pattern, backend="gather")(query, key, value, scores=scores)
            torch.autograd.grad(out.float().square().sum(), (query, key, value, scores))
            _done(f"{pattern}, {dtype}, head_dim {head_dim}")


def _done(what: str) -> None:
    torch.cuda.synchronize()
    print(f"{time.perf_counter() - _BEGUN:.1f} s: {what}", file=sys.stderr, flush=True)


def sanitized(tool: str, limit: float) -> dict[str, object]:
    """One tool over one process: its exit code and the last lines that it said."""
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    command = [program, "--tool", tool, "--error-exitcode", "9", "--print-limit", "20"]
    start = time.perf_counter()
    try:
        done = subprocess.run(
            [*command, sys.executable, __file__, "--inner"],
            capture_output=True, text=True, timeout=limit, env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        )  # fmt: skip
    except subprocess.TimeoutExpired as ended:
        return {"tool": tool, "clean": None, "said": f"not done after {limit:.0f} s", "errors": _end(ended.stderr)}
    lines = [line for line in done.stdout.splitlines() if line.startswith("=========")]
    summary = [line for line in lines if "SUMMARY" in line]
    return {
        "tool": tool,
        "clean": done.returncode == 0 and bool(summary) and re.search(r"\b0 (errors|hazards)", summary[-1]) is not None,
        "exit_code": done.returncode,
        "seconds": round(time.perf_counter() - start, 1),
        "said": lines[-25:] if done.returncode else summary,
        "errors": _end(done.stderr) if done.returncode else "",
    }


def _end(text: str | bytes | None) -> str:
    """The last of what a process said; a process that was ended gives bytes."""
    return (text.decode(errors="replace") if isinstance(text, bytes) else text or "")[-500:]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds for each tool")
    parser.add_argument("--inner", action="store_true", help="only run the kernels: what a tool watches")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("No CUDA device here: this program watches kernels on one.", file=sys.stderr)
        return 2
    if arguments.inner:
        _run_all()
        return 0
    if arguments.out is None:
        parser.error("--out FILE: where to keep what the tools said")
    result: dict[str, Any] = {"environment": environment(arguments.commit), "kernels": watched(), "tools": []}
    with ThreadPoolExecutor(len(TOOLS)) as pool:
        running = [pool.submit(sanitized, tool, arguments.limit) for tool in TOOLS]
        for done in as_completed(running):
            result["tools"].append(done.result())
            print(json.dumps(result["tools"][-1]), flush=True)
            arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(", ".join(result["kernels"]))
    return int(any(found["clean"] is not True for found in result["tools"]))


if __name__ == "__main__":
    sys.exit(main())
