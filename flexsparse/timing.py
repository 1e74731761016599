"""Time of repeated calls: medians and quartiles, on a GPU by its own clock with cold caches, on a CPU by the host's."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

_LEAST, _MOST = 3, 1000
# More than the last-level cache of any GPU so far; written between calls, so that each finds its input in memory.
_FLUSH = 1 << 28


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: the quartiles of ``calls`` of them."""

    low: float
    median: float
    high: float
    calls: int


def time_calls(call: Callable[[], object], device: torch.device, seconds: float = 0.5) -> Timing:
    """Time a call about as often as fits into ``seconds``, 3 times at least and 1,000 at most, after a warm-up.

    The first call, which may build kernels, is not timed. On CUDA every call is between two events and behind a write
    that empties the caches; launches of the host count where the GPU waits for them. Raises what the call raises.
    """
    call()
    timed = _on_gpu if device.type == "cuda" else _on_host
    return quartiles(timed(call, device, seconds))


def quartiles(milliseconds: list[float]) -> Timing:
    """The quartiles of what was measured; of two values between which one falls, the mean in proportion."""
    found = torch.tensor(milliseconds, dtype=torch.float64).quantile(torch.tensor([0.25, 0.5, 0.75]).double())
    low, median, high = found.tolist()
    return Timing(low, median, high, len(milliseconds))


def _on_host(call: Callable[[], object], device: torch.device, seconds: float) -> list[float]:
    times: list[float] = []
    # One more warm-up where it is cheap: the first calls after a pause find cold caches and sleeping threads.
    end = time.perf_counter() + seconds / 10
    while time.perf_counter() < end:
        call()
    end = time.perf_counter() + seconds
    while len(times) < _LEAST or (time.perf_counter() < end and len(times) < _MOST):
        start = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - start))
    return times


def _on_gpu(call: Callable[[], object], device: torch.device, seconds: float) -> list[float]:
    with torch.cuda.device(device):
        flush = torch.empty(_FLUSH, dtype=torch.int8, device=device)
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        flush.zero_()
        torch.cuda.synchronize()
        count = int(min(max(seconds / (time.perf_counter() - start), _LEAST), _MOST))
        for _ in range(count // 10):
            call()
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        for before, after in events:
            flush.zero_()
            before.record()
            call()
            after.record()
        torch.cuda.synchronize()
        return [before.elapsed_time(after) for before, after in events]
