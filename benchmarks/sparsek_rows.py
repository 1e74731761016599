"""What does SPARSEK of single rows cost on this GPU, beside torch.topk, torch.sort and sparsemax?

    python benchmarks/sparsek_rows.py --out benchmarks/results/sparsek_rows_h100.json

Times are of the GPU under graph replay, medians in milliseconds, of float32 scores. Peers: torch.topk with the same k
and torch.sort; at k = 1, where SPARSEK is sparsemax, also sparsemax by sorting and by 30 bisections, from the package
entmax where it is installed and can be captured, else the same algorithms in a few lines of torch; ``sparsemax_from``
says which. ``bytes`` counts scores read and gates and masks written once.
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
from selection_kernels import replayed, scores

from flexsparse.ops import sparsek

SHAPES = ((1, 1 << 10), (1, 1 << 14), (1, 1 << 17), (1, 1 << 20), (4096, 4096))
BUDGETS = (1, 512)
Tensor = torch.Tensor


def sorted_sparsemax(z: Tensor) -> Tensor:
    """Sparsemax by sorting: the support is the longest head whose threshold lies below its last score."""
    ordered = z.sort(dim=1, descending=True).values
    rank = torch.arange(1, z.shape[1] + 1, device=z.device, dtype=z.dtype)
    excess = ordered.cumsum(1) - 1
    support = (rank * ordered > excess).sum(1, keepdim=True)
    tau = excess.gather(1, support - 1) / support
    return (z - tau).clamp(min=0)


def bisected_sparsemax(z: Tensor, rounds: int = 30) -> Tensor:
    """Sparsemax by halving the bracket [max - 1, max - 1/n] around tau."""
    top = z.amax(1, keepdim=True)
    low, width = top - 1, 1 - 1 / z.shape[1]
    for _ in range(rounds):
        width = width / 2
        low = torch.where((z - low - width).clamp(min=0).sum(1, keepdim=True) >= 1, low + width, low)
    gates = (z - low).clamp(min=0)
    return gates / gates.sum(1, keepdim=True)


def sparsemaxes(z: Tensor) -> tuple[str, dict[str, Callable[[], Any]]]:
    """By sorting and by bisection; entmax's own where it is installed and needs no synchronisation."""
    own = {"sparsemax_sort": lambda: sorted_sparsemax(z), "sparsemax_bisect": lambda: bisected_sparsemax(z)}
    try:
        import entmax
    except ImportError:
        return "torch", own
    theirs = {
        "sparsemax_sort": lambda: entmax.sparsemax(z, dim=1),
        "sparsemax_bisect": lambda: entmax.sparsemax_bisect(z, dim=1, n_iter=30),
    }
    try:
        for call in theirs.values():
            replayed(call, 1)
    except RuntimeError:
        torch.cuda.synchronize()
        return "torch (entmax cannot be captured)", own
    return f"entmax {getattr(entmax, '__version__', '')}".strip(), theirs


def measure(regime: str, rows: int, size: int, k: int) -> dict[str, Any]:
    z = scores(regime, rows, size)
    row: dict[str, Any] = {"regime": regime, "rows": rows, "length": size, "k": k, "bytes": z.numel() * (4 + 4 + 1)}
    row["forward_ms"] = replayed(lambda: sparsek(z, k, validate=False))
    gates, inside = torch.ops.flexsparse.sparsek(z, k)
    row["support"] = int((gates > 0).sum()) / rows
    grad = torch.randn_like(gates)
    row["backward_ms"] = replayed(lambda: torch.ops.flexsparse.sparsek_backward(grad, inside, z.dtype))
    row["topk_ms"] = replayed(lambda: torch.topk(z, k, dim=1))
    row["sort_ms"] = replayed(lambda: torch.sort(z, dim=1))
    if k == 1:
        row["sparsemax_from"], peers = sparsemaxes(z)
        for name, call in peers.items():
            row[f"{name}_ms"] = replayed(call)
            row[f"{name}_apart"] = float((call() - gates).abs().max())
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=pathlib.Path)
    parser.add_argument("--commit", default="unknown")
    arguments = parser.parse_args()
    rows = []
    for regime in ("normal", "slope", "nearly equal"):
        for count, size in SHAPES:
            for k in BUDGETS:
                rows.append(measure(regime, count, size, k))
                print({k: round(v, 5) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
    result = {"environment": environment(arguments.commit), "rows": rows}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
