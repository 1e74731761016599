"""Every stage of a compiled pattern as text, from its expression to machine code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from flexsparse.codegen.gathered import can_gather, gathered_source
from flexsparse.errors import SettingError, nearest
from flexsparse.explanation import Explanation
from flexsparse.explorer.gathered_marks import mark_gathered
from flexsparse.explorer.marks import MarkedText
from flexsparse.explorer.resources import Resources
from flexsparse.explorer.stages import KERNEL_STAGES, kernel_code, kernel_resources, kernel_roofline
from flexsparse.explorer.targets import find_target
from flexsparse.explorer.tile_text import tile_text
from flexsparse.expression import Expression
from flexsparse.ir.nodes import Node
from flexsparse.ir.program import Program, program_text
from flexsparse.pipeline import Compiled, tiles_of_shapes
from flexsparse.plan import Plan
from flexsparse.roofline import Roofline
from flexsparse.runtime.inputs import Shapes
from flexsparse.settings import Settings

STAGES = (
    *("expr", "canonical", "ir", "tiles", "plan", "source", "mask_mod", "score_mod", "rows", "kernels"),
    *KERNEL_STAGES,
)


class Met(Protocol):
    """A pattern that has met shapes."""

    @property
    def plan(self) -> Plan: ...

    def explain(self) -> Explanation: ...


class Last(Protocol):
    """What the pattern met last; raises NotBoundError, which names what is wanted, where it has met none."""

    def __call__(self, wanted: str = ...) -> Met: ...


@dataclass(frozen=True)
class Stages:
    """The stages of one compiled pattern; those from "tiles" on that depend on shapes are those of ``last``."""

    expression: Expression
    node: Node
    compiled: Compiled
    settings: Settings
    last: Last

    def text(self, stage: str, target: str) -> MarkedText:
        """The text of a stage line by line, with what each line of a Triton kernel has from the pattern.

        Raises as ``CompiledAttention.code`` does.
        """
        if stage not in STAGES:
            hint = nearest(str(stage), STAGES)
            raise SettingError("stage", got=repr(stage), expected=f"one of {', '.join(map(repr, STAGES))}", mend=hint)
        find_target(target)
        if stage == "kernels" and can_gather(self._program):
            return mark_gathered(gathered_source(self._program).text, self.node, self._program.printed)
        if stage in KERNEL_STAGES:
            return kernel_code(self.node, self.compiled, self.settings, self._shapes(stage), stage, target)
        return MarkedText.plain(self._before_kernels(stage))

    def resources(self, target: str) -> list[Resources]:
        """What each attention kernel takes of a GPU of that architecture."""
        return kernel_resources(self.compiled, self.settings, self._shapes("resources"), target)

    def roofline(self, target: str) -> Roofline | None:
        """Operations, bytes and times of the forward pass there; None where tensors of a call decide them."""
        return kernel_roofline(self.compiled, self.settings, self._shapes("roofline"), target)

    @property
    def _program(self) -> Program:
        return self.compiled.program

    def _shapes(self, wanted: str) -> Shapes:
        return self.last(wanted).plan.shapes

    def _before_kernels(self, stage: str) -> str:
        program = self._program
        if stage == "expr":
            return str(self.expression)
        if stage == "ir":
            return str(program)
        if stage == "canonical":
            # It brings sympy, for which nothing else here waits.
            from flexsparse.ir.canonical import canonical

            return "\n".join(f"{n:<10} = {program_text(canonical(e))}" for n, e in program.printed.expressions.items())
        if stage == "tiles":
            found = tiles_of_shapes(self.compiled, self._shapes(stage), self.settings)
            return "\n\n".join(tile_text(tiles) for tiles in found if tiles is not None) or tile_text(None)
        if stage == "plan":
            return str(self.last().explain())
        if stage == "source":
            return self.compiled.generated.source
        if stage == "rows":
            return self.compiled.rows.source if program.selections else "# no copies of keys: nothing is selected"
        if stage == "kernels":
            return "# no kernels of ours: nothing is gathered, and torch generates FlexAttention's at the call"
        return self.compiled.generated.function_source(stage)
