"""The flattened program: one mask, one score and three gates over indices, tensors and selections."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

from flexsparse.ir.nodes import (
    PLACE,
    BlockTopK,
    Kind,
    Load,
    Node,
    Opaque,
    Scalar,
    SelectionNode,
    Symbol,
    TensorSpec,
    rebuild,
    walk,
)
from flexsparse.ir.sinks import NO_SINK
from flexsparse.ir.text import call_text, selection_arguments, text


@dataclass(frozen=True)
class Selected(Node):
    """Whether selection ``number`` holds key kv for query q."""

    number: int

    @property
    def kind(self) -> Kind:
        return Kind.BOOL


@dataclass(frozen=True)
class Held(Node):
    """Whether a row behind the keys, or a key's own, stands for its key in selection ``number`` at query q."""

    number: int

    @property
    def kind(self) -> Kind:
        return Kind.BOOL


@dataclass(frozen=True)
class Own(Node):
    """Whether a row is the key's own, and not a copy of it behind the keys."""

    @property
    def kind(self) -> Kind:
        return Kind.BOOL


@dataclass(frozen=True)
class Gate(Node):
    """The soft gate m = clip(u[kv] - tau[q], 0, 1) of selection ``number``; if ``capped``, min(1, exp(u[kv] - tau[q])).

    ``through`` asks for 1 in the forward pass, with the gradient of m ("ste"), of u[kv] ("ste_identity") or of
    sigmoid(u[kv] - tau[q]) ("ste_sigmoid") in the backward pass.
    """

    number: int
    through: str = ""
    capped: bool = False

    @property
    def kind(self) -> Kind:
        return Kind.REAL


# The value of every scalar, by name in order.
Numbers: TypeAlias = tuple[tuple[str, int | float], ...]
# The numbers of every per_head list of the program.
Tables = tuple[tuple[int | float, ...], ...]


@dataclass(frozen=True)
class Chosen(Node):
    """Whether query q chose the block of key kv; the query's own block always is."""

    topk: BlockTopK

    @property
    def kind(self) -> Kind:
        return Kind.BOOL

    @property
    def children(self) -> tuple[Node, ...]:
        return PLACE


@dataclass(frozen=True)
class Program:
    """What the lowerings read. Gates are REAL expressions, the constant 1 where nothing gates.

    The final score of a key is ``score`` evaluated with ``scale * (q . k) * gate_k`` as its running score,
    plus ``log(gate_logit)``; its value is multiplied by ``gate_v``. ``sink`` is a logit in b, h and q that joins the
    softmax's denominator, -inf where there is none. ``head_groups`` are the lengths of ``per_head`` lists, which must
    divide the number of query heads; ``idle`` names tensors that the pattern mentions and simplification made
    unnecessary. Where a call gave numbers in place of scalars, ``numbers`` has them, and ``symbolic`` is the program
    that still has the scalars, of which functions and kernels are printed.
    """

    mask: Node
    score: Node
    gate_k: Node
    gate_v: Node
    gate_logit: Node
    selections: tuple[SelectionNode, ...]
    tensors: tuple[TensorSpec, ...]
    tables: Tables = ()
    head_groups: tuple[int, ...] = ()
    idle: tuple[str, ...] = ()
    sink: Node = NO_SINK
    numbers: Numbers = ()
    symbolic: Program | None = None

    @property
    def printed(self) -> Program:
        """The program of which functions and kernels are printed, with scalars in place of their numbers."""
        return self.symbolic or self

    @functools.cached_property
    def scalars(self) -> tuple[Scalar, ...]:
        """The scalars that any expression or selection reads, in order of first use."""
        found = (n for e in (*self.expressions.values(), *self.selections) for n in walk(e) if isinstance(n, Scalar))
        return tuple(dict.fromkeys(found))

    @functools.cached_property
    def expressions(self) -> dict[str, Node]:
        """Every expression by name; the sink only where there is one."""
        names = ("mask", "score", "gate_k", "gate_v", "gate_logit", *(("sink",) if self.has_sink else ()))
        return {name: getattr(self, name) for name in names}

    @property
    def has_sink(self) -> bool:
        """Whether a logit without a key takes part in the softmax."""
        return self.printed.sink != NO_SINK

    @functools.cached_property
    def loaded(self) -> dict[str, frozenset[str]]:
        """The captured tensors that each expression reads."""
        return {
            name: frozenset(n.tensor.name for n in walk(e) if isinstance(n, Load))
            for name, e in self.printed.expressions.items()
        }

    @functools.cached_property
    def sink_only(self) -> frozenset[str]:
        """The captured tensors that nothing but the sink reads: the attention itself owes them no gradient."""
        others = (names for name, names in self.loaded.items() if name != "sink")
        return self.loaded.get("sink", frozenset()).difference(*others)

    @functools.cached_property
    def learnable(self) -> tuple[str, ...]:
        """The captured tensors that receive gradients."""
        read = frozenset().union(*self.loaded.values())
        return tuple(spec.name for spec in self.tensors if spec.learnable and spec.name in read)

    @functools.cached_property
    def gates(self) -> frozenset[Gate]:
        """The gates that any expression reads."""
        found = (n for e in self.printed.expressions.values() for n in walk(e) if isinstance(n, Gate))
        return frozenset(found)

    @functools.cached_property
    def opaque(self) -> tuple[Opaque, ...]:
        """The functions that could not be traced, in order of first use."""
        found = (n for e in self.printed.expressions.values() for n in walk(e) if isinstance(n, Opaque))
        return tuple({n.function: n for n in found}.values())

    @functools.cached_property
    def chosen(self) -> tuple[BlockTopK, ...]:
        """The selections of blocks that depend on query and key, in order of first use."""
        found = (n.topk for e in self.printed.expressions.values() for n in walk(e) if isinstance(n, Chosen))
        return tuple(dict.fromkeys(found))

    @property
    def has_score(self) -> bool:
        """Whether the score is anything but the running score itself."""
        return self.score != Symbol("score")

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        if self.symbolic is not None:
            yield from (f"number     {name} = {value!r}" for name, value in self.numbers)
            yield from self.symbolic._lines()
            return
        for spec in self.tensors:
            learnable = " learnable" if spec.learnable else ""
            encoding = " boundaries" if spec.encoding == "boundaries" else ""
            yield f"tensor     {spec.name}: {spec.kind.value}[{', '.join(spec.dims)}]{learnable}{encoding}"
        for number, values in enumerate(self.tables):
            yield f"table      {table_name(number)} = {list(values)}"
        for number, selection in enumerate(self.selections):
            yield f"selection  selected_{number}, m_{number} = {call_text('topk', selection_arguments(selection))}"
        for topk in self.chosen:
            yield f"blocks     {topk.name} = {text(topk)}"
        for name, node in self.expressions.items():
            yield f"{name:<10} = {program_text(node)}"


def table_name(number: int) -> str:
    """The tensor that holds the numbers of the ``number``-th ``per_head`` list."""
    return f"table_{number}"


def program_text(node: Node) -> str:
    """Text of a flattened expression, in which selections appear as ``selected_0`` and gates as ``m_0``."""
    return text(_with_names(node))


def _with_names(node: Node) -> Node:
    if isinstance(node, Selected):
        return _Name(f"selected_{node.number}", Kind.BOOL)
    if isinstance(node, Held | Own):
        return _Name(f"held_{node.number}" if isinstance(node, Held) else "own", Kind.BOOL)
    if isinstance(node, Gate):
        return _Name(f"{node.through}(m_{node.number})" if node.through else f"m_{node.number}", Kind.REAL)
    if isinstance(node, Chosen):
        return _Name(node.topk.name, Kind.BOOL)
    return rebuild(node, tuple(_with_names(c) for c in node.children))


class _Name(Symbol):
    """A printed name that is not a symbol of the language."""

    def __init__(self, name: str, kind: Kind) -> None:
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "_kind", kind)

    @property
    def kind(self) -> Kind:
        return self._kind  # type: ignore[attr-defined]
