"""Every selection kernel compiles for real GPUs, without one: the interpreter accepts what the compiler refuses."""

from __future__ import annotations

import re

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime.jit import JITFunction

from flexsparse.codegen.kernels.gate_inputs import Finite
from flexsparse.codegen.kernels.next_changes import next_changes
from flexsparse.codegen.kernels.slot_records import slot_records
from flexsparse.codegen.kernels.slot_sums import add_slot_sums
from flexsparse.explorer.targets import find_target
from flexsparse.ops import kernels
from flexsparse.ops.causal import Thresholds
from tests.cross_compiling import ATOMIC, Launches

# What the compiler of Triton 3.1, which torch 2.5 has, does not know.
NOT_IN_3_1 = re.compile(r"arith\.cmpf .*bf16|arith\.truncf .*f64.* to .*b?f16")
EXPECTED = {
    *("_extents", "_quantize", "_running_counts", "_merge", "_rank", "_sorted_blocks"),
    *("_exceeding", "_bounded", "_compacted", "_sorted_runs", "_merged_pairs"),
    *("table", "table_of_many", "outline", "refine", "walk"),
    *("_threshold", "_between", "_share_blocks", "_shares", "_running", "_difference"),
    *("_gates_of_rows", "_flow_of_rows", "_section", "_keep", "_solve", "_gates_of_parts"),
    *("_flow_sums", "_flow_of_parts"),
    *("_deaths", "_links", "_follow", "_place", "_newest", "_fill", "_tables_at_once", "_slot_sums", "_records"),
    *("_clear", "_next_changes", "_gate_inputs", "_flow"),
}


@pytest.mark.parametrize("name", ["sm_80", "sm_90"])
def test_every_kernel_compiles_fits_and_has_no_atomics(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launches, target = Launches(), find_target(name)
    # Nothing is launched, so nothing is written: the buffers must hold indices that are in range.
    monkeypatch.setattr(JITFunction, "__getitem__", lambda kernel, grid: launches(kernel, grid))
    monkeypatch.setattr(torch, "empty", torch.zeros)
    monkeypatch.setattr(torch, "empty_like", torch.zeros_like)
    # Short rows, those of more bits, and rows in blocks; without a refinement and with some.
    more = [(1, torch.float32), (70, torch.bfloat16)] if name == "sm_90" else []
    for size, dtype in (*more, (3000, torch.float32), (3000, torch.float64), (100_000, torch.float32)):
        for segments in (None, torch.zeros(2, size, dtype=torch.long)):
            u = torch.randn(2, size, dtype=dtype)
            _, lived, *_ = kernels.select(u, 40, 3, segments, thresholds=True, lifetimes=True)
            assert lived is not None
            table = kernels.slot_table(lived, 40, 16)
            next_changes(table, 32)
            points = torch.zeros(2, size, dtype=torch.long)
            if dtype is not torch.float64:
                tau, count = u.float(), torch.zeros(2, size, dtype=torch.int32)
                found = Thresholds(tau, points, points, count)
                finite = Finite(3e38, -3e38, 1e38)
                kernels.select(u, 40, 3, segments, thresholds=True, lifetimes=True, chunk=16, finite=finite)
                kernels.gated_gradient((tau, tau), u, found, 3, segments)
            for scores in (None, u.float()):
                slot_records(table, lived.death, scores, 16)
            kernels.threshold_gradient(u, u, points, points, 3, segments)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for shape in ((1, 300), (70, 20_000), (1, 40_000)):
            z = torch.zeros(shape, dtype=dtype)
            gates, inside = kernels.project(z, 3)
            kernels.project_gradient(gates, inside, dtype)
    for dtype, dim in ((torch.bfloat16, 128), (torch.float32, 1), (torch.float16, 200)):
        rows, holder = torch.zeros(1, 4, 96, dim, dtype=dtype), torch.zeros(1, 2, 2, 16, dtype=torch.int32)
        add_slot_sums(torch.zeros(1, 4, 64, dim), rows, 64, holder)
    assert launches.names == EXPECTED
    for made in launches.compile(target):
        assert made.shared <= target.shared_block, made.kernel
        assert not ATOMIC.search(made.texts["ptx"]), made.kernel
        assert not NOT_IN_3_1.search(made.texts["ttir"]), made.kernel
