"""Notes what Triton kernels would be launched with, in place of launching them, to compile them for an absent GPU."""

from __future__ import annotations

import inspect
import re
from typing import Any

from flexsparse.explorer.cross import CompiledKernel, compile_kernels
from flexsparse.explorer.gathered import described
from flexsparse.explorer.kernel import Kernel
from flexsparse.explorer.targets import Target

ATOMIC = re.compile(r"^\s*(@%?\w+\s+)?(atom|red)\.", re.MULTILINE)
_OPTIONS = ("num_warps", "num_stages", "maxnreg")


class Launches:
    """Stands for ``JITFunction.__getitem__``: notes each variant of each kernel that would be launched."""

    def __init__(self) -> None:
        self.variants: dict[tuple[Any, ...], Kernel] = {}

    def __call__(self, kernel: Any, grid: Any) -> Any:
        def launch(*args: Any, **named: Any) -> None:
            options = {name: named.pop(name) for name in _OPTIONS if name in named}
            given = {**dict(zip(kernel.arg_names, args, strict=False)), **named}
            constexprs = frozenset(p.name for p in kernel.params if p.is_constexpr)
            signature, constants, aligned = described(given, constexprs)
            name = kernel.fn.__name__
            variant = (name, *signature.items(), *constants.items())
            module = inspect.getsource(inspect.getmodule(kernel.fn))  # type: ignore[arg-type]
            self.variants.setdefault(variant, Kernel(name, module, signature, constants, aligned, options))

        return launch

    @property
    def names(self) -> set[str]:
        return {kernel.name for kernel in self.variants.values()}

    def compile(self, target: Target) -> list[CompiledKernel]:
        return compile_kernels(list(self.variants.values()), target)
