"""The stages below Python of patterns that gather, made without a GPU: named facts about texts and tables."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("triton")

import flexsparse as fs
from flexsparse.compiler import CompiledAttention
from flexsparse.errors import BackendError, NotBoundError, SettingError
from flexsparse.explorer import cross
from flexsparse.explorer.kernel import Kernel, only
from flexsparse.explorer.resources import Resources, loads_of, table
from flexsparse.explorer.targets import TARGETS, find_target

BACKWARD = {"row_products", "slot_gradient_0", "join_spans_0", "query_gradient", "key_gradient"}


def bound(text: str = "sliding_window(96) | sparsek(64, after=96)", **shapes: Any) -> CompiledAttention:
    attention = fs.compile(text)
    attention.bind(**{"q_len": 512, "heads": 2, "head_dim": 64, **shapes})
    return attention


def functions(text: str) -> set[str]:
    return {line.split("(")[0].removeprefix("def ") for line in text.splitlines() if line.startswith("def ")}


def test_the_source_is_that_of_the_kernels_and_what_they_use() -> None:
    forward, backward = bound().code("triton"), bound().code("triton-backward")
    helpers = {"clipped", "saturated", "exp_above", "raised", "scaled", "part_sums", "for_parts", "rows_of", "put_rows"}
    helpers |= {"attend_chunk", "staying"}
    assert functions(forward) == {"forward", "forward_again"} | helpers
    assert functions(backward) >= BACKWARD | {"rows_of"}
    assert "forward" not in functions(backward)
    # The window's compare, by the name of the expression's indices.
    assert "q + -kv" in forward or "q - kv" in forward
    assert "num_warps=4" in forward.splitlines()[0]
    assert "HEAD_DIM=64" in forward
    for text in (forward, backward):
        assert "atomic" not in text
        compile(text, "kernels", "exec")


def test_sizes_are_those_of_the_target() -> None:
    wide = bound(head_dim=128)
    assert "# query_gradient: num_warps=4, num_stages=2" in wide.code("triton-backward", "sm_90")
    assert "# query_gradient: num_warps=4, num_stages=1" in wide.code("triton-backward", "gfx942")
    with pytest.raises(BackendError, match=r"head_dim 256 .* expected tiles that fit 65536 bytes"):
        bound(head_dim=256).code("triton", "gfx942")
    assert "maxnreg" in bound().code("triton", "sm_90")
    assert "maxnreg" not in bound().code("triton", "gfx942")


@pytest.mark.parametrize(
    ("stage", "target", "sign"),
    [
        ("ttir", "sm_90", "tt.dot"),
        ("ttgir", "sm_80", "#ttg.nvidia_mma<{versionMajor = 2"),
        ("llvm", "sm_90", "define ptx_kernel void @forward"),
        ("ptx", "sm_90", "wgmma.mma_async"),
        ("ptx", "sm_80", "mma.sync.aligned"),
        ("sass", "sm_90", "HGMMA"),
        ("amdgcn", "gfx942", "v_mfma_f32"),
    ],
)
def test_texts_of_the_compiler(stage: str, target: str, sign: str) -> None:
    text = bound().code(stage, target)
    assert text.lstrip("/; ").startswith("forward\n")
    assert sign in text
    assert "query_gradient" not in text
    assert "#loc" not in text


def test_resources_of_forward_and_backward() -> None:
    attention = bound(needs_grad=True)
    found = {one.kernel: one for one in attention.resources("sm_90")}
    assert {name for name, one in found.items() if one.backward} == BACKWARD
    forward = found["forward"]
    # Four blocks a multiprocessor is what the limit of registers is for.
    assert 96 < forward.registers <= 128
    assert (forward.warps, forward.stages, forward.blocks) == (4, 2, 4)
    assert forward.shared > 64 * 64 * 2
    assert forward.instructions["wgmma"] > 0
    assert forward.instructions["exp2"] > 0
    assert forward.instructions["cp.async"] > 0
    assert all(one.instructions["atomics"] == 0 for one in found.values())
    # 4 warps a block, of 64.
    assert forward.occupancy == 4 * 4 / 64
    # Rows of keys come 16 bytes at a time, slots and deaths as single integers: more instructions in Triton 3.6.
    assert 16 * forward.loads[16] >= 2 * 4 * forward.loads[4] > 0
    assert list(forward.loads) == sorted(forward.loads, reverse=True)
    taken, made, notes = attention.code("resources", "sm_90").split("\n\n")
    for rows in (taken, made):
        assert [line.split()[0] for line in rows.splitlines()[1:]] == list(found)
    assert f"{forward.registers}" in taken.splitlines()[1].split()
    assert f"{forward.loads[16]} of 16, " in made.splitlines()[1]
    assert notes.startswith("on sm_90: registers")
    under = attention.roofline("sm_90")
    assert under is not None
    assert f"{under.flops:.3g} operations forward" in notes
    assert "memory-bound on H100" in notes
    assert "H100: rates of the vendor's data sheet" in notes
    # The kernels that gather have a floor, and that is what it is called.
    assert "at least (the floor of memory)" in notes


def test_loads_by_their_width() -> None:
    ptx = """
    ld.global.b32 \t%r1, [ %rd1 + 0 ];
    @%p1 ld.global.v4.b32 { %r2, %r3, %r4, %r5 }, [ %rd2 + 0 ];
    @!%p1 ld.global.L1::evict_last.L2::cache_hint.v2.b32 { %r6, %r7 }, [ %rd3 + 0 ], %rd4;
    cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;
    cp.async.ca.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 4, 4;
    ld.shared.v4.b32 {%r1, %r2, %r3, %r4}, [%r5];
    st.global.v4.b32 [%rd1], {%r1, %r2, %r3, %r4};
    ld.global.b16 %rs1, [ %rd1 + 0 ];
    """
    assert loads_of(ptx, nvidia=True) == {16: 2, 8: 1, 4: 2, 2: 1}
    gcn = (
        "  global_load_dwordx4 v[0:3], v[4:5], off\n\tbuffer_load_dword v1, v2\n\tglobal_load_ushort v1, v[2:3], off\n"
    )
    assert loads_of(gcn + "  global_store_dwordx4 v[0:1], v[2:5], off\n", nvidia=False) == {16: 1, 4: 1, 2: 1}


def test_occupancy_is_what_the_tightest_limit_leaves() -> None:
    h100 = TARGETS["sm_90"]
    # By registers, by shared memory, by warps, by blocks.
    assert h100.occupancy(168, 24_832, 4) == 3
    assert h100.occupancy(32, 100 * 1024, 4) == 2
    assert h100.occupancy(32, 0, 8) == 8
    assert h100.occupancy(16, 0, 1) == 32
    assert TARGETS["sm_80"].occupancy(255, 0, 4) == 2


def test_a_kernel_that_does_not_fit_is_named() -> None:
    target = TARGETS["sm_90"]
    small = Resources("small", False, 64, 0, 0, 1024, 4, 2, 8, 0.5, {"atomics": 0}, {16: 1})
    large = replace(small, kernel="large", shared=262_144, blocks=target.occupancy(64, 262_144, 4), occupancy=0.0)
    assert "does not fit" not in table([small], target)
    assert table([small, large], target).splitlines()[-1] == (
        "large does not fit: 262,144 bytes of shared memory, where sm_90 gives a block 232,448. "
        "A call there tries smaller kernel_options, unless it names some."
    )


def test_only_keeps_what_is_used_with_its_comments() -> None:
    module = "import a\n\ndef x():\n    # why\n    return y()\n\n\n@a.b\ndef y(): ...\n\n\n@a.b\ndef z(): ...\n"
    assert only(module, {"x"}) == "import a\n\ndef x():\n    # why\n    return y()\n\n\n@a.b\ndef y(): ...\n"
    assert only(module, {"z"}) == "import a\n\n@a.b\ndef z(): ...\n"


def test_what_is_missing_is_said() -> None:
    with pytest.raises(NotBoundError, match=r"^triton: got a compiled pattern that has met no shapes"):
        fs.compile("sparsek(8)").code("triton")
    with pytest.raises(SettingError, match=r"target: got 'sm_91', expected one of .*Did you mean 'sm_90'\?"):
        bound().code("ptx", "sm_91")
    with pytest.raises(SettingError, match=r"'ptx' for gfx942, expected .* gfx942 has 'amdgcn'"):
        bound().code("ptx", "gfx942")
    with pytest.raises(SettingError, match=r"'amdgcn' for sm_80, expected 'amdgcn' for gfx942"):
        bound().code("amdgcn", "sm_80")
    chunked = fs.compile("sparsek(8)", backend="chunked")
    chunked.bind(q_len=64, head_dim=16)
    with pytest.raises(BackendError, match="backend='chunked'"):
        chunked.code("triton")


def test_an_old_triton_or_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross, "triton_version", lambda: "3.2.0")
    with pytest.raises(BackendError, match=r"got triton 3\.2\.0, expected triton 3\.3 or newer"):
        bound().code("ptx")
    monkeypatch.setattr(cross, "triton_version", lambda: "")
    with pytest.raises(BackendError, match="got no triton"):
        bound().code("sass")
    assert "def forward" in bound().code("triton")


BROKEN = """
import os
import triton
import triton.language as tl

@triton.jit
def good(p_out):
    tl.store(p_out, 1)

@triton.jit
def wrong(p_out):
    tl.store(p_out, missing)

if "{when}" == "abort":
    os.abort()
"""


def kernel(name: str, when: str) -> Kernel:
    return Kernel(name, BROKEN.format(when=when), {"p_out": "*i32"}, {}, (), {})


def test_what_the_compiler_refuses_is_an_error_with_its_kernel() -> None:
    with pytest.raises(BackendError, match=r"kernel wrong: CompilationError: NameError\('missing"):
        cross.compile_kernels([kernel("good", ""), kernel("wrong", "")], find_target("sm_80"))


def test_the_reason_is_the_line_that_says_why() -> None:
    said = (
        "module {\n}\npython: /build/a.cpp:13: int f(): Assertion `b >= a' failed.\n<unknown>:0: error: Failures have "
    )
    assert (
        cross._reason(f"{said}been detected while processing an MLIR pass pipeline\n") == "Assertion `b >= a' failed."
    )
    assert cross._reason("a.py:3: note: x\na.py:3: error: no such type\n") == "error: no such type"
    assert cross._reason("nothing of note") == ""


def test_an_abort_of_the_compiler_is_an_error_too() -> None:
    with pytest.raises(BackendError, match=r"kernel good: its compiler was ended by signal 6"):
        cross.compile_kernels([kernel("good", "abort")], find_target("sm_80"))
