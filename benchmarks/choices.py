"""Does the plan choose right? Twenty cases, every candidate measured, and what "auto" took.

    python benchmarks/choices.py --out benchmarks/results/choices_h200.json

A case is a pattern, its heads and a length; bf16, B = 1. Times are medians of whole calls in milliseconds, with all
that the host does: the forward pass, and forward and backward. Kernels are built in one process for each pattern and
candidate, side by side; the measuring is one process after another. A choice is right where it took at most 1.1 times
what the fastest candidate took.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import pathlib
import queue
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from gpu_check import environment

import flexsparse as fs

HYBRID = "sliding_window(512) | sparsek(512, after=512)"
SMALL = "sliding_window(128) | sparsek(64, after=128)"
CHOOSING = f"{HYBRID} | moba(64, 4)"
UNTRACED = f"({HYBRID}) & untraced"
SELECTING = ("gather", "gather_flex", "flex")
CANDIDATES = {
    HYBRID: SELECTING,
    SMALL: SELECTING,
    CHOOSING: ("gather_flex", "flex"),
    UNTRACED: ("gather_flex", "flex"),
    "dilated_window(512, 4)": ("residue_flex", "flex"),
    "dilated_window(64, 2)": ("residue_flex", "flex"),
    "strided(64)": ("residue_flex", "flex"),
}


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    pattern: str
    heads: int
    kv_heads: int
    head_dim: int
    length: int


def cases() -> list[Case]:
    table = {
        HYBRID: [(16, 16, 128, n) for n in (1024, 2048, 4096, 16384, 65536)] + [(32, 4, 128, 8192)],
        SMALL: [(8, 2, 64, n) for n in (16384, 65536)],
        CHOOSING: [(16, 16, 128, n) for n in (4096, 16384)],
        UNTRACED: [(16, 16, 128, n) for n in (4096, 8192, 16384)],
        "dilated_window(512, 4)": [(16, 16, 128, n) for n in (2048, 8192, 32768)],
        "dilated_window(64, 2)": [(16, 16, 128, 16384)],
        "strided(64)": [(8, 8, 64, n) for n in (1024, 4096, 16384)],
    }
    return [Case(pattern, *shape) for pattern, shapes in table.items() for shape in shapes]


def untraced(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    """A mask that flexsparse does not trace: it stays a function."""
    return torch.sin(kv_idx * 0.1) > -0.95


def pattern_of(name: str) -> Any:
    """The pattern of a case; one is no text, as a function is part of it."""
    return fs.parse(HYBRID) & fs.from_flex(mask_mod=untraced) if name == UNTRACED else fs.parse(name)


# A mask that depends on scores keeps all tiles below the diagonal: beyond this length they take seconds a step.
_QUADRATIC_UP_TO = 16384


class Measured:
    """A candidate on one case."""

    def __init__(self, case: Case, backend: str) -> None:
        self.case, self.backend = case, backend
        shapes = [(1, h, case.length, case.head_dim) for h in (case.heads, case.kv_heads, case.kv_heads)]
        self.leaves = [torch.randn(s, device="cuda", dtype=torch.bfloat16, requires_grad=True) for s in shapes]
        self.attention: Any = fs.compile(pattern_of(case.pattern), backend=backend)
        self.captured: dict[str, torch.Tensor] = {}
        if self.attention.ir.selections:
            scores = torch.randn(1, case.kv_heads, case.length, device="cuda", requires_grad=True)
            self.captured["scores"] = scores
            self.leaves.append(scores)
        self.flow = torch.randn_like(self.leaves[0])
        self.row: dict[str, Any] = {**asdict(case), "backend": backend}

    def forward(self) -> torch.Tensor:
        return self.attention(*self.leaves[:3], validate=False, **self.captured)

    def step(self) -> None:
        torch.autograd.grad(self.forward(), self.leaves, self.flow)

    def build(self) -> None:
        """One call of each kind; what cannot run says why."""
        if self.backend == "flex" and self.captured and self.case.length > _QUADRATIC_UP_TO:
            self.row["left_out"] = "every tile below the diagonal: seconds a step"
            return
        try:
            self.step()
            with torch.no_grad():
                self.forward()
            torch.cuda.synchronize()
        except (fs.errors.FlexsparseError, RuntimeError) as error:
            self.row["failed"] = str(error).splitlines()[0][:200]

    def measure(self) -> dict[str, Any]:
        if not {"failed", "left_out"} & set(self.row):
            with torch.no_grad():
                self.row["forward_ms"] = median(self.forward)
            self.row["forward_backward_ms"] = median(self.step)
        return self.row


def median(run: Any, least: int = 5, seconds: float = 0.3) -> float:
    """Milliseconds of a call as its caller waits for it: one call after another, a fresh queue each time."""
    for _ in range(2):
        run()
    torch.cuda.synchronize()
    found: list[float] = []
    while len(found) < least or (sum(found) < 1e3 * seconds and len(found) < 100):
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        found.append((time.perf_counter() - start) * 1e3)
    return sorted(found)[len(found) // 2]


def worker(pattern: str, backend: str, built: Any, turn: Any, rows: Any) -> None:
    """Builds what a pattern's cases need on one candidate, waits for all others, and measures alone."""
    calls = [Measured(case, backend) for case in cases() if case.pattern == pattern]
    for call in calls:
        call.build()
    built.wait()
    with turn:
        for call in calls:
            rows.put(call.measure())


def gathered(measured: Any, count: int, limit: float) -> list[dict[str, Any]]:
    """``count`` rows, or those that came within ``limit`` seconds."""
    rows: list[dict[str, Any]] = []
    end = time.monotonic() + limit
    while len(rows) < count:
        try:
            rows.append(measured.get(timeout=max(0.0, end - time.monotonic())))
        except queue.Empty:
            print(f"Only {len(rows)} of {count} calls were measured in {limit:.0f} seconds.", file=sys.stderr)
            break
        print(json.dumps(rows[-1]), flush=True)
    return rows


def rows_of(case: Case, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of one case."""
    return [row for row in rows if all(row[name] == value for name, value in asdict(case).items())]


def judged(case: Case, rows: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    """The fastest candidate of a case, what "auto" takes, and how much slower that is."""
    mine = {row["backend"]: row[kind] for row in rows_of(case, rows) if kind in row}
    shapes = {k: v for k, v in asdict(case).items() if k not in ("pattern", "length")}
    needs_grad = kind != "forward_ms"
    attention = fs.compile(pattern_of(case.pattern))
    plan = attention.bind(q_len=case.length, device="cuda", dtype=torch.bfloat16, needs_grad=needs_grad, **shapes).plan
    best = min(mine, key=lambda name: mine[name])
    ratio = mine[plan.backend] / mine[best] if plan.backend in mine else float("inf")
    return {**asdict(case), "kind": kind, "best": best, "chosen": plan.backend, "ratio": ratio, "right": ratio <= 1.1}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=pathlib.Path)
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--limit", type=float, default=600, help="seconds; what was measured until then is kept")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("No CUDA device here: this program measures one.", file=sys.stderr)
        return 2
    context = multiprocessing.get_context("spawn")
    jobs = [(pattern, backend) for pattern, backends in CANDIDATES.items() for backend in backends]
    built, turn, measured = context.Barrier(len(jobs)), context.Lock(), context.Queue()
    workers = [context.Process(target=worker, args=(*job, built, turn, measured)) for job in jobs]
    for process in workers:
        process.start()
    rows = gathered(measured, sum(len(CANDIDATES[case.pattern]) for case in cases()), arguments.limit)
    for process in workers:
        process.terminate()
        process.join()
    whole = [case for case in cases() if len(rows_of(case, rows)) == len(CANDIDATES[case.pattern])]
    choices = [judged(case, rows, kind) for kind in ("forward_ms", "forward_backward_ms") for case in whole]
    for one in choices:
        print(json.dumps(one), flush=True)
    right = sum(one["right"] for one in choices)
    print(f"{right} of {len(choices)} choices are right", flush=True)
    result = {"environment": environment(arguments.commit), "rows": rows, "choices": choices}
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
