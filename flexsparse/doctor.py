"""What this machine has, what of flexsparse will be fast on it, what will not, and how to mend that."""

from __future__ import annotations

import contextlib
import pathlib
import platform
import shutil
from dataclasses import dataclass

import torch

import flexsparse
from flexsparse import _torch
from flexsparse.codegen.gathered import cache_folder, cached_files
from flexsparse.explorer.cross import triton_fits, triton_version
from flexsparse.verdict import Verdict

_COMPILERS = ("g++", "clang++", "c++")


@dataclass(frozen=True)
class Finding:
    """Something that flexsparse can do: whether it will here, why, and one line that mends it where it will not."""

    name: str
    verdict: Verdict
    mend: str = ""


@dataclass(frozen=True)
class Report:
    """What was found. ``cache_bytes`` is the size of the ``cache_files`` kernels that were generated so far."""

    versions: dict[str, str]
    gpus: tuple[str, ...]
    cache: str
    cache_files: int
    cache_bytes: int
    findings: tuple[Finding, ...]


def examine() -> Report:
    """Look at this machine; nothing is compiled and no tensor is made."""
    gpus = tuple(torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count()))
    files = cached_files()
    return Report(
        versions(),
        gpus,
        str(cache_folder()),
        len(files),
        sum(_size(path) for path in files),
        (_kernels(gpus), _fused(gpus), _on_cpu(), _below_triton(), _without_gpu()),
    )


def _size(path: pathlib.Path) -> int:
    # Another process may have cleared the cache by now.
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_size
    return 0


def versions() -> dict[str, str]:
    """What a result or a time depends on beside the machine, by name."""
    return {
        "flexsparse": flexsparse.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton_version() or "none",
        "cuda": torch.version.cuda or "none in this build of torch",
    }


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's with the threads that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        name = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), name)
    return f"CPU, {torch.get_num_threads()} threads of {name}"


def _kernels(gpus: tuple[str, ...]) -> Finding:
    name = "kernels that gather selected keys"
    if gpus and triton_version():
        return Finding(name, Verdict(True, f"triton {triton_version()} compiles them for {gpus[0]}."))
    if gpus:
        return Finding(name, Verdict(False, "They are Triton kernels, and there is no triton."), "pip install triton")
    return Finding(name, Verdict(False, "No GPU: the chunked path runs, exact and slower."), _GPU_MEND)


def _fused(gpus: tuple[str, ...]) -> Finding:
    name = "FlexAttention, compiled, with gradients"
    if gpus:
        return Finding(name, Verdict(True, f"torch {torch.__version__} builds its kernels on {gpus[0]}."))
    return Finding(name, Verdict(False, "FlexAttention has no gradients on CPU."), _GPU_MEND)


_GPU_MEND = "Use a machine with a GPU and a CUDA build of torch."


def _on_cpu() -> Finding:
    name = "FlexAttention, compiled, on CPU"
    found = next((c for c in _COMPILERS if shutil.which(c)), None)
    if found:
        return Finding(name, Verdict(True, f"Inference only; {found} builds its kernels, 10 s each."))
    return Finding(name, Verdict(False, "There is no C++ compiler."), "apt-get install g++")


def _below_triton() -> Finding:
    name = "code --stage ptx, sass, resources, ..."
    if triton_fits():
        return Finding(name, Verdict(True, f"triton {triton_version()} compiles for GPUs that are not here."))
    why = f"triton {triton_version()} is too old." if triton_version() else "There is no triton."
    return Finding(name, Verdict(False, why), "pip install 'triton>=3.3'")


def _without_gpu() -> Finding:
    name = "code --stage triton of FlexAttention"
    if _torch.VERSION >= (2, 11) and triton_version():
        return Finding(name, Verdict(True, f"Tried with torch 2.11 and 2.13; this is {torch.__version__}."))
    why = f"It takes private names of torch 2.11 or newer, and triton; this is {torch.__version__}."
    return Finding(name, Verdict(False, why), "pip install torch==2.13.0 triton")
