"""How fast is SPARSEK beside a sliding window, everything included, and how does it grow with the length?

    python benchmarks/hybrid.py --out benchmarks/results/hybrid_h200.json

``sliding_window(512) | sparsek(512, after=512)``, bf16, B = 1, head_dim 128, from scores to output: operator,
selection, slot table and attention. Beside it, on the same operands: dense causal attention by cuDNN and by
FlashAttention through ``scaled_dot_product_attention``, and by FlexAttention with its own block mask; where 16 query
heads share a KV head and flash-linear-attention is installed, its NSA too, with 16 blocks of 64 keys for each query:
those that it chooses by its compressed branch, or its selected branch alone on given ones. Times are medians of whole
calls in milliseconds; ``replay_ms`` is the forward pass under a CUDA graph, without the work of the host.
``peak_bytes`` is what a training step takes beyond operands, output and gradients; ``kernels_ms`` its longest
kernels.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import torch
from gpu_check import environment
from selection_kernels import replayed
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from triton.testing import do_bench

import flexsparse as fs
from flexsparse.peers import CannotRun, nsa, versions_of_others

PATTERN = "sliding_window(512) | sparsek(512, after=512)"
CASES = ((16, 16, 4096), (16, 16, 16384), (16, 16, 65536), (64, 4, 65536), (16, 16, 1 << 20))
# Dense attention over more is not worth the minutes.
DENSE_UP_TO = 65536
PEERS = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "FlashAttention-2": SDPBackend.FLASH_ATTENTION}
HEAD_DIM = 128


def case(text: str) -> tuple[int, int, int]:
    heads, kv_heads, length = (int(n) for n in text.split("/"))
    return heads, kv_heads, length


def operands(heads: int, kv_heads: int, length: int) -> list[torch.Tensor]:
    shapes = [(1, h, length, HEAD_DIM) for h in (heads, kv_heads, kv_heads)]
    return [torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for shape in shapes]


def timed(forward: Callable[[], torch.Tensor], leaves: list[torch.Tensor]) -> dict[str, float]:
    """Medians of the forward pass, and of forward and backward."""
    grad = torch.randn_like(forward())

    def step() -> None:
        torch.autograd.grad(forward(), leaves, grad)

    step()
    with torch.no_grad():
        forward_ms = do_bench(forward, return_mode="median")
    return {"forward_ms": forward_ms, "forward_backward_ms": do_bench(step, return_mode="median")}


def kernels(step: Callable[[], None], most: int = 8) -> dict[str, float]:
    """Milliseconds of the longest kernels of one step, by name."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    found = sorted(profile.key_averages(), key=lambda event: -event.self_device_time_total)[:most]
    return {event.key[:60]: event.self_device_time_total / 1e3 for event in found}


def ours(heads: int, kv_heads: int, length: int, backend: str) -> dict[str, Any]:
    query, key, value = operands(heads, kv_heads, length)
    scores = torch.randn(1, kv_heads, length, device="cuda", requires_grad=True)
    attention = fs.compile(PATTERN, backend=backend)
    leaves = [query, key, value, scores]

    def forward() -> torch.Tensor:
        return attention(query, key, value, scores=scores, validate=False)

    flow = torch.randn_like(query)

    def step() -> None:
        torch.autograd.grad(forward(), leaves, flow)

    row: dict[str, Any] = {"by": "flexsparse", "backend": None, **timed(forward, leaves)}
    row["backend"] = attention.plan.backend
    with torch.no_grad():
        row["replay_ms"] = replayed(forward)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = forward()
    gradients = torch.autograd.grad(out, leaves, flow)
    kept = sum(x.nbytes for x in (out, *gradients))
    row["peak_bytes"] = torch.cuda.max_memory_allocated() - before - kept
    again = torch.autograd.grad(forward(), leaves, flow)
    row["same_bits"] = all(torch.equal(a, b) for a, b in zip(gradients, again, strict=True))
    row["kernels_ms"] = kernels(step)
    return row


def peers(heads: int, kv_heads: int, length: int) -> list[dict[str, Any]]:
    """Dense causal attention on the same shapes; what cannot run says why."""
    rows = []
    tensors = operands(heads, kv_heads, length)
    flex = fs.compile("causal", backend="flex")

    def dense(backend: SDPBackend) -> torch.Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(*tensors, is_causal=True, enable_gqa=heads != kv_heads)

    calls = {name: lambda backend=backend: dense(backend) for name, backend in PEERS.items()}
    calls["FlexAttention"] = lambda: flex(*tensors)
    with contextlib.suppress(ImportError, CannotRun):
        module = importlib.import_module("fla.ops.nsa")
        calls["NSA"] = nsa(module, *tensors, chooses=True)
        calls["NSA, selected"] = nsa(module, *tensors, chooses=False)
    for name, call in calls.items():
        try:
            rows.append({"by": name, **timed(call, tensors)})
        except RuntimeError as error:
            rows.append({"by": name, "failed": str(error).splitlines()[0][:200]})
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=pathlib.Path)
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--backend", default="auto", help="ours: auto, gather, gather_flex or flex")
    parser.add_argument("--alone", action="store_true", help="without the peers")
    parser.add_argument(
        "--cases", nargs="*", type=case, default=CASES, metavar="16/16/4096",
        help="heads, KV heads and length of what is measured; rows that --out has of others stay",
    )  # fmt: skip
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("hybrid: no CUDA device here.")
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = json.loads(arguments.out.read_text())["rows"] if arguments.out.exists() else []
    rows = [row for row in rows if (row["heads"], row["kv_heads"], row["length"]) not in arguments.cases]
    # Kept after every case: a run that is cut short has what it measured.
    for heads, kv_heads, length in arguments.cases:
        of = {"heads": heads, "kv_heads": kv_heads, "length": length, "commit": arguments.commit}
        found = [ours(heads, kv_heads, length, arguments.backend)]
        if length <= DENSE_UP_TO and not arguments.alone:
            found += peers(heads, kv_heads, length)
        for row in found:
            rows.append({**of, **row})
            print({k: round(v, 3) if isinstance(v, float) else v for k, v in rows[-1].items() if k != "kernels_ms"})
        versions = environment(arguments.commit) | versions_of_others()
        rows.sort(key=lambda row: (row["heads"], row["length"]))
        result = {"environment": versions, "pattern": PATTERN, "rows": rows}
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
        torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
