"""The kernels that gather compile for real GPUs, without one: no atomics, shared memory within what was reckoned."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

import flexsparse as fs
from flexsparse.explorer.cross import compile_kernels
from flexsparse.explorer.stages import kernels_of
from flexsparse.explorer.targets import find_target
from flexsparse.pipeline import compile_pattern
from flexsparse.runtime import gathered_sizes
from flexsparse.settings import Settings
from tests.cross_compiling import ATOMIC

KERNELS = {"forward", "row_products", "query_gradient", "key_gradient", "slot_gradient_0", "join_spans_0"}


@pytest.mark.parametrize(
    ("name", "text", "dtype", "head_dim"),
    [
        ("sm_90", "sliding_window(96) | sparsek(64, after=96)", torch.bfloat16, 128),
        ("sm_80", "sliding_window(96) | sparsek(64, after=96)", torch.float16, 64),
        ("sm_80", "document & (sinks(4) | sparsek(70, gate='logit')) + alibi", torch.bfloat16, 192),
        ("sm_90", "sparsek(64, gate='capped_softmax')", torch.float32, 64),
    ],
)
def test_every_kernel_compiles_fits_and_has_no_atomics(name: str, text: str, dtype: torch.dtype, head_dim: int) -> None:
    target = find_target(name)
    bound = fs.compile(text).bind(q_len=512, heads=4, kv_heads=2, head_dim=head_dim, dtype=dtype, needs_grad=True)
    shapes = replace(bound.plan.shapes, device=torch.device("cuda"))
    kernels = kernels_of(compile_pattern(fs.parse(text).node), Settings(backend="gather"), shapes, target)
    again = {"forward_again"} if dtype is torch.bfloat16 else set()
    assert {kernel.name for kernel in kernels} == KERNELS | again
    assert {kernel.name for kernel in kernels if not kernel.backward} == {"forward"} | again
    for made in compile_kernels(kernels, target):
        assert not ATOMIC.search(made.texts["ptx"]), made.kernel.name
        kind = made.kernel.name.split("_")[0]
        if kind in gathered_sizes.KERNELS:
            sizes = gathered_sizes.sizes_of(kind, shapes, target.shared_block)
            assert made.shared <= gathered_sizes.shared_bytes(kind, sizes, shapes), made.kernel.name
        if name == "sm_90" and dtype is torch.bfloat16 and kind == "forward":
            assert "wgmma.mma_async" in made.texts["ptx"]
        if dtype is not torch.float32 and kind == "forward":
            # Rows whose level stays are not rescaled, and where levels are held, only near tiles raise them.
            assert made.texts["ptx"].count("vote.sync.any") >= (1 if dtype is torch.bfloat16 else 3)
