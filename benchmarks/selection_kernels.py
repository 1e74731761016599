"""What do all causal thresholds, lifetimes and slots cost on this GPU, beside a sort of the same scores?

    python benchmarks/selection_kernels.py --out benchmarks/results/selection_kernels_h200.json

Times are of the GPU under graph replay, medians: ``forward_ms`` covers thresholds, lifetimes, slots and the slot table
for chunks of 128 queries; ``backward_ms`` the gradient of the thresholds. Beside them: torch.sort of the scores, and
torch.topk of every 128th prefix in turn, which is what a chunked top-k without lifetimes takes. ``peak_bytes`` is what
the forward needs beyond scores and results, for each score; ``kernels_us`` with ``--kernels`` what each kernel takes in
eager calls.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import torch
from gpu_check import environment

from flexsparse.ops import causal_select

SHAPES = ((16, 4096), (16, 65536), (512, 16384), (8, 1 << 20))
CHUNK = 128


def replayed(call: Callable[[], Any], repeats: int = 20) -> float:
    """Median milliseconds of one replay of a graph of the call."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[repeats // 2]


def kernels_of(call: Callable[[], Any], repeats: int = 5) -> dict[str, float]:
    """Microseconds that one call spends in each kernel, in the order in which they come."""
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(repeats):
            call()
        torch.cuda.synchronize()
    events = sorted((e for e in profile.events() if e.device_type.name == "CUDA"), key=lambda e: e.time_range.start)
    found: dict[str, float] = {}
    for event in events:
        found[event.name] = found.get(event.name, 0.0) + event.time_range.elapsed_us() / repeats
    return found


def scores(regime: str, rows: int, size: int) -> torch.Tensor:
    generator = torch.Generator(device="cuda").manual_seed(0)
    noise = torch.randn(rows, size, device="cuda", generator=generator)
    if regime == "slope":
        return noise + 0.01 * torch.arange(size, device="cuda")
    return 1 + 1e-3 * noise if regime == "nearly equal" else noise


def measure(regime: str, rows: int, size: int, k: int, peers: bool, kernels: bool) -> dict[str, Any]:
    u = scores(regime, rows, size)

    def forward() -> Any:
        return causal_select(u, k, validate=False, chunk=CHUNK)

    results = forward()
    kept = sum(t.nbytes for part in results[:2] for t in part) + results[2].nbytes
    del results
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    forward()
    peak = torch.cuda.max_memory_allocated() - before
    row: dict[str, Any] = {"regime": regime, "rows": rows, "length": size, "k": k, "forward_ms": replayed(forward)}
    row["peak_bytes"] = (peak - kept) / u.numel()
    found = torch.ops.flexsparse.causal_selection(u, k, 0, None, True, False, 0)
    grad = torch.randn_like(u)
    backward = torch.ops.flexsparse.causal_selection_backward
    row["backward_ms"] = replayed(lambda: backward(grad, u, found[1], found[2], 0, None))
    row["sort_ms"] = replayed(lambda: torch.sort(u, dim=1))
    if kernels:
        row["kernels_us"] = kernels_of(forward)
    if peers:
        ends = range(CHUNK, size + 1, CHUNK)
        row["topk_of_every_chunk_ms"] = replayed(lambda: [torch.topk(u[:, :n], min(k, n)) for n in ends], 3)
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=pathlib.Path)
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--k", type=int, default=512)
    parser.add_argument("--kernels", action="store_true", help="microseconds of each kernel, too")
    arguments = parser.parse_args()
    rows = []
    for regime in ("normal", "slope", "nearly equal"):
        for count, size in SHAPES:
            peers = regime == "normal" and size <= 65536 and count < 100
            rows.append(measure(regime, count, size, arguments.k, peers, arguments.kernels))
            print({k: round(v, 4) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
    result = {"environment": environment(arguments.commit), "chunk": CHUNK, "rows": rows}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
