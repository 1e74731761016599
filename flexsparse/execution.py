"""A bound call on its backend, and what the backend does not give itself: sinks, and gradients in a fixed order."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flexsparse.analysis.tiles import Tiles
from flexsparse.backends import BY_RESIDUE, OVER_ROWS
from flexsparse.codegen.flex import Generated, opaque_functions
from flexsparse.codegen.gathered import gathered_source
from flexsparse.codegen.gathering.rows import rows_of
from flexsparse.ir.nodes import Node
from flexsparse.ir.program import Program
from flexsparse.pipeline import Bound, classify_tiles, compile_pattern
from flexsparse.runtime.buffers import sequence_dims
from flexsparse.runtime.chunked import Work, attend_chunked
from flexsparse.runtime.completion import completed, is_carried
from flexsparse.runtime.flex import Launchers, attend_flex
from flexsparse.runtime.gathered import attend_gathered, make_call
from flexsparse.runtime.gathered_flex import RowsCall, attend_rows
from flexsparse.runtime.inputs import Shapes, class_shapes
from flexsparse.runtime.residues import attend_residues
from flexsparse.settings import Settings


@dataclass(frozen=True)
class Runner:
    """Runs the bound calls of one pattern. ``program`` has the pattern's scalars; a bound call has their numbers."""

    node: Node
    program: Program
    settings: Settings

    def run(
        self,
        bound: Bound,
        scale: float,
        operands: tuple[Tensor, Tensor, Tensor],
        return_lse: bool,
        kept: list[Tensor] | None = None,
        into: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Any]:
        """out and lse (perhaps None unless wanted); ``kept`` as ``attend_gathered`` and ``attend_chunked`` take it.

        ``into``: for the kernels that gather, as ``attend_gathered`` takes it.
        """
        if bound.plan.backend == "gather":
            return self._gather(bound, scale, operands, kept, into)
        work, tensors = self.work_of(bound, scale)
        if bound.plan.backend == "chunked":
            return attend_chunked(work, *operands, tensors, kept)
        recomputed = tuple(self.is_recomputed(name, work.shapes.dtype) for name in work.names)
        offset = work.shapes.q_offset != 0
        launchers = launchers_of(self.node, self.settings, offset, bound.plan.backend)
        if bound.plan.backend in BY_RESIDUE:
            return self._by_residue(bound, work, launchers, operands, tensors, recomputed, return_lse)
        if bound.plan.backend in OVER_ROWS:
            return self._over_rows(bound, work, launchers, operands, tensors, recomputed, return_lse)
        return attend_flex(work, launchers, operands, tensors, recomputed, needs_lse=return_lse)

    def work_of(self, bound: Bound, scale: float) -> tuple[Work, tuple[Tensor, ...]]:
        """What a bound call computes, and the tensors that its functions read."""
        generated = compile_pattern(self.node, bound.plan.shapes.q_offset != 0).generated
        return self._work(generated, bound.plan.shapes, bound.tiles, bound.buffers, scale)

    def _work(
        self, generated: Generated, shapes: Shapes, tiles: Tiles, buffers: Mapping[str, Any], scale: float
    ) -> tuple[Work, tuple[Tensor, ...]]:
        values = {name: buffers[name] for name in generated.arguments if name in buffers}
        names = tuple(name for name, value in values.items() if isinstance(value, Tensor))
        constants = {name: value for name, value in values.items() if name not in names}
        dims = tuple(sequence_dims(self.program, name) for name in names)
        opaque, sink = opaque_functions(self.program), self.program.has_sink
        work = Work(shapes, tiles, scale, names, constants, generated.build, dims, opaque, sink)
        return work, tuple(values[name] for name in names)

    def _gather(
        self,
        bound: Bound,
        scale: float,
        operands: tuple[Tensor, Tensor, Tensor],
        kept: list[Tensor] | None,
        into: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, Tensor]:
        shapes, source = bound.plan.shapes, gathered_source(self.program)
        call = make_call(source, shapes, bound.tiles, scale, bound.buffers, bound.program.selections)
        out, lse = attend_gathered(call, *operands, kept, into)
        if not self.program.learnable and not self.program.has_sink:
            return out, lse
        work, tensors = self.work_of(bound, scale)
        learned = set(self.program.learnable) - self.program.sink_only
        # u and tau get theirs from the kernels, whatever ``deterministic`` says: those add in a fixed order.
        recomputed = tuple(
            name in learned or (name in self.program.sink_only and self.is_recomputed(name, shapes.dtype))
            for name in work.names
        )
        if is_carried(tensors, recomputed):
            # The chunked path reads the tiles of the whole mask, and not of what is near alone.
            work = replace(work, tiles=classify_tiles(bound.program, shapes, self.settings, bound.buffers))
        return completed(work, operands, tensors, recomputed, out, lse)

    def _over_rows(
        self,
        bound: Bound,
        work: Work,
        launchers: Launchers,
        operands: tuple[Tensor, Tensor, Tensor],
        tensors: tuple[Tensor, ...],
        recomputed: tuple[bool, ...],
        return_lse: bool,
    ) -> tuple[Tensor, Tensor | None]:
        shapes, carried = work.shapes, is_carried(tensors, recomputed)
        rows = rows_of(bound.program.selections, shapes.kv_len, self.settings.block_size)
        call = RowsCall(rows, compile_pattern(self.node).rows, bound.buffers)
        outside = tuple(t.detach() if r else t for t, r in zip(tensors, recomputed, strict=True))
        wanted = return_lse or carried or work.sink
        out, lse = attend_rows(call, work, launchers, operands, outside, needs_lse=wanted)
        if lse is None:
            return out, lse
        if carried:
            # The chunked path reads the tiles of keys, and not those of rows.
            work = replace(work, tiles=classify_tiles(bound.program, shapes, self.settings, bound.buffers))
        return completed(work, operands, tensors, recomputed, out, lse)

    def _by_residue(
        self,
        bound: Bound,
        work: Work,
        launchers: Launchers,
        operands: tuple[Tensor, Tensor, Tensor],
        tensors: tuple[Tensor, ...],
        recomputed: tuple[bool, ...],
        return_lse: bool,
    ) -> tuple[Tensor, Tensor | None]:
        compiled, carried = compile_pattern(self.node), is_carried(tensors, recomputed)
        modulus, functions = compiled.residues.modulus, compiled.residue_functions
        kept = {n: t.detach() if r else t for n, t, r in zip(work.names, tensors, recomputed, strict=True)}
        buffers = {**bound.buffers, **kept}
        shapes = class_shapes(work.shapes, modulus)
        lengths = {"q_len": shapes.q_len, "kv_len": shapes.kv_len}
        within, inside = self._work(functions[0], shapes, bound.tiles, buffers | lengths, work.scale)
        rest: Work | None = None
        outside: tuple[Tensor, ...] = ()
        if functions[1] is not None:
            assert bound.rest is not None
            rest, outside = self._work(functions[1], work.shapes, bound.rest, buffers, work.scale)
        wanted = return_lse or carried or work.sink
        out, lse = attend_residues(modulus, within, rest, launchers, operands, (inside, outside), needs_lse=wanted)
        if lse is None:
            return out, lse
        if carried:
            # The chunked path reads the tiles of positions in order.
            work = replace(work, tiles=classify_tiles(bound.program, work.shapes, self.settings, bound.buffers))
        return completed(work, operands, tensors, recomputed, out, lse)

    def is_recomputed(self, name: str, dtype: torch.dtype) -> bool:
        """Whether a tensor's gradient comes from the chunked path rather than from FlexAttention."""
        deterministic = self.settings.deterministic
        if name in self.program.sink_only:
            # A sink's gradient is a plain sum, over the rounding of lse for all queries; float32 shows it.
            return deterministic is not False and dtype is torch.float32
        return deterministic is not False and (deterministic is True or name in self.program.learnable)


@functools.lru_cache(maxsize=256)
def launchers_of(pattern: Any, settings: Settings, offset: bool, backend: str) -> Launchers:
    # The pattern and the form are part of the key: each kind of function gets launchers of its own.
    digest = hashlib.sha256(repr((pattern, settings, offset, backend)).encode()).hexdigest()[:16]
    return Launchers(digest, settings, backend)
