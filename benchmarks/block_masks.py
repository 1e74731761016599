"""What does a block mask cost, beside torch's create_block_mask?

    python benchmarks/block_masks.py --out benchmarks/results/block_masks_cpu.json
    python benchmarks/block_masks.py --catalogue --out benchmarks/results/block_masks_catalogue_cpu.json

With --catalogue: the first example of every pattern without a selection, with the tensors that the command line makes
up for it. A score alone is put on the mask of all pairs.

Every case runs in a process of its own, so that peak memory is its own: the rise of the resident set on a CPU,
torch's allocator on a GPU, over what stood before the first of the timed calls. Times are medians. Cold start is
from after `import torch` to the block mask in hand.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import pathlib
import platform
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

CASES = (
    ("causal & sliding_window(1024)", 1 << 20),
    ("document & causal", 1 << 20),
    ("causal", 1 << 20),
    ("causal & sliding_window(1024)", 1 << 16),
    ("document & causal", 1 << 16),
)
TORCH_LENGTHS = (4096, 16384, 32768, 65536)
CATALOGUE_LENGTH = 1 << 16
REPEATS = 7
DOCUMENTS = 1000


def documents(length: int, device: str) -> Any:
    """1,000 documents of uneven length, by a fixed seed."""
    import torch

    cuts = torch.randint(0, length, (DOCUMENTS - 1,), generator=torch.Generator().manual_seed(0)).sort().values
    return torch.searchsorted(cuts, torch.arange(length), right=True).to(device)


def reset_peak(device: str) -> int:
    """Forget the peak so far; the bytes in use now. Linux resets the resident set's peak on request."""
    if device == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def peak(device: str) -> int:
    """Bytes at most in use since ``reset_peak``."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    return resident("VmHWM")


def resident(field: str) -> int:
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def timed(call: Callable[[], Any], device: str, repeats: int = REPEATS) -> tuple[list[float], int, Any]:
    """Milliseconds of each repeat, the rise of peak memory over the first, and the last result."""
    import torch

    before = reset_peak(device)
    times, rise, result = [], 0, None
    for repeat in range(repeats):
        start = time.perf_counter()
        result = call()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e3)
        if repeat == 0:
            rise = peak(device) - before
    return times, rise, result


def ours(text: str, length: int, device: str, queue: Any) -> None:
    """One case in a fresh process."""
    import torch

    start = time.perf_counter()
    import flexsparse as fs
    from flexsparse.pipeline import forget_tiles

    captured = {"doc": documents(length, device)} if "document" in text else {}
    fs.block_mask(text, 256, device=device, **{k: v[:256] for k, v in captured.items()})

    def make() -> Any:
        forget_tiles()
        return fs.block_mask(text, length, device=device, **captured)

    _, rise, _ = timed(make, device, repeats=1)
    cold = time.perf_counter() - start
    times, _, mask = timed(make, device)
    names = [f"{p}{d}_{w}" for p in ("", "full_") for d in ("kv", "q") for w in ("num_blocks", "indices")]
    storages = {s.data_ptr(): s.nbytes() for s in (getattr(mask, n).untyped_storage() for n in names)}
    stored = sum(storages.values())
    tiles = int(mask.kv_num_blocks.sum() + mask.full_kv_num_blocks.sum(dtype=torch.long))
    queue.put(
        {
            "median_ms": statistics.median(times),
            "peak_bytes": rise,
            "list_bytes": stored,
            "tiles": tiles,
            "cold_s": cold,
        }
    )


def torchs(text: str, length: int, device: str, queue: Any) -> None:
    """torch's create_block_mask on the same mask."""
    import torch
    from torch.nn.attention.flex_attention import create_block_mask

    import flexsparse as fs

    captured = {"doc": documents(length, device)} if "document" in text else {}
    pattern: Any = fs.parse(text)
    mask_mod, _ = pattern.to_flex(q_len=length, **captured)
    torch.manual_seed(0)
    times, rise, _ = timed(lambda: create_block_mask(mask_mod, None, None, length, length, device=device), device)
    queue.put({"median_ms": statistics.median(times), "peak_bytes": rise})


def catalogue_rows(device: str) -> list[dict[str, Any]]:
    """One row a pattern of the catalogue, in its order, all in this process; every mask is made from nothing."""
    import torch

    import flexsparse as fs
    from flexsparse.example_inputs import example_captured, fitting_heads
    from flexsparse.patterns import catalogue
    from flexsparse.pictures.mask import square_shapes
    from flexsparse.pipeline import forget_tiles

    rows = []
    for name, function in catalogue().items():
        pattern = on_every_pair(function(**function.examples[0]))
        program = fs.compile(pattern, backend="chunked").ir
        if program.selections:
            continue
        heads = fitting_heads(pattern.node, 1)
        captured = example_captured(program, square_shapes(CATALOGUE_LENGTH, heads), 0)
        given: dict[str, Any] = {key: tensor.to(device) for key, tensor in captured.items()}

        def make(pattern: Any = pattern, heads: int = heads, given: dict[str, Any] = given) -> Any:
            forget_tiles()
            return fs.block_mask(pattern, CATALOGUE_LENGTH, heads=heads, device=device, **given)

        make()
        times, _, mask = timed(make, device)
        tiles = int(mask.kv_num_blocks.sum() + mask.full_kv_num_blocks.sum(dtype=torch.long))
        rows.append({"pattern": name, "mask": str(pattern), "heads": heads, "length": CATALOGUE_LENGTH, "tiles": tiles})
        rows[-1] |= {"median_ms": statistics.median(times), "least_ms": min(times)}
        print(f"{name:<18} {rows[-1]['median_ms']:9.1f} ms (least {min(times):.1f}), {tiles:,} tiles", flush=True)
    return rows


def on_every_pair(example: Any) -> Any:
    """The pattern, or the pattern of all pairs with the score."""
    from flexsparse.expression import Pattern
    from flexsparse.ir.nodes import mentions
    from flexsparse.language import everything

    if isinstance(example, Pattern):
        return example
    return everything.score(example) if mentions(example.node, "score") else everything + example


def isolated(target: Callable[..., None], *arguments: Any) -> dict[str, Any]:
    """What ``target`` puts into its queue, or how its process ended."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=target, args=(*arguments, queue))
    process.start()
    process.join(600)
    if process.is_alive():
        process.kill()
        return {"failed": "took more than 600 s"}
    if process.exitcode:
        return {"failed": f"exit code {process.exitcode}"}
    return queue.get()  # type: ignore[no-any-return]


def comparison_rows(device: str, torch_lengths: list[int]) -> list[dict[str, Any]]:
    """Our cases, then torch's at growing lengths until one fails."""
    rows: list[dict[str, Any]] = []
    for text, length in CASES:
        rows.append({"by": "flexsparse", "mask": text, "length": length, **isolated(ours, text, length, device)})
        print(rows[-1], flush=True)
    for length in torch_lengths:
        text = CASES[0][0]
        rows.append({"by": "torch", "mask": text, "length": length, **isolated(torchs, text, length, device)})
        print(rows[-1], flush=True)
        if "failed" in rows[-1]:
            break
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=pathlib.Path)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--torch-lengths", type=int, nargs="*", default=list(TORCH_LENGTHS))
    parser.add_argument("--catalogue", action="store_true")
    arguments = parser.parse_args()
    if arguments.catalogue:
        rows = catalogue_rows(arguments.device)
    else:
        rows = comparison_rows(arguments.device, arguments.torch_lengths)
    import torch

    result = {
        "device": torch.cuda.get_device_name() if arguments.device == "cuda" else platform.processor() or "x86-64",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": arguments.commit,
        "command": " ".join(
            ["python", "benchmarks/block_masks.py", "--device", arguments.device]
            + ["--catalogue"] * arguments.catalogue
        ),
        "rows": rows,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
