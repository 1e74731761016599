"""Every stage by name, in order: expression -> program -> verified program -> source, then with shapes -> plan."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from flexsparse.analysis.tiles import Tiles, classify
from flexsparse.backends import BY_RESIDUE, OVER_ROWS
from flexsparse.codegen.flex import Generated, generate
from flexsparse.codegen.gathering.parts import near_mask
from flexsparse.codegen.gathering.rows import Rows, program_of_rows, rows_of, with_rows
from flexsparse.ir.lower import lower
from flexsparse.ir.nodes import Load, Node, Opaque, walk
from flexsparse.ir.program import Chosen, Numbers, Program, Selected
from flexsparse.ir.residues import Residues, split_residues
from flexsparse.ir.scalars import at, numbers_at, scalars_of, without_defaults
from flexsparse.ir.text import text
from flexsparse.ir.verify import verify
from flexsparse.numbered import at_numbers
from flexsparse.plan import Plan, choose, make_plan
from flexsparse.runtime.buffers import make_buffers, refuse_outside
from flexsparse.runtime.inputs import Shapes, check_captured, class_shapes
from flexsparse.runtime.tile_cache import TileCache
from flexsparse.settings import CHUNK, Settings

# Plans that a pattern keeps, one for each set of shapes, and programs, one for each set of numbers.
_PLANS = 64
_NUMBERS = 64


@dataclass(frozen=True)
class Compiled:
    """What a pattern becomes before it meets shapes.

    ``program`` has the numbers of a call where ``numbered`` gave them; functions are those of every number.
    """

    program: Program
    title: str
    generated: Generated
    pattern: Node
    symbolic: Compiled | None = None
    # The last plan for shapes and settings, and the tiles that it was made for.
    plans: dict[tuple[Shapes, Settings], tuple[Tiles, Plan]] = field(default_factory=dict, compare=False, repr=False)
    # The backend for shapes and settings.
    _chosen: dict[tuple[Shapes, Settings], str] = field(default_factory=dict, compare=False, repr=False)
    # What ``numbered`` gave.
    _numbered: dict[Numbers, Compiled] = field(default_factory=dict, compare=False, repr=False)

    def numbered(self, numbers: Numbers) -> Compiled:
        """The same with numbers in place of scalars, for what is analysed.

        Raises what the pattern raises when it is written with these numbers.
        """
        if not numbers:
            return self
        found = self._numbered.get(numbers)
        if found is None:
            at_numbers(self.pattern, numbers)
            if len(self._numbered) >= _NUMBERS:
                self._numbered.clear()
            found = Compiled(at(self.program, numbers), self.title, self.generated, self.pattern, self)
            self._numbered[numbers] = found
        return found

    @functools.cached_property
    def rows(self) -> Generated:
        """The functions over keys and, behind them, copies of selected ones."""
        if self.symbolic is not None:
            return self.symbolic.rows
        return generate(program_of_rows(self.program), self.title, rows=True)

    @functools.cached_property
    def near(self) -> Program:
        """The program with the mask of what it allows whatever is selected."""
        return replace(self.program, mask=near_mask(self.program))

    @functools.cached_property
    def residues(self) -> Residues:
        """The program in parts by residue class, of which it has some."""
        split = split_residues(self.program)
        assert split is not None
        return split

    @functools.cached_property
    def residue_functions(self) -> tuple[Generated, Generated | None]:
        """The functions within classes and of the rest."""
        if self.symbolic is not None:
            return self.symbolic.residue_functions
        within, rest = self.residues.within, self.residues.rest
        title = f"{self.title}, pairs of one residue modulo {self.residues.modulus}"
        other = f"{self.title}, pairs of two residues modulo {self.residues.modulus}"
        return generate(within, title), None if rest is None else generate(rest, other)

    def backend(self, shapes: Shapes, settings: Settings) -> str:
        """The backend that ``choose`` chooses. Raises as it does."""
        found = self._chosen.get((shapes, settings))
        if found is None:
            if len(self._chosen) >= _PLANS:
                self._chosen.clear()
            found = self._chosen[shapes, settings] = choose(self.program, shapes, settings)[0]
        return found

    def plan(self, shapes: Shapes, settings: Settings, tiles: Tiles, rest: Tiles | None) -> Plan:
        """The plan of a call; made anew where its tiles are."""
        known = self.plans.get((shapes, settings))
        if known is None or known[0] is not tiles:
            if len(self.plans) >= _PLANS:
                self.plans.clear()
            known = (tiles, make_plan(self.program, shapes, settings, tiles, rest))
            self.plans[shapes, settings] = known
        return known[1]


@dataclass(frozen=True)
class Bound:
    """What a call becomes before it runs."""

    buffers: Mapping[str, Any]
    tiles: Tiles
    plan: Plan
    program: Program
    # Those of pairs that are not of one residue class, where those are attended to apart.
    rest: Tiles | None = None


@functools.lru_cache(maxsize=1024)
def compile_pattern(pattern: Node, offset: bool = False) -> Compiled:
    """Touches no device and no shape. Scalars that have defaults have these as their numbers."""
    scalars = scalars_of(pattern)
    if any(scalar.default is not None for scalar in scalars.values()):
        return compile_pattern(without_defaults(pattern), offset).numbered(numbers_at(scalars, {}))
    program = verify(lower(pattern))
    title = text(pattern)
    return Compiled(program, title, generate(program, title, offset=offset), pattern)


def bind_call(
    compiled: Compiled,
    shapes: Shapes,
    given: Mapping[str, Tensor],
    settings: Settings,
    *,
    operands: tuple[Tensor, Tensor] | None = None,
    validate: bool,
) -> Bound:
    """Check what was given, derive what the functions read, classify the tiles, choose a backend.

    ``operands`` are query and key, for selections that depend on them.
    """
    captured = check_captured(compiled.program, shapes, given, validate=validate)
    return bind_checked(compiled, shapes, captured, settings, operands=operands, validate=validate)


def bind_checked(
    compiled: Compiled,
    shapes: Shapes,
    captured: Mapping[str, Tensor],
    settings: Settings,
    *,
    operands: tuple[Tensor, Tensor] | None = None,
    selected: Mapping[str, Tensor] | None = None,
    validate: bool,
) -> Bound:
    """``bind_call`` after its checks; ``selected`` is what ``selection_buffers`` gave, where it was asked before."""
    program = compiled.program
    read = _tiled(compiled, shapes, settings)
    buffers = make_buffers(program, shapes, captured, operands, selected, read.chunk)
    if validate:
        refuse_outside(program, shapes, buffers)
    tiles = classify_tiles(read.program, read.shapes, read.settings, buffers, read.rows)
    rest = None if read.rest is None else classify_tiles(read.rest, shapes, settings, buffers)
    return Bound(buffers, tiles, compiled.plan(shapes, settings, tiles, rest), program, rest)


@dataclass(frozen=True)
class _Tiled:
    """What a backend reads the tiles of: a program over shapes, the rows behind the keys, and a second program.

    ``chunk``: the queries that share a slot table, 0 without one.
    """

    program: Program
    shapes: Shapes
    settings: Settings
    rows: Rows | None = None
    rest: Program | None = None
    chunk: int = 0


def _tiled(compiled: Compiled, shapes: Shapes, settings: Settings) -> _Tiled:
    """What the chosen backend reads the tiles of."""
    chosen = compiled.backend(shapes, settings)
    if chosen == "gather":
        return _Tiled(compiled.near, shapes, replace(settings, block_size=CHUNK), chunk=CHUNK)
    if chosen in OVER_ROWS:
        rows = rows_of(compiled.program.selections, shapes.kv_len, settings.block_size)
        return _Tiled(compiled.near, shapes, settings, rows)
    if chosen in BY_RESIDUE:
        split = compiled.residues
        return _Tiled(split.within, class_shapes(shapes, split.modulus), settings, rest=split.rest)
    return _Tiled(compiled.program, shapes, settings)


def bind_shapes(compiled: Compiled, shapes: Shapes, settings: Settings) -> Plan:
    """The plan for shapes alone; its tiles are known where the mask reads no tensor."""
    return make_plan(compiled.program, shapes, settings, *tiles_of_shapes(compiled, shapes, settings))


def tiles_of_shapes(compiled: Compiled, shapes: Shapes, settings: Settings) -> tuple[Tiles | None, Tiles | None]:
    """The tiles that the chosen backend reads, and those of a second call; None where they depend on tensors.

    Raises as ``choose`` does.
    """
    read = _tiled(compiled, shapes, settings)
    if reads_tensors(read.program.mask) or (read.rest is not None and reads_tensors(read.rest.mask)):
        return None, None
    # Plans are made where there is no such device: tiles of shapes alone are counted on the CPU.
    here = torch.device("cpu")
    tiles = classify_tiles(read.program, replace(read.shapes, device=here), read.settings, {}, read.rows)
    return tiles, None if read.rest is None else classify_tiles(read.rest, replace(shapes, device=here), settings, {})


def classify_tiles(
    program: Program, shapes: Shapes, settings: Settings, buffers: Mapping[str, Any], rows: Rows | None = None
) -> Tiles:
    """The class of every tile; kept for the next call unless scores, query, key or an untraced function decide it.

    With ``rows`` the program's mask is the near one, and the tiles are those of the keys and the rows behind them.
    """
    mask, sizes, block = program.mask, shapes.sizes, settings.block_size

    def make() -> Tiles:
        found = classify(mask, sizes, buffers, block=block, device=shapes.device, tables=program.tables)
        return found if rows is None else with_rows(found, rows)

    names = _names_read(mask)
    if names is None:
        return make()
    # Tables are made anew at each call; their numbers are part of the key.
    tensors = {spec.name: buffers[spec.name] for spec in program.tensors if spec.name in names}
    return _TILES.get((mask, program.tables, sizes, block, rows, str(shapes.device)), tensors, make)


@functools.lru_cache(maxsize=1024)
def _names_read(mask: Node) -> frozenset[str] | None:
    """The captured tensors that decide a mask; None where others do."""
    nodes = list(walk(mask))
    if any(isinstance(n, Selected | Chosen | Opaque) for n in nodes):
        return None
    return frozenset(n.tensor.name for n in nodes if isinstance(n, Load))


_TILES = TileCache()


def forget_tiles() -> None:
    """Drop the classified tiles that are kept from call to call."""
    _TILES.clear()


@functools.lru_cache(maxsize=1024)
def reads_tensors(mask: Node) -> bool:
    """Whether the mask depends on anything that is given at the call, or on a table of ``per_head`` numbers."""
    return any(isinstance(n, Load | Selected | Chosen | Opaque) for n in walk(mask))
