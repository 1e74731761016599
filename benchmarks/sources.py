"""Is the Triton source that flexsparse shows without a GPU the one that runs on this GPU?

    python benchmarks/sources.py --out benchmarks/results/sources_h200.json

For each expression a process to which every GPU is hidden writes the kernels that it would show for this GPU's
architecture. Then the call runs here, forward and backward: FlexAttention's kernels are taken from what Inductor
compiled, ours from the file of the function that was launched. The texts are compared kernel by kernel, in order and
line by line, with the options and constants of the launch. Nothing is changed before but the names of Inductor's
kernels, which it numbers.
"""

from __future__ import annotations

import argparse
import difflib
import inspect
import json
import os
import pathlib
import re
import subprocess
import sys
from typing import Any

import torch
from gpu_check import environment

import flexsparse as fs
from flexsparse.explorer.flex import kernels_in
from flexsparse.explorer.stages import kernels_of
from flexsparse.explorer.targets import find_target

CASES = (
    ("causal() + alibi()", "flex", 8),
    ("causal() & (sliding_window(256) | sinks(4)).score(softcap(30.0))", "flex", 8),
    ("causal() & document()", "flex", 8),
    ("sliding_window(256) + per_head([0.1, 0.2]) * (kv - q)", "flex", 2),
    ("sliding_window(256) | sparsek(256, after=256)", "gather", 8),
    ("causal() & (sinks(4) | sparsek(64, after=8, gate='v'))", "gather", 2),
)
HEADS, LENGTH, DIM = 8, 2048, 64
_CONSTANTS = re.compile(r"[A-Z][A-Z_0-9]*|num_warps|num_stages|maxnreg")


def shown(expression: str, backend: str, kv_heads: int, target: str) -> list[dict[str, Any]]:
    """The kernels that flexsparse shows for a call."""
    attention: Any = fs.compile(expression, backend=backend)
    bound = attention.bind(
        q_len=LENGTH, heads=HEADS, kv_heads=kv_heads, head_dim=DIM, dtype=torch.bfloat16, device="cuda",
        needs_grad=True,
    )  # fmt: skip
    shapes = bound.plan.shapes
    kernels = kernels_of(attention._compiled, attention._settings, shapes, find_target(target))
    return [_noted(k.name, k.module, k.options | k.constants, k.backward) for k in kernels]


def ran(expression: str, backend: str, kv_heads: int) -> list[dict[str, Any]]:
    """The kernels of the same call on this GPU."""
    attention: Any = fs.compile(expression, backend=backend)
    sizes = ((HEADS, DIM), (kv_heads, DIM), (kv_heads, DIM))
    operands = [torch.randn(1, h, LENGTH, d, device="cuda", dtype=torch.bfloat16, requires_grad=True) for h, d in sizes]
    captured: dict[str, Any] = {}
    if backend == "gather":
        captured["scores"] = torch.randn(1, kv_heads, LENGTH, device="cuda", requires_grad=True)
    if "document" in expression:
        captured["doc"] = torch.arange(LENGTH, device="cuda") // 300

    def step() -> None:
        out = attention(*operands, **captured)
        torch.autograd.grad(out, operands, torch.ones_like(out))
        torch.cuda.synchronize()

    if backend == "gather":
        return _launched(step)
    from torch._inductor.utils import run_and_get_code

    _, texts = run_and_get_code(step)
    return [
        _noted(k.name, k.module, k.options | k.constants, n > 0)
        for n, t in enumerate(texts)
        for k in kernels_in(t, n > 0)
    ]


def _launched(step: Any) -> list[dict[str, Any]]:
    from flexsparse.runtime import gathered, gathered_gradients

    found: dict[str, dict[str, Any]] = {}
    real = gathered.launch

    def noting(kernel: Any, *arguments: Any, **named: Any) -> None:
        name, path = kernel.fn.__name__, inspect.getsourcefile(kernel.fn)
        assert path is not None
        given = {key: value for key, value in named.items() if _CONSTANTS.fullmatch(key)}
        found.setdefault(name, _noted(name, pathlib.Path(path).read_text(), given, name != "forward"))
        real(kernel, *arguments, **named)

    modules = (gathered, gathered_gradients)
    for module in modules:
        module.launch = noting
    try:
        step()
    finally:
        for module in modules:
            module.launch = real
    return list(found.values())


def _noted(name: str, source: str, given: dict[str, Any], backward: bool) -> dict[str, Any]:
    kept = {key: value for key, value in given.items() if _CONSTANTS.fullmatch(key)}
    return {"name": name, "source": source, "launch": json.loads(json.dumps(kept)), "backward": backward}


def compared(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What differs between kernels shown and kernels that ran, pair by pair: by name, else in order."""
    rows = []
    partners, unshown = _paired(before, after)
    for kernel, other in zip(before, partners, strict=True):
        if other is None:
            rows.append({"kernel": kernel["name"], "same": False, "difference": ["did not run"]})
            continue
        first, second = (_plain(k).splitlines() for k in (kernel, other))
        lines = list(difflib.unified_diff(first, second, "shown", "ran", lineterm="", n=0))
        launch = {
            key: [kernel["launch"].get(key), other["launch"].get(key)]
            for key in sorted({*kernel["launch"], *other["launch"]})
            if kernel["launch"].get(key) != other["launch"].get(key)
        }
        rows.append(
            {
                "kernel": kernel["name"], "lines": len(first), "same": not lines and not launch,
                "difference": lines[:60], "launch": launch,
            }
        )  # fmt: skip
    return rows + [{"kernel": k["name"], "same": False, "difference": ["was not shown"]} for k in unshown]


def _paired(
    before: list[dict[str, Any]], after: list[dict[str, Any]]
) -> tuple[list[dict[str, Any] | None], list[dict[str, Any]]]:
    """For each kernel shown the one that ran, None for none; and those that ran without having been shown."""
    left = list(after)
    partners: list[dict[str, Any] | None] = []
    for kernel in before:
        # Two calls of FlexAttention have kernels of one name.
        partners.append(next((other for other in left if other["name"] == kernel["name"]), None))
        if partners[-1] is not None:
            left.remove(partners[-1])
    for n, partner in enumerate(partners):
        if partner is None and left:
            partners[n] = left.pop(0)
    return partners, left


def _plain(kernel: dict[str, Any]) -> str:
    return re.sub(r"triton_(tem|per|poi|red)_fused_\w+", r"triton_\1", kernel["source"])


def _hidden(target: str) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, __file__, "--shown", target], env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"The process without a GPU failed:\n{done.stderr[-2000:]}")
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


def _or_error(make: Any, *arguments: Any) -> Any:
    try:
        return make(*arguments)
    except Exception as error:  # noqa: BLE001
        return f"{type(error).__name__}: {error}"[:600]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--shown", metavar="TARGET", help="only write the kernels that are shown for it, as JSON")
    arguments = parser.parse_args()
    if arguments.shown:
        print(json.dumps([_or_error(shown, *case, arguments.shown) for case in CASES]))
        return 0
    if not torch.cuda.is_available():
        print("No CUDA device here: this program compares with what runs on one.", file=sys.stderr)
        return 2
    if arguments.out is None:
        parser.error("--out FILE: where to keep what differs")
    target = "sm_{}{}".format(*torch.cuda.get_device_capability())
    rows = []
    for case, before in zip(CASES, _hidden(target), strict=True):
        after = _or_error(ran, *case)
        failed = [x for x in (before, after) if isinstance(x, str)]
        rows.append({"expression": case[0], "backend": case[1], "kv_heads": case[2]})
        rows[-1] |= {"failed": failed} if failed else {"kernels": compared(before, after)}
        print(json.dumps(rows[-1])[:1500], flush=True)
    result = {"environment": environment(arguments.commit), "target": target, "rows": rows}
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    return int(any("failed" in row or not all(k["same"] for k in row["kernels"]) for row in rows))


if __name__ == "__main__":
    sys.exit(main())
