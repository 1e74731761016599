"""The stages below Python: Triton source, the texts of Triton's compiler, what its kernels take of a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from flexsparse.codegen.gathered import gathered_source
from flexsparse.codegen.gathering.rows import program_of_rows
from flexsparse.errors import BackendError, SettingError
from flexsparse.explanation import Explanation
from flexsparse.explorer.cross import compile_kernels
from flexsparse.explorer.flex import cpp_kernels, flex_graphs, flex_kernels, refused
from flexsparse.explorer.flex_marks import mark_flex
from flexsparse.explorer.gathered_marks import mark_gathered
from flexsparse.explorer.kernel import Kernel, source_of
from flexsparse.explorer.marks import LEGEND, MarkedText
from flexsparse.explorer.resources import Resources, resources_of, table
from flexsparse.explorer.targets import Target, find_target
from flexsparse.hardware import find
from flexsparse.ir.nodes import Node
from flexsparse.pipeline import Compiled, bind_shapes
from flexsparse.plan import Plan
from flexsparse.roofline import Roofline
from flexsparse.runtime.inputs import Shapes
from flexsparse.settings import Settings

SOURCES = ("triton", "triton-backward")
COMPILED = ("ttir", "ttgir", "llvm", "ptx", "sass", "amdgcn")
# About the kernels of a GPU, and of a GPU or this CPU.
GPU_STAGES = ("graph", *SOURCES, *COMPILED, "resources")
KERNEL_STAGES = (*GPU_STAGES, "cpp")
_BY_FLEX = ("flex", "gather_flex", "residue_flex")
_ELSEWHERE = {"ptx": "amdgcn", "sass": "amdgcn", "amdgcn": "ptx"}


def kernel_code(
    pattern: Node, compiled: Compiled, settings: Settings, shapes: Shapes, stage: str, target_name: str
) -> MarkedText:
    """The text of one of ``KERNEL_STAGES`` for the backend that would run on ``target_name``; Triton's has its marks.

    "graph" is what FlexAttention's compiler starts from, as captured on a CPU. "triton-backward" has the kernels of the
    backward pass; the stages after it have those as well where ``shapes`` wants gradients. Kernels whose block sizes
    are chosen on a GPU have a source and nothing further. "cpp" is what FlexAttention's compiler generates for
    inference on this CPU, whatever the target. Raises SettingError, BackendError or DeviceError.
    """
    target = find_target(target_name)
    _check(stage, target)
    if stage == "cpp":
        return MarkedText.plain(_cpp(compiled, settings, shapes))
    if stage == "graph":
        return MarkedText.plain(_graph(compiled, settings, shapes, target))
    if stage in SOURCES:
        return _marked_source(pattern, compiled, settings, shapes, target, stage == "triton-backward")
    kernels = kernels_of(compiled, settings, shapes, target)
    if stage == "resources":
        under = _under_the_roof(_plan(compiled, settings, shapes), compiled, target)
        return MarkedText.plain(f"{table(_resources(kernels, target), target)}\n{under}")
    made = compile_kernels([kernel for kernel in kernels if kernel.fixed], target)
    comment = {"llvm": ";", "amdgcn": ";"}.get(stage, "//")
    texts = (f"{comment} {one.kernel.name}\n{one.texts[stage].rstrip()}\n" for one in made)
    return MarkedText.plain("\n".join(texts))


def _marked_source(
    pattern: Node, compiled: Compiled, settings: Settings, shapes: Shapes, target: Target, backward: bool
) -> MarkedText:
    plan = _plan(compiled, settings, replace(shapes, needs_grad=shapes.needs_grad or backward))
    kernels = _kernels(compiled, settings, plan, target)
    text = source_of([kernel for kernel in kernels if kernel.backward == backward])
    legend: tuple[str, ...] = LEGEND
    if plan.backend == "gather":
        marked = mark_gathered(text, pattern, compiled.program.printed)
    else:
        program, over_rows = compiled.program.printed, plan.backend == "gather_flex"
        by_residue = plan.backend == "residue_flex"
        legend += _of_residues(compiled) if by_residue else ()
        marked = mark_flex(text, pattern, program_of_rows(program) if over_rows else program, in_order=not by_residue)
    # Behind the launches, which stand above the code.
    head = next(n for n, (line, _) in enumerate(marked.lines) if not line)
    return MarkedText((*marked.lines[:head], *((line, None) for line in legend), *marked.lines[head:]))


def _of_residues(compiled: Compiled) -> tuple[str, ...]:
    """What q, kv and b are in kernels over positions that are reordered by residue class."""
    d, rest = compiled.residues.modulus, compiled.residues.rest
    said = f"# q and kv count within a residue class modulo {d}; row b is class b % {d} of row b // {d}"
    return (f"{said}.",) if rest is None else (f"{said}.", "# Other kernels take pairs of two classes, in order.")


def _plan(compiled: Compiled, settings: Settings, shapes: Shapes) -> Plan:
    """The plan of such a call on a GPU, which need not be there."""
    return bind_shapes(compiled, replace(shapes, device=torch.device("cuda")), settings)


def kernel_roofline(compiled: Compiled, settings: Settings, shapes: Shapes, target_name: str) -> Roofline | None:
    """The forward pass of such a call under the roof of a GPU with that architecture."""
    target = find_target(target_name)
    return _explained(_plan(compiled, settings, shapes), compiled, target).roofline


def _explained(plan: Plan, compiled: Compiled, target: Target) -> Explanation:
    return Explanation(compiled.title, compiled.program, plan, find(target.device))


def _under_the_roof(plan: Plan, compiled: Compiled, target: Target) -> str:
    found = _explained(plan, compiled, target).roofline
    if found is None:
        return "How many operations it takes depends on tensors of the call."
    return f"{found}.\n{target.device}: {found.source}."


def _graph(compiled: Compiled, settings: Settings, shapes: Shapes, target: Target) -> str:
    plan = _plan(compiled, settings, shapes)
    if plan.backend not in _BY_FLEX:
        raise BackendError(
            f"backend={plan.backend!r}",
            got="the stage 'graph'",
            expected="a backend that calls FlexAttention",
            mend="Ask for backend='flex'; the stage 'triton' shows the kernels that gather.",
        )
    return "\n\n".join(flex_graphs(compiled, settings, plan, target))


def _cpp(compiled: Compiled, settings: Settings, shapes: Shapes) -> str:
    # On a CPU "auto" takes the chunked path, which is no generated code.
    asked = replace(settings, backend=settings.backend if settings.backend in _BY_FLEX else "flex")
    try:
        plan = bind_shapes(compiled, replace(shapes, device=torch.device("cpu")), asked)
    except BackendError as error:
        raise refused(None, error.got, mend=error.mend) from None
    return "\n".join(cpp_kernels(compiled, asked, plan))


def kernel_resources(compiled: Compiled, settings: Settings, shapes: Shapes, target_name: str) -> list[Resources]:
    """What each kernel takes of ``target_name``. Raises as ``kernel_code`` does."""
    target = find_target(target_name)
    return _resources(kernels_of(compiled, settings, shapes, target), target)


def _resources(kernels: Sequence[Kernel], target: Target) -> list[Resources]:
    return [resources_of(made, target) for made in compile_kernels([k for k in kernels if k.fixed], target)]


def kernels_of(compiled: Compiled, settings: Settings, shapes: Shapes, target: Target) -> tuple[Kernel, ...]:
    """The attention kernels of a call on ``target``, forward's first; backward's where ``shapes`` wants gradients.

    Kernels that make the selection are the same for every pattern, and are not among them.
    """
    return _kernels(compiled, settings, _plan(compiled, settings, shapes), target)


def _kernels(compiled: Compiled, settings: Settings, plan: Plan, target: Target) -> tuple[Kernel, ...]:
    if plan.backend == "gather":
        # It loads the whole compiler, which uses this module.
        from flexsparse.explorer.gathered import gathered_kernels

        found = gathered_kernels(compiled.program, gathered_source(compiled.program), plan, target)
    elif plan.backend in _BY_FLEX:
        found = flex_kernels(compiled, settings, plan, target)
    else:
        raise _no_kernels(plan)
    return tuple(kernel for kernel in found if plan.shapes.needs_grad or not kernel.backward)


def _check(stage: str, target: Target) -> None:
    wrong = ("amdgcn",) if target.is_nvidia else ("ptx", "sass")
    if stage in wrong:
        raise SettingError(
            "stage",
            got=f"{stage!r} for {target.name}",
            expected=f"{stage!r} for {'gfx942' if target.is_nvidia else 'sm_80, sm_90 or sm_100'}",
            mend=f"{target.name} has {_ELSEWHERE[stage]!r}.",
        )


def _no_kernels(plan: Plan) -> BackendError:
    return BackendError(
        f"backend={plan.backend!r}",
        got="a stage of kernels",
        expected="a backend with kernels to show",
        mend="Use backend='flex', or 'gather' or 'gather_flex' for patterns that select keys.",
    )
