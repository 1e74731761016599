"""Time and peak memory of one forward and backward pass, of flexsparse or of dense attention.

On a CPU each side runs in a process of its own, ``python -m flexsparse.cli.measure``, because a process's peak
memory never falls again. On CUDA the allocator's own peak is read.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from flexsparse.cli.demo_input import DemoInput

_REPEATS = 2
_WARM_UP = 256


@dataclass(frozen=True)
class Measured:
    """Seconds of the faster of two runs, and the peak of memory above what the input takes; None: not measured."""

    forward: float
    backward: float
    peak: int | None

    @property
    def total(self) -> float:
        return self.forward + self.backward


def measure(source: DemoInput, side: str) -> Measured:
    """``side`` is "flexsparse" or "dense". Raises RuntimeError where the child process fails."""
    if source.device.startswith("cuda"):
        return _measure_here(source, side)
    command = [sys.executable, "-m", "flexsparse.cli.measure", side, json.dumps(source.as_dict())]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    if found.returncode:
        raise RuntimeError(f"measuring {side} failed: {found.stderr.strip().splitlines()[-1:]}")
    return Measured(**json.loads(found.stdout))


def _measure_here(source: DemoInput, side: str) -> Measured:
    run, leaves = _prepared(source, side)
    cuda = source.device.startswith("cuda")
    # On a CPU, the short run loads what is loaded once; on CUDA, kernels are built for the length itself.
    _pass(
        run,
        leaves if cuda else {n: x[..., :_WARM_UP, :] if x.dim() == 4 else x[..., :_WARM_UP] for n, x in leaves.items()},
    )
    before = _memory(cuda)
    first = _pass(run, leaves)
    after = _memory(cuda, peak=True)
    times = [first, *(_pass(run, leaves) for _ in range(_REPEATS - 1))]
    forward, backward = min(times, key=sum)
    return Measured(forward, backward, None if before is None or after is None else after - before)


def _prepared(source: DemoInput, side: str) -> tuple[Callable[..., Tensor], dict[str, Tensor]]:
    import flexsparse

    leaves = {name: x.requires_grad_() for name, x in source.tensors().items()}
    if side == "dense":
        del leaves["scores"]

        def dense(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

        return dense, leaves
    backend = "auto" if source.device.startswith("cuda") else "chunked"
    return flexsparse.compile(source.expression, backend=backend), leaves


def _pass(run: Callable[..., Tensor], leaves: dict[str, Tensor]) -> tuple[float, float]:
    """Seconds of a forward and of a backward pass; gradients are dropped."""
    cuda = leaves["query"].is_cuda
    start = _now(cuda)
    out = run(**leaves)
    middle = _now(cuda)
    torch.autograd.grad(out, list(leaves.values()), torch.ones_like(out))
    return middle - start, _now(cuda) - middle


def _now(cuda: bool) -> float:
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


def _memory(cuda: bool, *, peak: bool = False) -> int | None:
    """Bytes now, or at most since the last call without ``peak``; None where the system does not tell."""
    if cuda:
        if peak:
            return torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    if sys.platform.startswith("linux"):
        return _linux_memory(peak)
    if sys.platform == "darwin":
        import resource

        # The peak so far, both times: a short run has reached what the libraries take.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return None


def _linux_memory(peak: bool) -> int:
    """Resident bytes from /proc. getrusage is no use here: a child starts with its parent's peak."""
    if not peak:
        # The system forgets the peak so far; one that refuses keeps that of a short run, which is low.
        with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")
    with open("/proc/self/status", encoding="ascii") as file:
        fields = dict(line.split(":", 1) for line in file)
    return int(fields["VmHWM" if peak else "VmRSS"].split()[0]) * 1024


if __name__ == "__main__":
    print(json.dumps(asdict(_measure_here(DemoInput(**json.loads(sys.argv[2])), sys.argv[1]))))
