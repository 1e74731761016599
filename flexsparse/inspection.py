"""What can be looked at of a compiled pattern: its stages, its plan for shapes, and what kernels take of a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from flexsparse.errors import NotBoundError, ShapeError
from flexsparse.explanation import Explanation
from flexsparse.explorer.marks import MarkedText
from flexsparse.explorer.resources import Resources
from flexsparse.expression import Expression, Pattern
from flexsparse.hardware import Hardware, find
from flexsparse.ir.program import Program
from flexsparse.ir.scalars import without_defaults
from flexsparse.pipeline import bind_shapes, compile_pattern
from flexsparse.plan import Plan
from flexsparse.roofline import Roofline
from flexsparse.runtime.inputs import Shapes
from flexsparse.settings import Settings
from flexsparse.stages import Stages


@dataclass(frozen=True)
class BoundAttention:
    """A compiled pattern with shapes: the plan, without tensors."""

    attention: InspectedPattern
    plan: Plan
    program: Program

    def explain(self, hardware: Hardware | str | None = None) -> Explanation:
        """The plan with its candidates and reasons, and its cost on ``hardware``; ``str()`` gives the text."""
        device = find(hardware) if isinstance(hardware, str) else hardware
        return Explanation(str(self.attention.pattern), self.program, self.plan, device)


class InspectedPattern:
    """A pattern with its settings, before and after it meets shapes."""

    def __init__(self, expression: Expression, settings: Settings) -> None:
        self._compiled = compile_pattern(expression.node)
        self._expression = expression
        self._settings = settings
        # What is built is built for every number.
        self._node = without_defaults(expression.node)
        self._bound: BoundAttention | None = None

    @property
    def pattern(self) -> Pattern:
        """The expression that was compiled."""
        assert isinstance(self._expression, Pattern)
        return self._expression

    @property
    def settings(self) -> Settings:
        """The options that it was compiled with."""
        return self._settings

    @property
    def ir(self) -> Program:
        """The verified program, where the pattern has scalars at their defaults; ``str()`` of it is its text."""
        return self._compiled.program

    @property
    def source(self) -> str:
        """The generated module with ``mask_mod`` and ``score_mod``."""
        return self._compiled.generated.source

    @property
    def plan(self) -> Plan:
        """The plan of the last call or ``bind``. Raises NotBoundError before the first."""
        return self._last().plan

    def bind(
        self,
        *,
        q_len: int,
        head_dim: int,
        batch: int = 1,
        heads: int = 1,
        kv_heads: int | None = None,
        kv_len: int | None = None,
        value_dim: int | None = None,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
        q_offset: int = 0,
        needs_grad: bool = False,
    ) -> BoundAttention:
        """The plan for shapes, dtype and device; no tensor is made and no device is touched.

        Raises BackendError or DeviceError where the chosen backend cannot run such a call, ShapeError for sizes that no
        call has.
        """
        kv_heads = heads if kv_heads is None else kv_heads
        sizes = {"q_len": q_len, "head_dim": head_dim, "batch": batch, "heads": heads, "kv_heads": kv_heads}
        for name, size in (sizes | {"kv_len": kv_len or q_len, "value_dim": value_dim or head_dim}).items():
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ShapeError(name, got=repr(size), expected="an integer of at least 1")
        if heads % kv_heads:
            raise ShapeError("kv_heads", got=f"{kv_heads} for {heads} query heads", expected="a divisor of heads")
        shapes = Shapes(
            batch,
            heads,
            kv_heads,
            q_len,
            q_len if kv_len is None else kv_len,
            head_dim,
            head_dim if value_dim is None else value_dim,
            dtype,
            torch.device(device),
            q_offset,
            needs_grad,
        )
        plan = bind_shapes(self._compiled, shapes, self._settings)
        self._bound = BoundAttention(self, plan, self._compiled.program)
        return self._bound

    def explain(self, hardware: Hardware | str | None = None, **shapes: Any) -> Explanation:
        """What runs and why, for the last call, or for shapes as ``bind`` takes them.

        ``hardware`` adds the predicted cost of FlexAttention's kernels on a device by name ("H100", "A100", ...) or
        as described. Raises SettingError for an unknown name.
        """
        return (self.bind(**shapes) if shapes else self._last()).explain(hardware)

    def code(self, stage: str, target: str = "sm_90") -> str:
        """The text of one stage, from "expr", "ir" and "canonical" over "source", "mask_mod", "score_mod" to kernels.

        "canonical" is the IR in the one form that equal masks share; "rows" the module of backend="gather_flex", whose
        functions take rows in place of keys; "kernels" the Triton module of backend="gather" for any shapes. "plan" and
        "tiles", which lists what a plan computes, want shapes, by a call or ``bind``.

        So do the stages of the attention kernels that a GPU would run: for ``target`` ("sm_80", "sm_90", "sm_100" or
        "gfx942"), which need not be there. "graph" is the call of FlexAttention as Dynamo
        captures it on a CPU; "triton" and "triton-backward" are the kernels' source, ours or Inductor's, with what
        they are launched with; "ttir", "ttgir", "llvm", "ptx", "sass" and "amdgcn" (for gfx942) the texts of Triton's
        compiler, and "resources" tables of registers, spills, shared memory, occupancy, instructions and loads. Where
        the shapes want gradients, the last seven have the backward kernels as well. "cpp" is the C++ of FlexAttention
        for inference on this CPU.
        In Triton source, lines that come from the pattern have a comment that says from which part of it.
        Raises SettingError, NotBoundError, and BackendError where there are no such kernels or a compiler refuses.
        """
        return str(self.marked_code(stage, target))

    def marked_code(self, stage: str, target: str = "sm_90") -> MarkedText:
        """The text of ``code`` line by line, with what each line of a Triton kernel has from the pattern."""
        return self._stages.text(stage, target)

    def resources(self, target: str = "sm_90") -> list[Resources]:
        """What each attention kernel that would run on ``target`` takes of it, for the last call or ``bind``.

        Triton's compiler tells; no GPU is needed. Raises as ``code`` does.
        """
        return self._stages.resources(target)

    def roofline(self, target: str = "sm_90") -> Roofline | None:
        """Operations, bytes and times of the forward pass of the last call or ``bind`` on a GPU of that architecture.

        None where the operations depend on tensors of the call. Raises SettingError, NotBoundError or BackendError.
        """
        return self._stages.roofline(target)

    @property
    def _stages(self) -> Stages:
        return Stages(self._expression, self._node, self._compiled, self._settings, self._last)

    def _last(self, wanted: str = "plan") -> BoundAttention:
        if self._bound is None:
            raise NotBoundError(
                wanted,
                got="a compiled pattern that has met no shapes",
                expected="a call, or bind(q_len=..., head_dim=..., ...)",
                mend="Call it once, or give shapes first: bind(q_len=4096, head_dim=64, heads=8).",
            )
        return self._bound
