"""Frozen, typed expression nodes and the table of operations; no behaviour beyond construction.

Every node has a ``kind``: INT for index arithmetic, REAL for scores, BOOL for masks and patterns.
The language wraps these nodes to give them operators; all later stages work on the nodes themselves.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias


class Kind(enum.Enum):
    """What a node evaluates to."""

    INT = "int"
    REAL = "real"
    BOOL = "bool"


class Node:
    """Base of all nodes. Subclasses are frozen dataclasses, so equality and hash are structural."""

    __slots__ = ()

    @property
    def kind(self) -> Kind:
        raise AttributeError(f"{type(self).__name__} has no kind")  # every subclass defines it

    @property
    def children(self) -> tuple[Node, ...]:
        return ()


@dataclass(frozen=True)
class Constant(Node):
    value: int | float | bool

    @property
    def kind(self) -> Kind:
        if isinstance(self.value, bool):
            return Kind.BOOL
        return Kind.INT if isinstance(self.value, int) else Kind.REAL

    # Python has 1 == 1.0 == True; constants of different kinds are different nodes.
    def __eq__(self, other: object) -> bool:
        return isinstance(other, Constant) and self.kind is other.kind and self.value == other.value

    def __hash__(self) -> int:
        return hash((Constant, self.kind, self.value))


@dataclass(frozen=True)
class Symbol(Node):
    """One of SYMBOLS: an index, a size, or the running score."""

    name: str

    @property
    def kind(self) -> Kind:
        return SYMBOLS[self.name]


INDEX_SYMBOLS = ("b", "h", "q", "kv")
SIZE_SYMBOLS = ("q_len", "kv_len", "heads")
# The children of what changes with every index.
PLACE: tuple[Node, ...] = tuple(Symbol(name) for name in INDEX_SYMBOLS)
SYMBOLS = {**dict.fromkeys((*INDEX_SYMBOLS, *SIZE_SYMBOLS), Kind.INT), "score": Kind.REAL}


@dataclass(frozen=True)
class Scalar(Node):
    """A number that the call gives by keyword, the same for every pair; ``default`` where the call gives none.

    What is compiled has no default: its numbers come with each call, and are part of no text and of no kernel.
    """

    name: str
    of: Kind
    default: int | float | None = None

    @property
    def kind(self) -> Kind:
        return self.of


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that the caller gives by keyword: its name, the meaning of each dimension, and its kind.

    ``dims`` holds "b" (batch), "h" (query heads), "s" (key length, which equals the query length in
    self-attention), "q" (query length) and free names. ``encoding`` is "values", or "boundaries" for
    cumulative sequence lengths, which the runtime turns into one segment id for each position, or "parents" for the
    parents of a tree's tokens, which it turns into where a depth-first walk enters and leaves each token.
    """

    name: str
    dims: tuple[str, ...]
    kind: Kind = Kind.INT
    learnable: bool = False
    encoding: str = "values"
    # A tensor that came with the expression (``from_flex``); a call may give another. Not part of equality.
    value: Any = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Opaque(Node):
    """A function of (b, h, q, kv), or of (score, b, h, q, kv), that could not be traced; it runs as it is.

    ``args`` is (score,) or (); ``reason`` says what tracing met.
    """

    function: Callable[..., Any]
    of: Kind
    args: tuple[Node, ...] = ()
    reason: str = field(default="", compare=False)

    @property
    def kind(self) -> Kind:
        return self.of

    @property
    def children(self) -> tuple[Node, ...]:
        return self.args


@dataclass(frozen=True)
class Load(Node):
    tensor: TensorSpec
    index: tuple[Node, ...]

    @property
    def kind(self) -> Kind:
        return self.tensor.kind

    @property
    def children(self) -> tuple[Node, ...]:
        return self.index


@dataclass(frozen=True)
class Apply(Node):
    """An operation of OPERATIONS on its arguments."""

    op: str
    args: tuple[Node, ...]

    # Asked for at every call, and the same for as long as the process lives: expressions are deep.
    def __hash__(self) -> int:
        found: int | None = self.__dict__.get("_hash")
        if found is None:
            found = hash((Apply, self.op, self.args))
            object.__setattr__(self, "_hash", found)
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {"op": self.op, "args": self.args}

    @property
    def kind(self) -> Kind:
        return OPERATIONS[self.op].result(tuple(a.kind for a in self.args))

    @property
    def children(self) -> tuple[Node, ...]:
        return self.args


@dataclass(frozen=True)
class PerHead(Node):
    """Entry ``h * len(entries) // heads``: contiguous groups of query heads share an entry."""

    entries: tuple[Node, ...]

    @property
    def kind(self) -> Kind:
        kinds = {entry.kind for entry in self.entries}
        return kinds.pop() if len(kinds) == 1 else Kind.REAL

    @property
    def children(self) -> tuple[Node, ...]:
        return self.entries


GATES = ("kv", "k", "v", "logit", "none", "ste", "ste_identity", "ste_sigmoid", "capped_softmax")


# An integer, or until a call gives its numbers an expression in scalars.
Count: TypeAlias = Any


@dataclass(frozen=True)
class SelectionNode(Node):
    """The hard top-k of the causal prefix by query-independent scores, with soft gates."""

    k: Count
    after: Count = 0
    scores: str = "scores"
    segments: str | None = None
    gate: str = "none"

    @property
    def kind(self) -> Kind:
        return Kind.BOOL

    @property
    def children(self) -> tuple[Node, ...]:
        return tuple(count for count in (self.k, self.after) if isinstance(count, Node))


BLOCK_SCORES = ("mean", "bounds")


@dataclass(frozen=True)
class BlockTopK(Node):
    """The keys up to the query in its own block, and the k past blocks of keys that score highest for the query.

    Its blocks are chosen at the call, from query and key. ``score`` is one of BLOCK_SCORES.
    """

    k: int
    block: int
    score: str = "mean"

    @property
    def kind(self) -> Kind:
        return Kind.BOOL

    @property
    def children(self) -> tuple[Node, ...]:
        return PLACE

    @property
    def name(self) -> str:
        """The name of the tensor that says which blocks each query chose."""
        return f"chosen_{self.score}_{self.block}_{self.k}"


@dataclass(frozen=True)
class Scored(Node):
    """A pattern whose running score is replaced by ``expression``, in which it appears as ``score``."""

    pattern: Node
    expression: Node

    @property
    def kind(self) -> Kind:
        return Kind.BOOL

    @property
    def children(self) -> tuple[Node, ...]:
        return (self.pattern, self.expression)


@dataclass(frozen=True)
class Sunk(Node):
    """A pattern whose softmax also counts ``logit``: one more term in the denominator, without a key or a value.

    ``logit`` is a number in b, h, q and sizes; -inf counts nothing. Score expressions never act on it.
    """

    pattern: Node
    logit: Node

    @property
    def kind(self) -> Kind:
        return Kind.BOOL

    @property
    def children(self) -> tuple[Node, ...]:
        return (self.pattern, self.logit)


@dataclass(frozen=True)
class Named(Node):
    """``body`` under the name and the arguments by which it was written; transparent to every analysis."""

    name: str
    arguments: tuple[tuple[str, object], ...]
    body: Node

    @property
    def kind(self) -> Kind:
        return self.body.kind

    @property
    def children(self) -> tuple[Node, ...]:
        return (self.body,)


@dataclass(frozen=True)
class Operation:
    """One row of the operation table. ``symbol`` is the infix or prefix operator, empty for a function."""

    name: str
    arity: int
    result: Callable[[tuple[Kind, ...]], Kind]
    symbol: str = ""
    precedence: int = 10


def _numeric(kinds: tuple[Kind, ...]) -> Kind:
    return Kind.INT if all(k is Kind.INT for k in kinds) else Kind.REAL


def _real(kinds: tuple[Kind, ...]) -> Kind:
    return Kind.REAL


def _int(kinds: tuple[Kind, ...]) -> Kind:
    return Kind.INT


def _bool(kinds: tuple[Kind, ...]) -> Kind:
    return Kind.BOOL


def _branches(kinds: tuple[Kind, ...]) -> Kind:
    return _numeric(kinds[1:])


# Precedence is Python's: comparisons bind loosest, then | ^ & + * and the unary operators.
OPERATIONS = {
    op.name: op
    for op in (
        Operation("eq", 2, _bool, "==", 1),
        Operation("ne", 2, _bool, "!=", 1),
        Operation("lt", 2, _bool, "<", 1),
        Operation("le", 2, _bool, "<=", 1),
        Operation("gt", 2, _bool, ">", 1),
        Operation("ge", 2, _bool, ">=", 1),
        Operation("or", 2, _bool, "|", 2),
        Operation("xor", 2, _bool, "^", 3),
        Operation("and", 2, _bool, "&", 4),
        Operation("add", 2, _numeric, "+", 6),
        Operation("sub", 2, _numeric, "-", 6),
        Operation("mul", 2, _numeric, "*", 7),
        Operation("div", 2, _real, "/", 7),
        Operation("floordiv", 2, _int, "//", 7),
        Operation("mod", 2, _int, "%", 7),
        Operation("neg", 1, _numeric, "-", 8),
        Operation("not", 1, _bool, "~", 8),
        Operation("truncdiv", 2, _int),
        Operation("truncmod", 2, _int),
        Operation("minimum", 2, _numeric),
        Operation("maximum", 2, _numeric),
        Operation("abs", 1, _numeric),
        Operation("where", 3, _branches),
        Operation("exp", 1, _real),
        Operation("exp2", 1, _real),
        Operation("log", 1, _real),
        Operation("log2", 1, _real),
        Operation("sqrt", 1, _real),
        Operation("tanh", 1, _real),
        Operation("cos", 1, _real),
        Operation("sigmoid", 1, _real),
        Operation("floor", 1, _int),
    )
}
COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")

TRUE = Constant(True)
FALSE = Constant(False)


def walk(node: Node) -> Iterator[Node]:
    """The node and everything below it, parents first."""
    stack = [node]
    while stack:
        current = stack.pop()
        yield current
        stack.extend(reversed(current.children))


def rebuild(node: Node, children: tuple[Node, ...]) -> Node:
    """The same node over other children, which come in the order of ``node.children``."""
    if children == node.children:
        return node
    if isinstance(node, Apply):
        return Apply(node.op, children)
    if isinstance(node, Load):
        return Load(node.tensor, children)
    if isinstance(node, Opaque):
        return Opaque(node.function, node.of, children, node.reason)
    if isinstance(node, PerHead):
        return PerHead(children)
    if isinstance(node, Scored):
        return Scored(*children)
    if isinstance(node, Sunk):
        return Sunk(*children)
    if isinstance(node, Named):
        return Named(node.name, node.arguments, children[0])
    if isinstance(node, SelectionNode):
        counts = iter(children)
        k, after = (next(counts) if isinstance(count, Node) else count for count in (node.k, node.after))
        return replace(node, k=k, after=after)
    raise AssertionError(f"{type(node).__name__} has no children")


def replaced(node: Node, known: Mapping[Node, Node]) -> Node:
    """The expression with some of its parts exchanged; what comes in place of one is left as it is."""
    if node in known:
        return known[node]
    return rebuild(node, tuple(replaced(child, known) for child in node.children))


def is_plain(node: Node) -> bool:
    """Whether a BOOL node is a mask alone: no selection, no score of its own, no sink."""
    return not any(isinstance(n, SelectionNode | Scored | Sunk) for n in walk(node))


def mentions(node: Node, *names: str) -> bool:
    """Whether any of the named symbols occurs."""
    return any(isinstance(n, Symbol) and n.name in names for n in walk(node))


def depends_on(node: Node, *names: str) -> bool:
    """Whether the value can change with any of the named symbols; an opaque function depends on every index."""
    return mentions(node, *names) or any(isinstance(n, Opaque) for n in walk(node))
