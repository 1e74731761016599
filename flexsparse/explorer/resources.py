"""What compiled kernels take of a GPU: registers, spills, shared memory, occupancy, instructions of interest."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from flexsparse.explorer.cross import CompiledKernel
from flexsparse.explorer.targets import Target

# Triton's own, where a launch names none.
_WARPS, _STAGES = 4, 3
_GUARD = r"^\s*(?:@!?%?\w+\s+)?"
_PTX = {
    "wgmma": _GUARD + r"wgmma\.mma_async",
    "tcgen05.mma": _GUARD + r"tcgen05\.mma",
    "mma": _GUARD + r"mma\.sync",
    "cp.async": _GUARD + r"cp\.async\.c[ag]\.",
    "atomics": _GUARD + r"(?:atom|red)\.",
    "exp2": _GUARD + r"ex2\.",
}
_GCN = {
    "mfma": r"^\s*v_mfma",
    "atomics": r"^\s*\w+_atomic_",
    "exp2": r"^\s*v_exp_",
}


@dataclass(frozen=True)
class Resources:
    """One kernel: ``registers`` a thread, ``stack`` bytes a thread (spills go there), ``shared`` bytes a block.

    ``blocks``: how many of its blocks a multiprocessor holds, None where that is not computed. ``instructions`` counts
    what stands in the text, inside loops or not.
    """

    kernel: str
    backward: bool
    registers: int
    stack: int
    shared: int
    warps: int
    stages: int
    blocks: int | None
    instructions: dict[str, int] = field(default_factory=dict)


def resources_of(made: CompiledKernel, target: Target) -> Resources:
    """Read the compiler's report and count in its text."""
    options = made.kernel.options
    warps, stages = options.get("num_warps", _WARPS), options.get("num_stages", _STAGES)
    if target.is_nvidia:
        registers, stack = _number(r"REG:(\d+)", made.report), _number(r"STACK:(\d+)", made.report)
        text, counted = made.texts["ptx"], _PTX
    else:
        text, counted = made.texts["amdgcn"], _GCN
        registers = _number(r"\.vgpr_count:\s+(\d+)", text)
        stack = _number(r"\.private_segment_fixed_size:\s+(\d+)", text)
    return Resources(
        kernel=made.kernel.name,
        backward=made.kernel.backward,
        registers=registers,
        stack=stack,
        shared=made.shared,
        warps=warps,
        stages=stages,
        blocks=target.occupancy(registers, made.shared, warps) if target.is_nvidia else None,
        instructions={name: len(re.findall(p, text, re.MULTILINE)) for name, p in counted.items()},
    )


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found is not None, f"the compiler's report lacks {pattern}"
    return int(found[1])


def table(found: Sequence[Resources], target: Target) -> str:
    """The resources as lines of text, a kernel each; instructions that none of them has are left out, but atomics."""
    counted = [name for name in found[0].instructions if name == "atomics" or any(r.instructions[name] for r in found)]
    blocks = ["blocks"] * target.is_nvidia
    rows = [["kernel", "registers", "stack", "shared", "warps", "stages", *blocks, *counted]]
    for one in found:
        known = [one.registers, one.stack, one.shared, one.warps, one.stages, *[one.blocks or 0] * len(blocks)]
        rows.append([one.kernel, *(f"{n:,}" for n in (*known, *(one.instructions[name] for name in counted)))])
    first, *rest = (max(len(row[n]) for row in rows) for n in range(len(rows[0])))
    lines = [
        "  ".join([name.ljust(first), *(cell.rjust(wide) for cell, wide in zip(cells, rest, strict=True))])
        for name, *cells in rows
    ]
    note = f"on {target.name}; registers and stack bytes a thread, shared bytes a block"
    return "\n".join([*lines, note + (", blocks a multiprocessor." if target.is_nvidia else ".")]) + "\n"
