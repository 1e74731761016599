"""A CUDA device as torch and Triton describe one, where there is none: enough for Inductor to generate code for it.

The importer of the private names that this takes; it changes this process while it lasts, so it belongs in one of its
own. Tried with torch 2.11 (its CUDA build) and 2.13 (its CPU build).
"""

from __future__ import annotations

import contextlib
import types
import unittest.mock
from collections.abc import Iterator
from typing import Any

import torch
import torch._dynamo.device_interface as _interface
import torch._inductor.runtime.hints as _hints
import torch._inductor.utils as _inductor_utils
import torch._subclasses.fake_tensor as _fake_tensor
import torch.utils._triton as _has_triton

_MULTIPROCESSORS = {80: 108, 90: 132, 100: 148, "gfx942": 304}
_CUDA, _HIP = "12.8", "6.4"


class _Driver:
    """What Triton asks its driver for while code is generated."""

    def __init__(self, arch: int | str) -> None:
        self.arch = arch

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32) if isinstance(self.arch, int) else GPUTarget("hip", self.arch, 64)

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None: ...

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def get_device_interface(self) -> Any:
        return torch.cuda

    @staticmethod
    def is_active() -> bool:
        return True


def _properties(arch: int | str, shared_block: int) -> types.SimpleNamespace:
    nvidia = isinstance(arch, int)
    major, minor = _capability(arch)
    return types.SimpleNamespace(
        name=f"a GPU of compute capability {major}.{minor}" if nvidia else f"an AMD GPU, {arch}",
        major=major,
        minor=minor,
        multi_processor_count=_MULTIPROCESSORS[arch],
        regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=2048,
        max_threads_per_block=1024,
        warp_size=32 if nvidia else 64,
        total_memory=80 << 30,
        shared_memory_per_block=min(shared_block, (48 if nvidia else 64) << 10),
        shared_memory_per_block_optin=shared_block,
        shared_memory_per_multiprocessor=shared_block + 1024,
        is_integrated=0,
        is_multi_gpu_board=0,
        gcnArchName="" if nvidia else arch,
        L2_cache_size=50 << 20,
    )


def _capability(arch: int | str) -> tuple[int, int]:
    """What torch calls so; that of AMD's gfx942 is 9.4."""
    return (arch // 10, arch % 10) if isinstance(arch, int) else (int(arch[3]), int(arch[4]))


@contextlib.contextmanager
def fake_gpu(arch: int | str, shared_block: int) -> Iterator[None]:
    """For as long as it lasts, torch finds one CUDA device of compute capability ``arch`` (90 for 9.0).

    With the name of an AMD architecture this is a build of torch for ROCm, which calls its devices CUDA too.
    """
    from triton.runtime.driver import driver

    properties, capability = _properties(arch, shared_block), _capability(arch)
    answers: dict[str, Any] = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_properties": properties,
        "get_device_capability": capability,
        "get_device_name": properties.name,
        "is_initialized": True,
        "_lazy_init": None,
        "synchronize": None,
        "set_device": None,
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
        "is_bf16_supported": True,
        "mem_get_info": (70 << 30, 80 << 30),
        "current_stream": types.SimpleNamespace(cuda_stream=0, stream_id=0, device_index=0),
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": None,
    }
    on_class = {name: answers[name] for name in ("current_device", "device_count", "synchronize", "set_device")}
    on_class |= {"get_device_properties": properties, "get_raw_stream": 0, "is_bf16_supported": True}
    on_class |= {"exchange_device": 0, "maybe_exchange_device": 0}
    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(unittest.mock.patch.object(torch.cuda, name, _always(answer)))
        for name, answer in on_class.items():
            of = _interface.CudaInterface
            stack.enter_context(unittest.mock.patch.object(of, name, staticmethod(_always(answer)), create=True))
        if isinstance(arch, str):
            stack.enter_context(unittest.mock.patch.object(torch.version, "hip", _HIP))
            stack.enter_context(unittest.mock.patch.object(torch.version, "cuda", None))
        elif torch.version.cuda is None:
            stack.enter_context(unittest.mock.patch.object(torch.version, "cuda", _CUDA))
        # A CUDA build would start the device for the first tensor that is said to be there.
        stack.enter_context(unittest.mock.patch.object(_fake_tensor, "init_gpu_context", _always(None)))
        stack.enter_context(unittest.mock.patch.object(torch._C, "_cuda_getCurrentRawStream", _always(0), create=True))
        for kept, value in (
            (_interface.caching_worker_device_properties, [properties]),
            (_interface.caching_worker_current_devices, 0),
        ):
            stack.enter_context(unittest.mock.patch.dict(kept, {"cuda": value}))
        _forget()
        driver.set_active(_Driver(arch))
        try:
            yield
        finally:
            _forget()


def _always(answer: Any) -> Any:
    return lambda *args, **named: answer


def _forget() -> None:
    """Drop the answers about devices that torch keeps."""
    kept = [*vars(_has_triton).values(), *vars(_inductor_utils).values(), _hints.DeviceProperties.create]
    for function in kept:
        clear = getattr(function, "cache_clear", None)
        if callable(clear):
            clear()
