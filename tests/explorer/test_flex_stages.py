"""What FlexAttention becomes on a GPU, made without one: the pattern's functions are in the kernels of both passes."""

from __future__ import annotations

import pathlib
import re
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import flexsparse as fs
from flexsparse import _torch
from flexsparse.compiler import CompiledAttention
from flexsparse.errors import BackendError, SettingError
from flexsparse.explorer import flex
from flexsparse.explorer.flex import cpp_in, kernels_in

generates = pytest.mark.skipif(
    _torch.VERSION < (2, 11), reason=f"torch {_torch.VERSION} lacks private names that generating code takes"
)
HYBRID = "(causal() & sliding_window(77)) + alibi()"


def bound(text: str, backend: str = "flex", **shapes: Any) -> CompiledAttention:
    attention = fs.compile(text, backend=backend)
    given = {"q_len": 256, "heads": 2, "head_dim": 64, "device": "cuda", "needs_grad": True, **shapes}
    attention.bind(**given)
    return attention


@generates
def test_the_pattern_stands_in_the_kernels_of_both_passes() -> None:
    attention = bound(HYBRID)
    forward, backward = attention.code("triton"), attention.code("triton-backward")
    for text, function in ((forward, "forward_inner"), (backward, "bwd_dkdv_inner")):
        assert f"def {function}" in text
        # The window's bound and the bias: the pattern's own, not a template's.
        assert "tl.full([1], 77, tl.int32)" in text
        assert "exp2" in text
        assert "triton_heuristics" not in text
        assert "num_warps=" in text
        compile(text, "kernels", "exec")
    graph = attention.code("graph")
    assert graph.count("torch.ops.higher_order.flex_attention(") == 1
    assert "< 77" in graph
    assert "exp2" in graph


@generates
def test_resources_of_flex_attention() -> None:
    found = bound(HYBRID).resources("sm_90")
    assert [one.backward for one in found] == [False, True]
    for one in found:
        assert one.kernel.startswith("triton_tem_fused_flex_attention")
        assert one.instructions["wgmma"] > 0
        assert one.instructions["atomics"] == 0
        assert one.blocks is not None
        assert 1 <= one.blocks <= 4
        assert one.occupancy is not None
        assert 0 < one.occupancy <= 1
        assert one.shared < 227 * 1024
        # Queries, keys and values come 16 bytes at a time. Triton 3.6 copies a number of each row through shared memory
        # as well, which is many instructions and few bytes.
        assert 16 * one.loads[16] > sum(width * count for width, count in one.loads.items() if width < 16)


@generates
def test_flex_attention_for_an_amd_gpu() -> None:
    """What torch for ROCm generates: its own sizes, and matrix instructions that NVIDIA does not have."""
    attention = bound(HYBRID)
    text, amdgcn = attention.code("triton", "gfx942"), attention.code("amdgcn", "gfx942")
    assert "tl.full([1], 77, tl.int32)" in text
    assert "kpack=" in text.splitlines()[0]
    assert "v_mfma_f32" in amdgcn
    assert ".amdgcn_target" in amdgcn
    assert "gfx942" in amdgcn
    found = attention.resources("gfx942")
    assert [one.backward for one in found] == [False, True]
    for one in found:
        assert one.instructions["mfma"] > 0
        assert one.instructions["atomics"] == 0
        assert 0 < one.shared <= 64 * 1024
    # A GPU of NVIDIA's has what it had.
    assert "kpack" not in attention.code("triton", "sm_90")
    with pytest.raises(SettingError, match=r"got 'ptx' for gfx942"):
        attention.code("ptx", "gfx942")


@generates
def test_a_gate_on_values_takes_two_calls_over_rows() -> None:
    attention = bound("sliding_window(8) | sparsek(16, after=8)", "gather_flex", q_len=512, kv_heads=1)
    text = attention.code("triton")
    assert text.count("def forward_inner") == 2
    assert attention.code("graph").count("torch.ops.higher_order.flex_attention(") == 2


@generates
def test_positions_by_residue_class_take_a_call_for_pairs_of_two_classes() -> None:
    attention = bound("dilated_window(64, 4) | sinks(3)", "residue_flex", q_len=512, needs_grad=False)
    text = attention.code("triton")
    assert text.count("def forward_inner") == 2
    assert "# q and kv count within a residue class modulo 4; row b is class b % 4 of row b // 4.\n# Other" in text
    # 64 keys of the class, where the pattern says that q - kv is below 256.
    assert "tl.full([1], 63, tl.int32)  # mask\n" in text
    marks = [mark for _, mark in attention.marked_code("triton").lines if mark is not None and mark.expression]
    assert {mark.expression for mark in marks} == {"((kv <= q) & (q - kv < 256) & ((q - kv) % 4 == 0)) | (kv < 3)"}
    assert attention.code("graph").count("torch.ops.higher_order.flex_attention(") == 2


@generates
def test_a_number_that_indexes_a_tensor_is_part_of_the_kernel() -> None:
    """rates[h, 0] and rates[h, 1]: the graph has such numbers as tensors, which Inductor simplifies first."""
    forward = bound("full() + kerple()").code("triton")
    # A row of two for each head, of which both are loaded by their place.
    loads = re.findall(r"= tl\.load\(in_ptr\d+ \+ (tmp\d+) \+ 2\*tmp\d+\)  # score", forward)
    assert [re.findall(rf" {place} = tl\.full\(\[1\], (\d), ", forward) for place in loads] == [["0"], ["1"]]
    assert "tl_math.log(" in forward


@generates
def test_cpp_of_inference_on_this_cpu() -> None:
    if not compiles_cpp():
        pytest.skip("torch generates no FlexAttention for this CPU")
    text = bound(HYBRID, device="cpu", needs_grad=False).code("cpp")
    assert text.startswith("// cpp_fused_flex_attention_0\n")
    # The window's bound, in a function of C++, and nothing of Python around it.
    assert "static_cast<int64_t>(77)" in text
    assert "#include <torch/csrc/inductor/cpp_prefix.h>" in text
    assert "async_compile" not in text


def compiles_cpp() -> bool:
    from torch._inductor.kernel.flex.flex_cpu import check_cpu_supported

    return bool(check_cpu_supported())


def test_cpp_that_torch_cannot_generate_is_refused_with_its_version() -> None:
    with pytest.raises(
        BackendError, match=rf"^stage='cpp': .*torch {re.escape(torch.__version__)}.*no gradients on CPU"
    ):
        bound("causal()").code("cpp")
    with pytest.raises(BackendError, match=r"stage='cpp'.*A gate on V needs the LSE"):
        bound("sparsek(8)", "auto", needs_grad=False).code("cpp")
    with pytest.raises(BackendError, match=r"stage='cpp'.*takes no float64"):
        bound("causal()", "chunked", needs_grad=False, dtype=torch.float64, device="cpu").code("cpp")


def test_cpp_of_a_module() -> None:
    text = (
        "x = async_compile.cpp_pybinding(['const float*'], r'''\nint f();\n''')\ny = async_compile.triton('k', 'z')\n"
    )
    assert list(cpp_in(text)) == ["// x\nint f();\n"]


MODULE = """
async_compile.triton('k', '''
import triton
import triton.language as tl
from torch._inductor.runtime import triton_helpers, triton_heuristics
from torch._inductor.runtime.hints import DeviceProperties
triton_helpers.set_driver_to_gpu()

@triton_heuristics.{kind}(
    num_stages=3, num_warps=8,
    triton_meta={{'signature': {{'p': '*fp32', 'n': 'i32', 'B': 'constexpr'}}, 'constants': {{'B': 4}},
        'device': DeviceProperties(type='cuda'), 'configs': [{{(0,): [['tt.divisibility', 16]]}}]}},
)
@triton.jit
def k(p, n, B: tl.constexpr):
    # kept
    tl.store(p, n)
''', device_str='cuda')
"""


def test_kernels_of_a_module_without_the_decorator_that_needs_a_gpu() -> None:
    (kernel,) = kernels_in(MODULE.format(kind="template"), backward=True)
    assert (kernel.name, kernel.backward, kernel.fixed) == ("k", True, True)
    assert kernel.options == {"num_stages": 3, "num_warps": 8}
    assert (kernel.constants, kernel.aligned) == ({"B": 4}, ("p",))
    assert kernel.module == (
        "import triton\nimport triton.language as tl\n\n@triton.jit\n"
        "def k(p, n, B: tl.constexpr):\n    # kept\n    tl.store(p, n)\n"
    )
    (chosen,) = kernels_in(MODULE.format(kind="pointwise"), backward=False)
    assert not chosen.fixed
    assert chosen.launch == "block sizes are chosen on the GPU"


@generates
def test_what_inductor_refuses_is_said_by_its_cause() -> None:
    attention = fs.compile("causal() & sliding_window(9)", backend="flex", kernel_options={"BLOCK_M": 100})
    attention.bind(q_len=256, heads=2, head_dim=64, device="cuda")
    with pytest.raises(BackendError) as caught:
        attention.code("triton")
    # The last of three exceptions, and neither their names nor the operands that it lists.
    assert caught.value.got.startswith("ValueError: Q and KV block size must be divisible by BLOCK_M and BLOCK_N.")
    assert "\n" not in caught.value.got
    assert "args[0]" not in caught.value.got


def test_what_cannot_be_generated_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    with pytest.raises(BackendError, match=r"backend='gather': got the stage 'graph'"):
        bound("sparsek(8)", "gather").code("graph")
    untraced = fs.compile(fs.from_flex(mask_mod=lambda b, h, q, kv: (q ^ kv) < 40), backend="flex")
    untraced.bind(q_len=64, head_dim=16, device="cuda")
    with pytest.raises(BackendError, match="got functions that could not be traced"):
        untraced.code("triton")
    # Stands for a torch that lacks a private name: the process ends without texts.
    (tmp_path / "torch.py").write_text("raise ImportError('cannot import name _private')")
    monkeypatch.setattr(flex, "worker_environment", lambda: {"PYTHONPATH": str(tmp_path)})
    with pytest.raises(BackendError, match=r"ended with code 1: ImportError: cannot import name _private"):
        bound("causal() & sliding_window(3)").code("triton")
