"""How fast do FlexAttention's kernels run the tiles of a block mask here? Calibrates and judges the cost model.

    python benchmarks/flex_kernels.py --out benchmarks/results/flex_kernels_h200.json

For each mask and length: forward and forward + backward of flexsparse (dynamic lengths, and static ones for
causal), the tiles, the achieved rate in whole tiles, and the time to build the block mask. bf16, head_dim 128.
``forward_ms`` and ``forward_backward_ms`` are medians of whole calls, with the work of the host; ``kernel_ms`` and
``kernel_backward_ms`` are what the GPU spends in attention's kernels, from torch.profiler, the mean of 5 calls.
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
from triton.testing import do_bench

import flexsparse as fs

MASKS = {
    "causal": "causal()",
    "window": "sliding_window(1024)",
    "document": "document() & causal()",
    "full": "full()",
}


def inputs(length: int, heads: int, grad: bool) -> list[torch.Tensor]:
    shape = (1, heads, length, 128)
    return [torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=grad) for _ in range(3)]


def documents(length: int) -> torch.Tensor:
    """32 documents of uneven length, by a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    cuts = torch.randint(0, length, (31,), generator=generator).sort().values
    return torch.searchsorted(cuts, torch.arange(length), right=True).int().cuda()


def measure(name: str, text: str, length: int, heads: int, dynamic: bool) -> dict[str, Any]:
    attention = fs.compile(text, backend="flex", dynamic=dynamic)
    captured = {"doc": documents(length)} if "document" in text else {}
    tensors = inputs(length, heads, grad=True)
    begin = time.perf_counter()
    out = attention(*tensors, validate=False, **captured)
    torch.cuda.synchronize()
    first = time.perf_counter() - begin
    weight = torch.randn_like(out)
    with torch.no_grad():
        forward = do_bench(lambda: attention(*tensors, validate=False, **captured), return_mode="median")

    def step() -> None:
        torch.autograd.grad(attention(*tensors, validate=False, **captured), tensors, weight)

    both = do_bench(step, return_mode="median")
    kernels = kernel_times(step)
    begin = time.perf_counter()
    for _ in range(5):
        fs.block_mask(text, length, device="cuda", **captured)
    torch.cuda.synchronize()
    mask_ms = (time.perf_counter() - begin) / 5 * 1e3
    tiles = attention.plan.tiles
    assert tiles is not None
    flops = attention.plan.flops
    assert flops is not None
    return {
        "mask": name,
        "length": length,
        "heads": heads,
        "dynamic": dynamic,
        "forward_ms": forward,
        "forward_backward_ms": both,
        "kernel_ms": sum(ms for kernel, ms in kernels.items() if "backward" not in kernel),
        "kernel_backward_ms": sum(ms for kernel, ms in kernels.items() if "backward" in kernel),
        "first_call_s": first,
        "block_mask_ms": mask_ms,
        "partial": tiles.partial,
        "full": tiles.full,
        "tflops_in_tiles": flops / forward / 1e9,
    }


def kernel_times(step: Callable[[], None], repeats: int = 5) -> dict[str, float]:
    """Milliseconds a call that the GPU spends in each kernel of attention, by its name."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(repeats):
            step()
        torch.cuda.synchronize()
    kernels = [event for event in profiler.key_averages() if "flex_attention" in event.key]
    return {event.key: event.device_time_total / repeats / 1e3 for event in kernels}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=pathlib.Path)
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--lengths", type=int, nargs="+", default=[16384, 65536])
    parser.add_argument("--heads", type=int, default=16)
    arguments = parser.parse_args()
    rows = []
    for name, text in MASKS.items():
        for length in arguments.lengths:
            for dynamic in (True, False) if name == "causal" else (True,):
                row = measure(name, text, length, arguments.heads, dynamic)
                rows.append(row)
                print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
    result = {"environment": environment(arguments.commit), "rows": rows}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
