"""How long does a short call take its caller, on the host and until it is done?

    python benchmarks/short_calls.py --out benchmarks/results/short_calls_h200.json

``sliding_window(512) | sparsek(512, after=512)`` at 4,096 tokens, 16 heads of 128, bf16, without gradients, and forward
and backward; beside it dense causal attention by cuDNN. Microseconds, medians of 200 calls after a wait: until the call
returns, and until the device is done; and a call of 200 one after another. ``do_bench_ms`` is what hybrid.py reports.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from gpu_check import environment
from hybrid import PATTERN, operands
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from triton.testing import do_bench

import flexsparse as fs

HEADS, LENGTH, CALLS = 16, 4096, 200


def calls() -> dict[str, Callable[[], Any]]:
    query, key, value = operands(HEADS, HEADS, LENGTH)
    scores = torch.randn(1, HEADS, LENGTH, device="cuda", requires_grad=True)
    attention, flow = fs.compile(PATTERN), torch.randn_like(query)

    def attend() -> torch.Tensor:
        return attention(query, key, value, scores=scores, validate=False)

    @torch.no_grad()
    def forward() -> torch.Tensor:
        return attend()

    def step() -> Any:
        return torch.autograd.grad(attend(), (query, key, value, scores), flow)

    @torch.no_grad()
    def dense() -> torch.Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return scaled_dot_product_attention(query, key, value, is_causal=True)

    return {"forward": forward, "forward and backward": step, "cuDNN, forward": dense}


def measured(run: Callable[[], Any]) -> dict[str, float]:
    for _ in range(20):
        run()
    torch.cuda.synchronize()
    returned, done = [], []
    for _ in range(CALLS):
        start = time.perf_counter()
        run()
        returned.append(time.perf_counter() - start)
        torch.cuda.synchronize()
        done.append(time.perf_counter() - start)
    start = time.perf_counter()
    for _ in range(CALLS):
        run()
    torch.cuda.synchronize()
    together = (time.perf_counter() - start) / CALLS
    middle = [sorted(times)[CALLS // 2] for times in (returned, done)]
    names = ("returns_us", "done_us", "one_of_many_us")
    times = dict(zip(names, [1e6 * x for x in (*middle, together)], strict=True))
    return {**times, "do_bench_ms": do_bench(run, return_mode="median")}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=pathlib.Path)
    parser.add_argument("--commit", default="unknown")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("No CUDA device here: this program measures one.", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    rows = {name: measured(run) for name, run in calls().items()}
    for name, row in rows.items():
        print(name, {key: round(value, 3) for key, value in row.items()})
    result = {"environment": environment(arguments.commit), "pattern": PATTERN, "calls": rows}
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
