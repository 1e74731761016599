"""Every selection kernel compiles for real GPUs, without one: the interpreter accepts what the compiler refuses."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from flexsparse.ops import kernels  # noqa: E402

TYPES = {
    torch.int8: "*i8",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
}
ATOMIC = re.compile(r"^\s*(@%?\w+\s+)?(atom|red)\.", re.MULTILINE)
SHARED_MEMORY = {80: 166_912, 90: 232_448}
EXPECTED = {
    *("_row_grid", "_quantize", "_running_counts", "_merge", "_rank", "table", "outline", "refine", "walk"),
    *("_threshold", "_between", "_share_blocks", "_shares", "_running", "_difference"),
    *("_gates_of_rows", "_flow_of_rows", "_extents", "_section", "_keep", "_solve", "_gates_of_parts"),
    *("_flow_sums", "_flow_of_parts"),
    *("_deaths", "_links", "_follow_inside", "_follow", "_place", "_newest", "_fill"),
}


def signature_of(kernel: Any, named: dict[str, Any]) -> tuple[dict[str, str], dict[tuple[int, ...], Any]]:
    kinds: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    for position, parameter in enumerate(kernel.params):
        value = named[parameter.name]
        # A launch turns the number 1 into a constant as well.
        if parameter.is_constexpr or (isinstance(value, int) and value == 1):
            kinds[parameter.name] = "constexpr"
            constants[(position,)] = value
        elif isinstance(value, torch.Tensor):
            kinds[parameter.name] = TYPES[value.dtype]
        else:
            kinds[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
    return kinds, constants


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION is unset:UserWarning")
@pytest.mark.parametrize("capability", [80, 90])
def test_every_kernel_compiles_fits_and_has_no_atomics(capability: int, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: dict[Any, Any] = {}

    def launcher(kernel: Any, grid: Any) -> Any:
        def launch(*args: Any, **named: Any) -> None:
            options = {name: named.pop(name) for name in ("num_warps", "num_stages") if name in named}
            kinds, constants = signature_of(kernel, {**dict(zip(kernel.arg_names, args, strict=False)), **named})
            variant = (kernel.fn.__name__, *kinds.items(), *constants.items())
            if variant not in compiled:
                source = ASTSource(fn=kernel, signature=kinds, constexprs=constants)
                compiled[variant] = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)

        return launch

    # Nothing is launched, so nothing is written: the buffers must hold indices that are in range.
    monkeypatch.setattr(JITFunction, "__getitem__", launcher)
    monkeypatch.setattr(torch, "empty", torch.zeros)
    monkeypatch.setattr(torch, "empty_like", torch.zeros_like)
    # No refinement, refinements by 16, and by 4 and 8.
    for size in (1, 70, 3000, 5000):
        for segments in (None, torch.zeros(2, size, dtype=torch.long)):
            u = torch.randn(2, size)
            _, lived = kernels.select(u, 40, 3, segments, thresholds=True, lifetimes=True)
            assert lived is not None
            kernels.slot_table(lived, 40, 16)
            points = torch.zeros(2, size, dtype=torch.long)
            kernels.threshold_gradient(u, u, points, points, 3, segments)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for shape in ((1, 300), (70, 20_000), (1, 40_000)):
            z = torch.zeros(shape, dtype=dtype)
            gates, inside = kernels.project(z, 3)
            kernels.project_gradient(gates, inside, dtype)
    assert {variant[0] for variant in compiled} == EXPECTED
    for variant, made in compiled.items():
        assert made.metadata.shared <= SHARED_MEMORY[capability], variant
        assert not ATOMIC.search(made.asm["ptx"]), variant
