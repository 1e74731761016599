"""Kernels to TTIR, TTGIR, LLVM, PTX and SASS by Triton's compiler, for a GPU that need not be there.

The compiler works in a process of its own: where it aborts, that is an error here and not the end of this process.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from flexsparse.errors import BackendError
from flexsparse.explorer.kernel import Kernel
from flexsparse.explorer.targets import Target

# Before 3.3 signatures are told otherwise, and sm_100 aborts the process.
_OLDEST = (3, 3)
_MLIR = ("ttir", "ttgir")


@dataclass(frozen=True)
class CompiledKernel:
    """A kernel with the compiler's texts: "ttir", "ttgir", "llvm", and "ptx" and "sass" or "amdgcn".

    Source locations are left out of the first two. ``shared`` is its shared memory in bytes; ``report`` what ptxas put
    into the binary about its resources.
    """

    kernel: Kernel
    texts: dict[str, str]
    shared: int
    report: str


def compile_kernels(kernels: Sequence[Kernel], target: Target) -> list[CompiledKernel]:
    """Compile each kernel for ``target``. Raises BackendError where Triton is missing, too old, refuses or aborts."""
    _check_version(target)
    with tempfile.TemporaryDirectory(prefix="flexsparse-") as name:
        folder = pathlib.Path(name)
        order = {"backend": target.backend, "arch": target.arch, "warp": target.warp}
        (folder / "order.json").write_text(json.dumps({"target": order, "kernels": [asdict(k) for k in kernels]}))
        done = subprocess.run(
            [sys.executable, "-m", "flexsparse.explorer.cross_worker", name],
            env=worker_environment(),
            stderr=subprocess.DEVNULL,
            check=False,
        )
        return [_result(kernel, folder / f"{n}.json", target, done.returncode) for n, kernel in enumerate(kernels)]


def worker_environment() -> dict[str, str]:
    """This environment with this process's search path, and kernels that are compiled, not interpreted."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # Lines of source files that are gone by the time one reads the texts.
    kept["TRITON_DISABLE_LINE_INFO"] = "1"
    return {**kept, "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)}


@functools.cache
def triton_version() -> str:
    """The version of Triton, empty where it is not installed."""
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return ""


def triton_fits() -> bool:
    """Whether there is a Triton whose compiler works without a GPU."""
    version = triton_version()
    return bool(version) and tuple(int(part) for part in version.split("+")[0].split(".")[:2]) >= _OLDEST


def _check_version(target: Target) -> None:
    version = triton_version()
    if triton_fits():
        return
    wanted = ".".join(map(str, _OLDEST))
    raise BackendError(
        f"target={target.name!r}",
        got=f"triton {version}" if version else "no triton",
        expected=f"triton {wanted} or newer, whose compiler works without a GPU",
        mend="The stage 'triton' needs no compiler.",
    )


def _result(kernel: Kernel, path: pathlib.Path, target: Target, code: int) -> CompiledKernel:
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"error": ended(code)}
    if "error" in found:
        said = path.with_suffix(".err")
        why = _reason(said.read_text(errors="replace")) if said.exists() else ""
        raise BackendError(
            f"target={target.name!r}",
            got=f"kernel {kernel.name}: {found['error']}" + (f" ({why})" if why else ""),
            expected=f"a kernel that triton {triton_version()} can compile for {target.name}",
            mend="The stage 'triton' shows its source.",
        )
    texts = {name: _without_locations(text) if name in _MLIR else text for name, text in found["texts"].items()}
    return CompiledKernel(kernel, texts, found["shared"], found["report"])


def ended(code: int) -> str:
    """How a process of the compiler ended, in words."""
    return f"its compiler was ended by signal {-code}" if code < 0 else f"its compiler ended with code {code}"


def _reason(said: str) -> str:
    """The line of the compiler's messages that says why: a broken assertion, or its first error."""
    for sign in ("Assertion", "error:", "Error"):
        for line in said.splitlines():
            if sign in line and "MLIR pass pipeline" not in line:
                # What stands before it are folders of the machine that built the compiler.
                return line[line.index(sign) :][:300].strip()
    return ""


def _without_locations(text: str) -> str:
    return re.sub(r'^#loc.*\n| loc\((?:[^()"]|"[^"]*"|\([^()]*\))*\)', "", text, flags=re.MULTILINE)
