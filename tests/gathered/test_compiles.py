"""The kernels that gather compile for real GPUs, without one: no atomics, shared memory within what was reckoned."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime.jit import JITFunction

import flexsparse as fs
from flexsparse import backends
from flexsparse.runtime import gathered_sizes
from flexsparse.runtime.inputs import Shapes
from flexsparse.verdict import Verdict
from tests.cross_compiling import ATOMIC, CrossCompiler


@pytest.fixture
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> CrossCompiler:
    made = CrossCompiler(request.param)
    monkeypatch.setattr(JITFunction, "__getitem__", lambda kernel, grid: made(kernel, grid))
    monkeypatch.setitem(backends.VERDICTS, "gather", lambda program, shapes: Verdict(True, "compiled, not run"))
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
    compiled: CrossCompiler, text: str, dtype: torch.dtype, head_dim: int
) -> None:
    size = 512
    query, key, value = (torch.zeros(1, h, size, head_dim, dtype=dtype, requires_grad=True) for h in (4, 2, 2))
    given = {"doc": torch.zeros(1, size, dtype=torch.long)} if "document" in text else {}
    attention: Any = fs.compile(text, backend="gather")
    out = attention(query, key, value, scores=torch.randn(1, 2, size), **given)
    out.sum().backward()
    assert compiled.names == KERNELS
    shapes = Shapes(1, 4, 2, size, size, head_dim, head_dim, dtype, torch.device("cpu"))
    for (name, *_), made in compiled.compiled.items():
        assert not ATOMIC.search(made.asm["ptx"]), name
        kernel = name.split("_")[0]
        if kernel in ("forward", "query", "key", "slot"):
            sizes = gathered_sizes.sizes_of(kernel, shapes)
            assert made.metadata.shared <= gathered_sizes.shared_bytes(kernel, sizes, shapes), name
        if compiled.capability == 90 and dtype is torch.bfloat16 and kernel == "forward":
            assert "wgmma.mma_async" in made.asm["ptx"]
