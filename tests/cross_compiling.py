"""Compiles Triton kernels for a GPU that is not there, in place of launching them."""

from __future__ import annotations

import re
from typing import Any

import torch

ATOMIC = re.compile(r"^\s*(@%?\w+\s+)?(atom|red)\.", re.MULTILINE)
_TYPES = {
    torch.bool: "*i1",
    torch.int8: "*i8",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
}


class CrossCompiler:
    """Stands for ``JITFunction.__getitem__``: ``compiled`` has each variant of each kernel that would be launched.

    Its keys begin with the kernel's name.
    """

    def __init__(self, capability: int) -> None:
        self.capability = capability
        self.compiled: dict[tuple[Any, ...], Any] = {}

    def __call__(self, kernel: Any, grid: Any) -> Any:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        def launch(*args: Any, **named: Any) -> None:
            options = {name: named.pop(name) for name in ("num_warps", "num_stages", "maxnreg") if name in named}
            kinds, constants = _signature(kernel, {**dict(zip(kernel.arg_names, args, strict=False)), **named})
            variant = (kernel.fn.__name__, *kinds.items(), *constants.items())
            if variant not in self.compiled:
                source = ASTSource(fn=kernel, signature=kinds, constexprs=constants)
                target = GPUTarget("cuda", self.capability, 32)
                self.compiled[variant] = triton.compile(source, target=target, options=options)

        return launch

    @property
    def names(self) -> set[str]:
        return {variant[0] for variant in self.compiled}


def _signature(kernel: Any, named: dict[str, Any]) -> tuple[dict[str, str], dict[tuple[int, ...], Any]]:
    kinds: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    for position, parameter in enumerate(kernel.params):
        value = named[parameter.name]
        # A launch turns the number 1 into a constant as well.
        if parameter.is_constexpr or (isinstance(value, int) and value == 1):
            kinds[parameter.name] = "constexpr"
            constants[(position,)] = value
        elif isinstance(value, torch.Tensor):
            kinds[parameter.name] = _TYPES[value.dtype]
        elif isinstance(value, float):
            kinds[parameter.name] = "fp32"
        else:
            kinds[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
    return kinds, constants
