"""A pattern at every (b, h, q, kv), node by node, for the dense oracle and for who asks about single pairs.

It shares nothing with the lowering beyond the expression nodes, and solves every prefix by sorting.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flexsparse.dense_selections import block_scores, capped_gates, finite_scores, sorted_gates, walk
from flexsparse.errors import CapturedError
from flexsparse.ir import nodes
from flexsparse.ir.nodes import (
    Apply,
    BlockTopK,
    Constant,
    Kind,
    Load,
    Named,
    Node,
    Opaque,
    PerHead,
    Scalar,
    Scored,
    SelectionNode,
    Sunk,
    Symbol,
)
from flexsparse.ir.scalars import number_of
from flexsparse.ir.text import text

# The meaning of every operation on tensors, by Python's rules for integers.
_MEANING: dict[str, Callable[..., Tensor]] = {
    **{op: getattr(torch, op) for op in ("eq", "ne", "lt", "le", "gt", "ge", "add", "sub", "mul", "neg")},
    **{op: getattr(torch, op) for op in ("minimum", "maximum", "abs", "where", "exp", "exp2", "log", "log2")},
    **{op: getattr(torch, op) for op in ("sqrt", "tanh", "cos", "sigmoid")},
    "and": torch.logical_and,
    "or": torch.logical_or,
    "xor": torch.logical_xor,
    "not": torch.logical_not,
    "div": torch.true_divide,
    "floordiv": torch.floor_divide,
    "mod": torch.remainder,
    "truncdiv": lambda x, y: torch.div(x, y, rounding_mode="trunc"),
    "truncmod": torch.fmod,
    "floor": lambda x: torch.floor(x).long(),
}


@dataclass(frozen=True)
class Dense:
    """A pattern at every (b, h, q, kv): its mask, what it does to a score, its gates, and its sink."""

    mask: Tensor
    score: Callable[[Tensor], Tensor]
    gate_k: Tensor
    gate_v: Tensor
    gate_logit: Tensor
    # One more logit in the softmax's denominator, [B or 1, H or 1, S_q or 1, 1] or of no dimension.
    sink: Tensor | None = None


@dataclass(frozen=True)
class DenseSizes:
    """The lengths and counts of one call, and where its first query stands."""

    batch: int
    heads: int
    q_len: int
    kv_len: int
    q_offset: int
    device: torch.device

    def grid(self, name: str) -> Tensor:
        """An index symbol, as a tensor that broadcasts to [B, H, S_q, S_kv]."""
        shape = {"b": (-1, 1, 1, 1), "h": (1, -1, 1, 1), "q": (1, 1, -1, 1), "kv": (1, 1, 1, -1)}[name]
        length = {"b": self.batch, "h": self.heads, "q": self.q_len, "kv": self.kv_len}[name]
        values = torch.arange(length, device=self.device).reshape(shape)
        return values + self.q_offset if name == "q" else values


class Evaluator:
    """What nodes mean for one call: of ``sizes``, with its captured tensors and numbers, and query and key if given."""

    def __init__(
        self, sizes: DenseSizes, captured: Mapping[str, Any], operands: tuple[Tensor, Tensor] | None = None
    ) -> None:
        self.sizes = sizes
        self.captured = captured
        self.operands = operands
        self.one = torch.ones((), dtype=torch.float64, device=sizes.device)
        # Tensors that are given as cumulative lengths; known from the whole pattern, which comes first.
        self.boundaries: frozenset[str] | None = None

    def pattern(self, node: Node) -> Dense:
        if self.boundaries is None:
            loads = [n.tensor for n in nodes.walk(node) if isinstance(n, Load)]
            self.boundaries = frozenset(spec.name for spec in loads if spec.encoding == "boundaries")
        match node:
            case Named():
                return self.pattern(node.body)
            case SelectionNode():
                return self.selection(node)
            case Scored(inner, expression):
                base = self.pattern(inner)
                return Dense(
                    base.mask,
                    lambda s: self.number(expression, base.score(s), torch.float64).to(self.sizes.device),
                    base.gate_k,
                    base.gate_v,
                    base.gate_logit,
                    base.sink,
                )
            case Sunk(inner, logit):
                # Two sinks in one pattern are equal: the language refuses others.
                return replace(self.pattern(inner), sink=self.number(logit, None, torch.float64))
            case Apply("and" | "or", (left, right)):
                combine = self.both if node.op == "and" else self.either
                return combine(self.pattern(left), self.pattern(right))
            case PerHead(entries) if node.kind is Kind.BOOL:
                return self.per_head([self.pattern(e) for e in entries])
        return Dense(self.mask(node), lambda s: s, self.one, self.one, self.one)

    def both(self, left: Dense, right: Dense) -> Dense:
        return Dense(
            left.mask & right.mask,
            lambda s: right.score(left.score(s)),
            left.gate_k * right.gate_k,
            left.gate_v * right.gate_v,
            left.gate_logit * right.gate_logit,
            right.sink if left.sink is None else left.sink,
        )

    def either(self, left: Dense, right: Dense) -> Dense:
        def larger(mine: Tensor, other: Tensor) -> Tensor:
            both = torch.where(mine >= other, mine, other)
            return torch.where(left.mask & right.mask, both, torch.where(left.mask, mine, other))

        return Dense(
            left.mask | right.mask,
            lambda s: torch.where(left.mask, left.score(s), right.score(s)),
            larger(left.gate_k, right.gate_k),
            larger(left.gate_v, right.gate_v),
            larger(left.gate_logit, right.gate_logit),
            right.sink if left.sink is None else left.sink,
        )

    def per_head(self, entries: list[Dense]) -> Dense:
        chosen = self.sizes.grid("h") * len(entries) // self.sizes.heads

        def pick(values: list[Tensor]) -> Tensor:
            result = values[-1]
            for position, value in enumerate(values[:-1]):
                result = torch.where(chosen == position, value, result)
            return result

        nothing = torch.tensor(-torch.inf, dtype=torch.float64, device=self.sizes.device)
        sinks = [nothing if e.sink is None else e.sink.to(nothing) for e in entries]
        return Dense(
            pick([e.mask for e in entries]),
            lambda s: pick([e.score(s) for e in entries]),
            pick([e.gate_k for e in entries]),
            pick([e.gate_v for e in entries]),
            pick([e.gate_logit for e in entries]),
            pick(sinks) if any(e.sink is not None for e in entries) else None,
        )

    def mask(self, node: Node) -> Tensor:
        # Reals inside a mask are float32 by definition, on every backend.
        return self.number(node, None, torch.float32).to(self.sizes.device)

    def number(self, node: Node, running: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The value of a plain mask or a number at every (b, h, q, kv)."""
        match node:
            case Constant(value):
                kind = {Kind.BOOL: torch.bool, Kind.INT: torch.int64, Kind.REAL: dtype}[node.kind]
                return torch.tensor(value, dtype=kind)
            case Symbol("score"):
                assert running is not None
                return running
            case Symbol(("b" | "h" | "q" | "kv") as name):
                return self.sizes.grid(name)
            case Symbol(name):
                size = self.sizes.heads if name == "heads" else getattr(self.sizes, name)
                # What is the same everywhere is computed on the host: in float64, a GPU's log2(8) is below 3.
                return torch.tensor(size)
            case Scalar(name, kind, default):
                number = number_of(node, self.captured.get(name, default))
                return torch.tensor(number, dtype=torch.int64 if kind is Kind.INT else dtype)
            case Named(_, _, body):
                return self.number(body, running, dtype)
            case Opaque(function, _, args):
                given = [self.number(a, running, dtype) for a in args]
                given += [self.sizes.grid(name) for name in ("b", "h", "q", "kv")]
                shape = torch.broadcast_shapes(*(x.shape for x in given))
                return torch.vmap(function)(*(x.expand(shape).flatten() for x in given)).reshape(shape)
            case Load(spec, index):
                tensor = self.tensor(spec.name, spec.value)
                if spec.encoding == "boundaries":
                    tensor = self.document_ids(tensor)
                if spec.encoding == "parents":
                    tensor = walk(tensor)
                while tensor.dim() < len(spec.dims):
                    tensor = tensor.unsqueeze(0)
                parts = [self.number(i, None, dtype) for i in index]
                at = tuple(p.clamp(max=n - 1) if n == 1 else p for p, n in zip(parts, tensor.shape, strict=True))
                loaded = tensor[at]
                return loaded.to(dtype) if spec.kind is Kind.REAL else loaded
            case BlockTopK():
                return self.blocks(node)
            case PerHead(entries):
                chosen = self.sizes.grid("h") * len(entries) // self.sizes.heads
                values = [self.number(e, running, dtype) for e in entries]
                result = values[-1]
                for position, entry in enumerate(values[:-1]):
                    result = torch.where(chosen == position, entry, result)
                return result
            case Apply(op, args):
                values = [self.number(a, running, dtype) for a in args]
                if node.kind is Kind.REAL or any(a.kind is Kind.REAL for a in args):
                    values = [v if v.dtype is torch.bool else v.to(dtype) for v in values]
                if op == "where":
                    values = [v.to(self.sizes.device) for v in values]
                return _MEANING[op](*values)
        raise AssertionError(f"no meaning for {type(node).__name__}")

    def count(self, number: int | Node) -> int:
        """What a selection is given: an integer, or an expression in numbers of the call."""
        return int(self.number(number, None, torch.float64)) if isinstance(number, Node) else number

    def document_ids(self, boundaries: Tensor) -> Tensor:
        """Cumulative lengths [N + 1] -> the id of each position's document."""
        positions = torch.arange(max(self.sizes.kv_len, self.sizes.q_len), device=boundaries.device)
        return (positions[:, None] >= boundaries[None, 1:]).sum(1)

    def tensor(self, name: str, value: Tensor | None = None) -> Tensor:
        """The captured tensor of that name, or the one that came with the expression."""
        if name not in self.captured:
            if value is not None:
                return value
            raise CapturedError(name, got="nothing", expected="a tensor", mend=f"Pass {name}=... to the call.")
        return self.captured[name]

    def blocks(self, node: BlockTopK) -> Tensor:
        """Every pair by counting, for each past block, the past blocks that come before it."""
        if self.operands is None:
            raise CapturedError(
                "query, key",
                got="nothing",
                expected=f"both, as the blocks of {text(node)} depend on them",
                mend="Pass query=... and key=... as well.",
            )
        query, key = (x.detach().double() for x in self.operands)
        key = key.repeat_interleave(self.sizes.heads // key.shape[1], 1)
        q, kv = self.sizes.grid("q"), self.sizes.grid("kv")
        scores = [block_scores(node.score, query, keys) for keys in key.split(node.block, 2)]
        own = (q // node.block).squeeze(-1)
        chosen = []
        for n, mine in enumerate(scores):
            before = torch.zeros_like(mine, dtype=torch.long)
            for m, other in enumerate(scores):
                wins = (other > mine) | (other == mine) if m < n else other > mine
                before += wins & (m < own)
            chosen.append((own == n) | ((n < own) & (before < node.k)))
        return torch.stack(chosen, -1)[..., kv.flatten() // node.block] & (kv <= q)

    def selection(self, node: SelectionNode) -> Dense:
        scores = self.tensor(node.scores).double()
        scores = scores.repeat_interleave(self.sizes.heads // scores.shape[1], 1)
        q, kv = self.sizes.grid("q"), self.sizes.grid("kv")
        k, after = self.count(node.k), self.count(node.after)
        candidate = kv <= q - after
        if node.segments is not None:
            ids = self.tensor(node.segments)
            ids = self.document_ids(ids) if node.segments in (self.boundaries or ()) else ids
            ids = ids.reshape(-1, 1, ids.shape[-1])
            candidate = candidate & (ids[:, :, q.flatten(), None] == ids[:, :, None, :])
        z = torch.where(candidate, scores.unsqueeze(2), -torch.inf)
        capped = node.gate == "capped_softmax"
        m, tau = (capped_gates if capped else sorted_gates)(z, k)
        # A stable descending sort puts the earlier key first on ties.
        order = z.sort(dim=-1, descending=True, stable=True).indices
        chosen = torch.zeros_like(z, dtype=torch.bool).scatter_(-1, order[..., :k], True) & (z > -torch.inf)
        through = node.gate.startswith("ste")
        if node.gate == "ste_identity":
            m = finite_scores(z)
        if node.gate == "ste_sigmoid":
            known = torch.isfinite(z) & torch.isfinite(tau)
            m = torch.where(known, torch.sigmoid(finite_scores(z) - finite_scores(tau)), 1.0)
        if through:
            m = 1 + (m - m.detach())
        on_k = m if through or node.gate in ("kv", "k", "capped_softmax") else self.one
        on_v = m if through or node.gate in ("kv", "v", "capped_softmax") else self.one
        return Dense(chosen, lambda s: s, on_k, on_v, m if node.gate == "logit" else self.one)
