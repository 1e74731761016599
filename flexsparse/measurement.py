"""This machine as the cost model sees it: a large matrix product and a large copy, timed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import torch

from flexsparse.hardware import DEVICES, Hardware, known_in

_SECONDS = 0.5


def measure_hardware(device: torch.device | str | None = None) -> Hardware:
    """The matrix rate and the memory bandwidth of a device, CUDA where there is one; about two seconds.

    What FlexAttention's tiles take of the rate is kept from the nearest known device. On a CPU the product is
    float32; on CUDA bfloat16. Random data throughout: zeros can run faster than real numbers.
    """
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    on_gpu = where.type == "cuda"
    size, dtype = (8192, torch.bfloat16) if on_gpu else (1024, torch.float32)
    left, right = (torch.randn(size, size, device=where, dtype=dtype) for _ in range(2))
    product = _seconds(lambda: left @ right, where)
    source = torch.randn((1 << 28) if on_gpu else (1 << 25), device=where)
    target = torch.empty_like(source)
    copy = _seconds(lambda: target.copy_(source), where)
    name = torch.cuda.get_device_name(where) if on_gpu else "CPU"
    known = known_in(name) or DEVICES["H100" if on_gpu else "CPU"]
    processors = torch.cuda.get_device_properties(where).multi_processor_count if on_gpu else torch.get_num_threads()
    return replace(
        known,
        name=name,
        matrix_tflops=round(2 * size**3 / product / 1e12, 3),
        bandwidth_gbs=round(2 * source.numel() * 4 / copy / 1e9, 1),
        multiprocessors=processors,
        source=f"measured with torch {torch.__version__}; tile shares of {known.name}",
    )


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """The median time of a call over half a second, after a warm-up."""

    def once() -> float:
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    for _ in range(3):
        once()
    times: list[float] = []
    while sum(times) < _SECONDS or len(times) < 3:
        times.append(once())
    return sorted(times)[len(times) // 2]
