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
from flexsparse.codegen.gathering.tiles import attend, gradient_of_keys, gradient_of_query, gradient_of_slots
from flexsparse.codegen.triton_text import TritonText
from flexsparse.files import cache_home, write_whole
from flexsparse.ir.derivative import derivative
from flexsparse.ir.nodes import FALSE, TRUE, Apply, Constant, Load, Node, Symbol, mentions, replaced, walk
from flexsparse.ir.program import Gate, Program, Selected
from flexsparse.ir.simplify import simplify
from flexsparse.ir.text import text

_ONE = Constant(1.0)
# The names of generated modules begin with it.
_MODULE = "flexsparse_gathered_"
_GATES = {
    "": "clipped({x}, {least})",
    "capped_softmax": "tl.where({x} <= tl.log({least}), {least}, tl.exp(tl.where({x} >= 0.0, 0.0, {x})))",
}
# Numbers even where x is none, which then is for others to say: in the forward pass for the product of query and key,
# in the backward pass for p where the query sees the key; p is 0 elsewhere.
_FINITE_GATES = {
    "": "saturated({x}, {least})",
    "capped_softmax": "tl.maximum(tl.exp(tl.minimum({x}, 0.0)), {least})",
}
# Where a gate has a slope, "" for everywhere, and the slope there, "" for 1.
_SLOPES = {
    "": ("({m} > {least}) & ({m} < 1.0)", ""),
    "ste": ("({x} > {least}) & ({x} < 1.0)", ""),
    "capped_softmax": ("({x} > tl.log({least})) & ({x} < 0.0)", "tl.exp(tl.where({x} >= 0.0, 0.0, {x}))"),
    "ste_identity": ("", ""),
    "ste_sigmoid": ("", "tl.sigmoid({x}) * (1.0 - tl.sigmoid({x}))"),
}


@dataclass(frozen=True)
class GatheredSource:
    """The module's text and what its kernels read, in order.

    ``captured``: tensors by name, with their dimensions; ``numbers``: functions of sizes by name, as Python text.
    ``joined``: fresh keys come with the near pairs of their tiles, which the lists of near tiles must not have.
    ``gated``: the selections whose gates are computed; ``slot_gates``: for each selection, those among them that its
    gathered keys have; ``shifted``: those with a gradient for tau.
    """

    text: str
    captured: tuple[tuple[str, int], ...]
    numbers: Mapping[str, str]
    joined: bool
    gated: tuple[int, ...]
    slot_gates: Mapping[int, tuple[int, ...]]
    shifted: tuple[int, ...]


def can_gather(program: Program) -> bool:
    """Whether the pattern selects keys, and everything in it can be printed into kernels."""
    return bool(program.selections) and not program.chosen and not program.opaque


def near_mask(program: Program) -> Node:
    """What the pattern allows whatever is selected; masks never fall as selections grow."""
    return simplify(replaced(program.mask, {n: FALSE for n in walk(program.mask) if isinstance(n, Selected)}))


def _operands(op: str, node: Node) -> list[Node]:
    if isinstance(node, Apply) and node.op == op:
        return [x for arg in node.args for x in _operands(op, arg)]
    return [node]


@dataclass(frozen=True)
class _Part:
    """One part: its mask (TRUE where every key of it is seen), and the expressions under what it knows."""

    mask: Node
    score: Node
    gate_k: Node
    gate_v: Node
    gate_logit: Node

    @property
    def expressions(self) -> tuple[Node, ...]:
        return (self.mask, self.score, self.gate_k, self.gate_v, self.gate_logit)

    @property
    def gates(self) -> list[Gate]:
        found = {n for e in self.expressions for n in walk(e) if isinstance(n, Gate)}
        return sorted(found, key=lambda gate: gate.number)

    def forward(self) -> _Part:
        """Straight-through gates are 1; only their derivatives know better."""
        ones: dict[Node, Node] = {gate: _ONE for gate in self.gates if gate.through}
        return _Part(*(simplify(replaced(e, ones)) for e in self.expressions))


def _part(program: Program, mask: Node, known: Mapping[Node, Node]) -> _Part:
    rest = (program.score, program.gate_k, program.gate_v, program.gate_logit)
    return _Part(simplify(mask), *(simplify(replaced(e, known)) for e in rest))


def parts_of(program: Program) -> dict[str, _Part]:
    """Every part by name: "full" and "near" where the pattern allows keys by itself, then "selected 0" and so on.

    "joined" is near or enters selection 0, where that is the only one.
    """
    near = near_mask(program)
    parts = {}
    if near != FALSE:
        known: dict[Node, Node] = {near: TRUE, **dict.fromkeys(_operands("and", near), TRUE)}
        parts["full"] = _part(program, TRUE, known)
        parts["near"] = _part(program, near, known)
    for n in range(len(program.selections)):
        parts[f"selected {n}"] = _part(program, selected_mask(program, near, n), _held(near, n))
    enters = Apply("and", (Selected(0), selected_mask(program, near, 0)))
    joined = _part(program, Apply("or", (near, enters)), {})
    # In the loop over it, a key is selected if it enters inside the chunk, which no score may take for more.
    sees_more = any(isinstance(n, Selected) for e in joined.expressions[1:] for n in walk(e))
    if near != FALSE and len(program.selections) == 1 and not sees_more:
        parts["joined"] = joined
    return parts


def selected_mask(program: Program, near: Node, n: int) -> Node:
    """What else must hold for a pair in selection ``n`` to be seen and to belong to no part before it."""
    mask = replaced(program.mask, _held(near, n))
    after = program.selections[n].after
    after = after if isinstance(after, Node) else Constant(after)
    for other in (*(Selected(m) for m in range(n)), *_possible(near, after)):
        mask = Apply("and", (mask, Apply("not", (other,))))
    return simplify(mask)


def _held(near: Node, n: int) -> dict[Node, Node]:
    """What is known of a pair in selection ``n`` that is not near."""
    known: dict[Node, Node] = {Selected(n): TRUE, near: FALSE, **dict.fromkeys(_operands("or", near), FALSE)}
    return {node: value for node, value in known.items() if not isinstance(node, Constant)}


def _possible(near: Node, after: Node) -> list[Node]:
    """The operands of a near mask that can hold for a key which is ``after`` queries old or older."""
    # It brings sympy, for which a block mask need not wait.
    from flexsparse.ir.canonical import canonical

    old = Apply("le", (Apply("add", (Symbol("kv"), after)), Symbol("q")))
    return [part for part in _operands("or", near) if canonical(Apply("and", (part, old))) != FALSE]


def _kind(gate: Gate) -> str:
    return "capped_softmax" if gate.capped else gate.through


class _Printer:
    """The lines that a part adds to a kernel, in forward and in backward.

    They use ``u_n`` by key, and ``tau_n``, ``known_tau_n`` (0 for NaN) and ``least_n`` by query, which the kernel loads
    where it knows them.
    """

    def __init__(self, program: Program, shifted: list[int]) -> None:
        self.program, self.shifted = program, shifted
        self.text = TritonText()

    def sure(self, part: _Part) -> int | None:
        """The selection whose gate every key of the part has, if that is its only gate, and it is not straight-through.

        Its keys have scores, so only the query's threshold can be NaN: the product of query and key takes that in.
        """
        now = part.forward()
        free = not any(isinstance(n, Selected) for e in now.expressions for n in walk(e))
        return now.gates[0].number if free and len(now.gates) == 1 else None

    def loads(self, part: _Part, slopes: bool, told: bool) -> list[str]:
        """Gates, with ``slopes`` as the backward pass wants them, and who is selected, unless the loop has ``told``."""
        lines = []
        selected = {n.number for e in part.expressions for n in walk(e) if isinstance(n, Selected)}
        for n in sorted(selected if not told else ()):
            at = f"(b * heads_{n} + h // group_{n}) * length + kv"
            lines.append(f"selected_{n} = (tl.load(p_birth_{n} + {at}) <= q) & (q < tl.load(p_death_{n} + {at}))")
        for gate in part.gates:
            n, through = gate.number, gate.through
            if through and not slopes:
                continue
            sure = self.sure(part) == n
            threshold = f"known_tau_{n}" if not slopes and sure else f"tau_{n}"
            lines.append(f"x_{n} = u_{n}" + ("" if through == "ste_identity" else f" - {threshold}"))
            if not through:
                made = (_FINITE_GATES if slopes or sure else _GATES)[_kind(gate)]
                lines.append(f"m_{n} = {made.format(x=f'x_{n}', least=f'least_{n}')}")
        return lines

    def score(self, part: _Part) -> list[str]:
        """From ``raw``, scale times the product of query and key, to ``score``; -inf where the mask hides a key."""
        part = part.forward()
        lines = ["score = raw"]
        if part.gate_k != _ONE:
            lines.append(f"gate_k = {self.text.emit(part.gate_k)}")
            lines.append("score = raw * gate_k")
        if part.score != Symbol("score"):
            lines.append(f"score = {self._shaped(part.score)}")
        if part.gate_logit != _ONE:
            lines.append(f"score = score + tl.log({self.text.emit(part.gate_logit)})")
        return lines

    def _shaped(self, node: Node) -> str:
        text = self.text.emit(node)
        return text if mentions(node, "score") else f"0.0 * raw + ({text})"

    def seen(self, part: _Part) -> str:
        """The mask as text, empty where every key is seen."""
        mask = part.forward().mask
        return "" if mask == TRUE else self.text.emit(mask)

    def value_gate(self, part: _Part) -> str:
        """The gate on V as text, empty for 1."""
        gate = part.forward().gate_v
        return "" if gate == _ONE else self.text.emit(gate)

    def slopes(self, part: _Part, shown: str) -> list[str]:
        """From ``d_score`` and ``d_gate_v`` to ``d_raw``, and to ``d_x_n`` of every gate; ``shown``: where a key is."""
        ones: dict[Node, Node] = {gate: _ONE for gate in part.gates if gate.through}
        now = part.forward()

        def printed(node: Node) -> str:
            return self.text.emit(simplify(replaced(node, ones)))

        inner = simplify(replaced(derivative(part.score, Symbol("score")), ones))
        lines = ["d_raw = d_score"]
        if inner != _ONE:
            # The derivative is taken where the score expression is, at raw * gate_k.
            lines.insert(0, "score = raw * gate_k" if now.gate_k != _ONE else "score = raw")
            lines[-1] = f"d_raw = d_score * ({self.text.emit(inner)})"
        for gate in part.gates:
            terms = []
            for what, base in (("gate_k", "d_raw * raw"), ("gate_v", "d_gate_v")):
                factor = printed(derivative(getattr(part, what), gate))
                if factor != "0.0":
                    terms.append(base if factor == "1.0" else f"{base} * ({factor})")
            factor = printed(derivative(part.gate_logit, gate))
            if factor != "0.0":
                logit = self.text.emit(now.gate_logit)
                terms.append(f"d_score * ({factor}) / ({logit})" if now.gate_logit != _ONE else f"d_score * ({factor})")
            n, total = gate.number, " + ".join(terms) or "0.0 * raw"
            where, slope = (t.format(m=f"m_{n}", x=f"x_{n}", least=f"least_{n}") for t in _SLOPES[_kind(gate)])
            where = " & ".join(filter(None, (where, shown)))
            total = f"({total}) * ({slope})" if slope else total
            lines.append(f"d_x_{n} = " + (f"tl.where({where}, {total}, 0.0)" if where else total))
        if now.gate_k != _ONE:
            lines.append("d_raw = d_raw * gate_k")
        if inner != _ONE and shown:
            # The slope of a score may be anything where the key is hidden.
            lines.append(f"d_raw = tl.where({shown}, d_raw, 0.0)")
        return lines


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
    printer = _Printer(program, shifted)
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
        slot_gates,
        shifted,
        sorted(given),
    )
    numbers = dict(printer.text.numbers)
    return GatheredSource(text, captured, numbers, "joined" in parts, tuple(gated), slot_gates, tuple(shifted))


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
