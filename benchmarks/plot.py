"""Draws how the hybrid grows with the length beside its peers, from what ``hybrid.py`` measured.

    python benchmarks/plot.py --out docs/hybrid.svg benchmarks/results/hybrid_h200.json ...

Medians of the forward pass and of forward and backward, 16 heads; needs matplotlib (`pip install flexsparse[plots]`).
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from typing import Any

HEADS = 16
LINES = {
    ("flexsparse", "forward_ms"): ("flexsparse", "-o", "tab:blue"),
    ("flexsparse", "replay_ms"): ("flexsparse, CUDA graph", "--o", "tab:blue"),
    ("cuDNN", "forward_ms"): ("cuDNN, dense causal", "-s", "tab:orange"),
    ("FlashAttention-2", "forward_ms"): ("FlashAttention-2, dense causal", "-^", "tab:green"),
    ("FlexAttention", "forward_ms"): ("FlexAttention, dense causal", "-v", "tab:red"),
}
STEP = {"forward_ms": "forward_backward_ms"}


def drawn(axis: Any, rows: list[dict[str, Any]], title: str, step: bool) -> None:
    """One panel: milliseconds against tokens, both logarithmic."""
    for (by, field), (label, style, colour) in LINES.items():
        field = STEP.get(field, "") if step else field
        points = sorted((r["length"], r[field]) for r in rows if r["by"] == by and field in r)
        if points:
            axis.loglog(*zip(*points, strict=True), style, color=colour, label=label, base=2)
    axis.set(title=title, xlabel="tokens", ylabel="ms")
    axis.set_yscale("log", base=10)
    axis.grid(alpha=0.3)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=pathlib.Path, help="JSON files of hybrid.py")
    parser.add_argument("--out", required=True, type=pathlib.Path, help="the picture; its suffix is its format")
    arguments = parser.parse_args()
    try:
        from matplotlib import pyplot, rcParams
    except ImportError:
        print("This program draws with matplotlib: pip install 'flexsparse[plots]'.", file=sys.stderr)
        return 2
    read = [json.loads(path.read_text()) for path in arguments.results]
    rows = [row for result in read for row in result["rows"] if row["heads"] == row["kv_heads"] == HEADS]
    # The same file from the same numbers.
    rcParams["svg.hashsalt"] = "flexsparse"
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    drawn(axes[0], rows, "forward", step=False)
    drawn(axes[1], rows, "forward + backward", step=True)
    axes[0].legend(fontsize="small")
    device = read[0]["environment"]["device"]
    figure.suptitle(f"sliding_window(512) | sparsek(512, after=512), {HEADS} heads of 128, bf16, {device}")
    figure.savefig(arguments.out, metadata={"Date": None} if arguments.out.suffix == ".svg" else None)
    return 0


if __name__ == "__main__":
    sys.exit(main())
