"""The kernels that gather compile for real GPUs, without one: no atomics, shared memory within what was reckoned."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

import flexsparse as fs  # noqa: E402
from flexsparse import plan  # noqa: E402
from flexsparse.runtime import gathered_sizes  # noqa: E402
from flexsparse.runtime.inputs import Shapes  # noqa: E402
from flexsparse.verdict import Verdict  # noqa: E402

ATOMIC = re.compile(r"^\s*(@%?\w+\s+)?(atom|red)\.", re.MULTILINE)
TYPES = {
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.bool: "*i1",
}


class Compiled:
    """Compiles what would be launched, once for each kernel."""

    def __init__(self, capability: int) -> None:
        self.capability = capability
        self.kernels: dict[str, Any] = {}

    def launcher(self, kernel: Any, grid: Any) -> Any:
        def launch(**named: Any) -> None:
            options = {name: named.pop(name) for name in ("num_warps", "num_stages")} if "num_warps" in named else {}
            kinds: dict[str, str] = {}
            constants: dict[tuple[int, ...], Any] = {}
            for position, parameter in enumerate(kernel.params):
                value = named[parameter.name]
                if parameter.is_constexpr or (isinstance(value, int) and value == 1):
                    kinds[parameter.name] = "constexpr"
                    constants[(position,)] = value
                elif isinstance(value, torch.Tensor):
                    kinds[parameter.name] = TYPES[value.dtype]
                else:
                    kinds[parameter.name] = "fp32" if isinstance(value, float) else "i32"
            source = ASTSource(fn=kernel, signature=kinds, constexprs=constants)
            target = GPUTarget("cuda", self.capability, 32)
            self.kernels[kernel.fn.__name__] = triton.compile(source, target=target, options=options)

        return launch


@pytest.fixture
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Compiled:
    made = Compiled(request.param)
    monkeypatch.setattr(JITFunction, "__getitem__", lambda kernel, grid: made.launcher(kernel, grid))
    monkeypatch.setitem(plan._VERDICTS, "gather", lambda program, shapes: Verdict(True, "compiled, not run"))
    # Nothing is launched, so nothing is written: results must be finite.
    monkeypatch.setattr(torch, "empty_like", torch.zeros_like)
    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda self, *of, dtype=None: torch.zeros(*of, dtype=dtype or self.dtype)
    )
    return made


KERNELS = {"forward", "row_products", "query_gradient", "key_gradient", "slot_gradient_0", "join_spans_0"}


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION is unset:UserWarning")
@pytest.mark.parametrize(
    ("compiled", "text", "dtype", "head_dim"),
    [
        (90, "sliding_window(96) | sparsek(64, after=96)", torch.bfloat16, 128),
        (80, "sliding_window(96) | sparsek(64, after=96)", torch.float16, 64),
        (80, "document & (sinks(4) | sparsek(70, gate='logit')) + alibi", torch.bfloat16, 192),
        (90, "sparsek(64, gate='capped_softmax')", torch.float32, 64),
    ],
    indirect=["compiled"],
)
def test_every_kernel_compiles_fits_and_has_no_atomics(
    compiled: Compiled, text: str, dtype: torch.dtype, head_dim: int
) -> None:
    size = 512
    query, key, value = (torch.zeros(1, h, size, head_dim, dtype=dtype, requires_grad=True) for h in (4, 2, 2))
    given = {"doc": torch.zeros(1, size, dtype=torch.long)} if "document" in text else {}
    attention: Any = fs.compile(text, backend="gather")
    out = attention(query, key, value, scores=torch.randn(1, 2, size), **given)
    out.sum().backward()
    assert compiled.kernels.keys() == KERNELS
    shapes = Shapes(1, 4, 2, size, size, head_dim, head_dim, dtype, torch.device("cpu"))
    for name, made in compiled.kernels.items():
        assert not ATOMIC.search(made.asm["ptx"]), name
        kernel = name.split("_")[0]
        if kernel in ("forward", "query", "key", "slot"):
            sizes = gathered_sizes.sizes_of(kernel, shapes)
            assert made.metadata.shared <= gathered_sizes.shared_bytes(kernel, sizes, shapes), name
    if compiled.capability == 90 and dtype is torch.bfloat16:
        assert "wgmma.mma_async" in compiled.kernels["forward"].asm["ptx"]
