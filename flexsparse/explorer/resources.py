"""What compiled kernels take of a GPU: registers, spills, shared memory, occupancy, instructions of interest."""

from __future__ import annotations

import re
from collections import Counter
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


# Bytes that a thread loads from global memory at once: the width of an element times their number.
_PTX_LOADS = (
    re.compile(_GUARD + r"ld\.global(?:\.(?!v\d)[\w:]+)*?(?:\.v(?P<count>\d))?\.[busf](?P<bits>\d+)\b", re.MULTILINE),
    re.compile(_GUARD + r"cp\.async\.c[ag]\.shared\.global[^;]*?\],\s*(?P<bytes>0x[0-9a-f]+|\d+)", re.MULTILINE),
)
_GCN_LOAD = re.compile(r"^\s*(?:global|buffer|flat)_load_(?:lds_)?(\w+)", re.MULTILINE)
_GCN_WIDTHS = {"dword": 4, "short": 2, "ushort": 2, "sshort": 2, "byte": 1, "ubyte": 1, "sbyte": 1}
_GCN_WIDTHS |= {f"dwordx{n}": 4 * n for n in (2, 3, 4)}


@dataclass(frozen=True)
class Resources:
    """One kernel: ``registers`` a thread, ``stack`` bytes a thread (spills go there), ``shared`` bytes a block.

    ``spills`` counts the instructions that move registers to and from the stack (for gfx942, the spilled vector
    registers). ``blocks``: how many of its blocks a multiprocessor holds, and ``occupancy`` which share of its warps
    they are; None where that is not computed. ``instructions`` and ``loads``, those from global memory by the bytes
    that a thread takes with each, count what stands in the text, inside loops or not.
    """

    kernel: str
    backward: bool
    registers: int
    stack: int
    spills: int
    shared: int
    warps: int
    stages: int
    blocks: int | None
    occupancy: float | None
    instructions: dict[str, int] = field(default_factory=dict)
    loads: dict[int, int] = field(default_factory=dict)


def resources_of(made: CompiledKernel, target: Target) -> Resources:
    """Read the compiler's report and count in its text."""
    options = made.kernel.options
    warps, stages = options.get("num_warps", _WARPS), options.get("num_stages", _STAGES)
    blocks = None
    if target.is_nvidia:
        registers, stack = _number(r"REG:(\d+)", made.report), _number(r"STACK:(\d+)", made.report)
        text, counted = made.texts["ptx"], _PTX
        spills = len(re.findall(r"\b(?:LDL|STL)\b", made.texts["sass"]))
        blocks = target.occupancy(registers, made.shared, warps)
    else:
        text, counted = made.texts["amdgcn"], _GCN
        registers = _number(r"\.vgpr_count:\s+(\d+)", text)
        stack = _number(r"\.private_segment_fixed_size:\s+(\d+)", text)
        spills = _number(r"\.vgpr_spill_count:\s+(\d+)", text)
    return Resources(
        kernel=made.kernel.name,
        backward=made.kernel.backward,
        registers=registers,
        stack=stack,
        spills=spills,
        shared=made.shared,
        warps=warps,
        stages=stages,
        blocks=blocks,
        occupancy=None if blocks is None else blocks * warps / target.warps,
        instructions={name: len(re.findall(p, text, re.MULTILINE)) for name, p in counted.items()},
        loads=loads_of(text, target.is_nvidia),
    )


def loads_of(text: str, nvidia: bool) -> dict[int, int]:
    """How many loads from global memory a text has, by their bytes, the widest first; copies to shared memory count."""
    if nvidia:
        plain, copies = (p.finditer(text) for p in _PTX_LOADS)
        widths = [int(m["count"] or 1) * int(m["bits"]) // 8 for m in plain] + [int(m["bytes"], 0) for m in copies]
    else:
        names = (m[1].removesuffix("_d16").removesuffix("_d16_hi") for m in _GCN_LOAD.finditer(text))
        widths = [_GCN_WIDTHS[name] for name in names if name in _GCN_WIDTHS]
    return dict(sorted(Counter(widths).items(), reverse=True))


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found is not None, f"the compiler's report lacks {pattern}"
    return int(found[1])


def table(found: Sequence[Resources], target: Target) -> str:
    """Two tables of lines, a kernel each: what it takes, and its instructions; of these, what none has is left out."""
    counted = [name for name in found[0].instructions if name == "atomics" or any(r.instructions[name] for r in found)]
    held = ["blocks", "occupancy"] * target.is_nvidia
    taken = [["kernel", "regs", "stack", "spills", "shared", "warps", "stages", *held]]
    made = [["kernel", *counted, "loads"]]
    for one in found:
        numbers = (one.registers, one.stack, one.spills, one.shared, one.warps, one.stages)
        filled = [] if one.occupancy is None else [f"{one.blocks}", f"{one.occupancy:.0%}"]
        taken.append([one.kernel, *(f"{n:,}" for n in numbers), *filled])
        loads = ", ".join(f"{count} of {width}" for width, count in one.loads.items())
        made.append([one.kernel, *(f"{one.instructions[name]:,}" for name in counted), f"{loads} B"])
    note = f"on {target.name}: registers and bytes of stack a thread, shared bytes a block"
    note += ", blocks a multiprocessor" if target.is_nvidia else ""
    unfit = [
        f"{one.kernel} does not fit: {one.shared:,} bytes of shared memory, where {target.name} gives a block "
        f"{target.shared_block:,}. A call there tries smaller kernel_options, unless it names some."
        for one in found
        if one.blocks == 0
    ]
    notes = [f"{note}.", "Instructions and loads as they stand in the text.", *unfit]
    return "\n".join([*_aligned(taken), "", *_aligned(made), "", *notes])


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    first, *rest = (max(len(row[n]) for row in rows) for n in range(len(rows[0])))
    return [
        "  ".join([name.ljust(first), *(cell.rjust(wide) for cell, wide in zip(cells, rest, strict=True))])
        for name, *cells in rows
    ]
