"""Triton kernels for patterns with a selection: the pattern's mask, score and gates printed into kernels that gather.

The keys of a chunk of queries come in parts that have no pair in common:

- near: what the pattern allows whatever is selected (windows, sinks, ...), tile by tile from a block mask;
- slots: for each selection the keys in its slots as the chunk starts, gathered row by row;
- fresh: for each selection the keys that enter it inside the chunk, which are neighbours. Those of a single selection
  share their tiles with near pairs, so both are computed together, and the block mask leaves these tiles out.

Every pair counts once, in the first part that has it. What a part knows of its pairs (that the near mask holds, or
that the key is selected) is put into the expressions first, so that a part computes no more than it needs.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import pathlib
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType

from flexsparse.codegen.gathering.module import module_text
from flexsparse.codegen.gathering.parts import near_mask, parts_of
from flexsparse.codegen.gathering.printer import Printer
from flexsparse.codegen.gathering.tiles import attend, gradient_of_keys, gradient_of_query, gradient_of_slots
from flexsparse.files import cache_home, write_whole
from flexsparse.ir.nodes import Load, Node, walk
from flexsparse.ir.program import Program
from flexsparse.ir.text import text

# The names of generated modules begin with it.
_MODULE = "flexsparse_gathered_"


@dataclass(frozen=True)
class GatheredSource:
    """The module's text and what its kernels read, in order.

    ``captured``: tensors by name, with their dimensions; ``numbers``: functions of sizes by name, as Python text.
    ``near``: there are pairs that the pattern allows whatever is selected. ``joined``: fresh keys come with the near
    pairs of their tiles, which the lists of near tiles must not have.
    ``gated``: the selections whose gates are computed; ``slot_gates``: for each selection, those among them that its
    gathered keys have; ``shifted``: those with a gradient for tau.
    """

    text: str
    captured: tuple[tuple[str, int], ...]
    numbers: Mapping[str, str]
    near: bool
    joined: bool
    gated: tuple[int, ...]
    slot_gates: Mapping[int, tuple[int, ...]]
    shifted: tuple[int, ...]


def can_gather(program: Program) -> bool:
    """Whether the pattern selects keys, and everything in it can be printed into kernels."""
    return bool(program.selections) and not program.chosen and not program.opaque


def _title(program: Program) -> str:
    """What the kernels are for, without numbers that they take at the call: one text serves every k."""
    count = len(program.selections)
    return f"{'One selection' if count == 1 else f'{count} selections'} beside {text(near_mask(program))}"


def gathered_source(program: Program) -> GatheredSource:
    """The kernels of a program with at least one selection and nothing that the text cannot say, for every number."""
    return _source(program.printed)


@functools.lru_cache(maxsize=256)
def _source(program: Program) -> GatheredSource:
    parts = parts_of(program)
    gated = sorted({gate.number for part in parts.values() for gate in part.gates})
    slot_gates = {
        n: tuple(dict.fromkeys(gate.number for gate in parts[f"selected {n}"].gates))
        for n in range(len(program.selections))
    }
    shifted = sorted({g.number for p in parts.values() for g in p.gates if g.through != "ste_identity"})
    printer = Printer(program, shifted)
    blocks = {
        (way, name): made(printer, part, name)
        for name, part in parts.items()
        for way, made in (("forward", attend), ("query", gradient_of_query), ("keys", gradient_of_keys))
    }
    blocks |= {
        ("slots", name): gradient_of_slots(printer, part, name)
        for name, part in parts.items()
        if name.startswith("selected")
    }
    names = dict.fromkeys(n.tensor for e in program.expressions.values() for n in walk(e) if isinstance(n, Load))
    captured = tuple((spec.name, len(spec.dims)) for spec in names if spec.name not in program.sink_only)
    given = {
        *printer.text.given,
        *(f"after_{n}" for n, s in enumerate(program.selections) if isinstance(s.after, Node)),
    }
    text = module_text(
        _title(program),
        blocks,
        captured,
        tuple(printer.text.numbers),
        len(program.selections),
        gated,
        slot_gates,
        shifted,
        sorted(given),
    )
    numbers, near, joined = dict(printer.text.numbers), "near" in parts, "joined" in parts
    return GatheredSource(text, captured, numbers, near, joined, tuple(gated), slot_gates, tuple(shifted))


@functools.lru_cache(maxsize=256)
def load_module(text: str) -> ModuleType:
    """The text as a module from a file in the cache directory, which tracebacks and Triton can read."""
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    name = f"{_MODULE}{digest}"
    path = _kept(f"{name}.py", text)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def cache_folder() -> pathlib.Path:
    """Where generated modules are kept: in ``FLEXSPARSE_CACHE_DIR`` or the user's cache."""
    return cache_home() / "kernels"


def cached_files() -> list[pathlib.Path]:
    """The generated modules that are kept, and no other file."""
    return sorted(cache_folder().glob(f"{_MODULE}*.py"))


def _kept(name: str, text: str) -> pathlib.Path:
    """A file with this text in ``FLEXSPARSE_CACHE_DIR`` or the user's cache; where that is read-only, a temporary one.

    It is written beside its place and moved there, so that other processes find all of it or nothing.
    """
    for folder in (cache_folder(), pathlib.Path(tempfile.gettempdir()) / f"flexsparse-{os.getuid()}"):
        path = folder / name
        try:
            if path.is_file() and path.read_text() == text:
                return path
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_whole(path, text)
        except OSError:
            continue
        return path
    raise OSError(f"no folder to keep {name} in: tried {cache_folder()} and {tempfile.gettempdir()}")
