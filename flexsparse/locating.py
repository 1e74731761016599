"""Why an element is wrong: at which key backend and oracle part, and in which sub-expression of the pattern.

First the generated functions are evaluated beside the oracle, in float64, for the one query; where they part, the
smallest sub-expression that parts by itself is looked for. Where they agree, the backend's own work is looked at from
outside: with values that are 1 at one key and 0 elsewhere, its output is the weight of that key.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flexsparse.analysis.tiles import EMPTY
from flexsparse.compiler import CompiledAttention
from flexsparse.dense_evaluator import DenseSizes, Evaluator
from flexsparse.errors import FlexsparseError
from flexsparse.execution import Runner
from flexsparse.ir.nodes import (
    Apply,
    Constant,
    Kind,
    Named,
    Node,
    PerHead,
    Scored,
    SelectionNode,
    Sunk,
    Symbol,
    is_plain,
    walk,
)
from flexsparse.ir.text import text
from flexsparse.numbered import at_defaults
from flexsparse.pipeline import Bound, bind_call, compile_pattern
from flexsparse.runtime.inputs import check_scale, shapes_of
from flexsparse.settings import Settings
from flexsparse.tolerance import Call, Run

# Two evaluations of one expression in float64 agree this well.
_RELATIVE, _ABSOLUTE = 1e-6, 1e-9
_WORDS = {True: "seen", False: "hidden"}


@dataclass(frozen=True)
class Cause:
    """Where a wrong element comes from.

    ``part`` is "mask", "score", "gate on V", "sink", "tiles" (a tile was classified wrongly) or "arithmetic" (pattern
    and functions agree with the oracle; the backend computes something else). ``expression`` is the smallest
    sub-expression that disagrees, or the parts of the pattern that decide; "" where that does not apply. ``kv`` is the
    first key at which it shows, None where it is no key's; ``expected`` and ``got`` are what the oracle and the code
    say of it there: whether it is seen, its score, its gate or its weight.
    """

    part: str
    expression: str
    kv: int | None
    expected: float
    got: float
    says: str

    def __str__(self) -> str:
        return self.says


def find_cause(attention: CompiledAttention, run: Run, call: Call, b: int, h: int, q: int) -> Cause | None:
    """Why ``run``, which should be ``attention``, is wrong at [b, h, q]; None where no cause can be found.

    Materialises every score as the oracle does, and calls ``run`` once for each value_dim keys.
    """
    row = _Row(attention, call.cast(torch.float64), b, h, q)
    return row.of_functions() or row.of_tiles() or row.of_weights(run, call)


class _Row:
    """One query, as the oracle and as the generated functions see it, in float64."""

    def __init__(self, attention: CompiledAttention, call: Call, b: int, h: int, q: int) -> None:
        self.node, self.call, self.at = at_defaults(attention.pattern.node), call, (b, h, q)
        self.scale = check_scale(call.scale, call.query.shape[-1])
        shapes = shapes_of(call.query, call.key, call.value, 0)
        self.kv_len, self.block = shapes.kv_len, attention.settings.block_size
        sizes = DenseSizes(shapes.batch, shapes.heads, shapes.q_len, shapes.kv_len, 0, shapes.device)
        self.shapes, self.evaluator = shapes, Evaluator(sizes, call.captured, (call.query, call.key))
        self.dense = self.evaluator.pattern(self.node)
        keys = call.key.repeat_interleave(shapes.heads // shapes.kv_heads, 1)
        self.raw = call.query @ keys.transpose(-1, -2) * self.scale
        self.seen = self.here(self.dense.mask)
        self.score = self.here(self.dense.score(self.raw * self.dense.gate_k)) + self.here(self.dense.gate_logit).log()
        self.gate_v = self.here(self.dense.gate_v)
        self.functions, self.bound = self.built(self.node)

    def here(self, x: Tensor) -> Tensor:
        """What broadcasts to [B, H, S_q, S_kv], for this query: [S_kv]."""
        return x.expand(self.raw.shape)[self.at]

    def built(self, node: Node) -> tuple[dict[str, Any], Bound]:
        """The generated functions of a pattern, of the same tensors, and what they were built from."""
        compiled, settings = compile_pattern(node), Settings("chunked", block_size=self.block)
        program = compiled.program
        names = {spec.name for spec in program.tensors} | {s.scores for s in program.selections}
        names |= {s.segments for s in program.selections if s.segments is not None}
        captured = {name: tensor for name, tensor in self.call.captured.items() if name in names}
        operands = (self.call.query, self.call.key)
        bound = bind_call(compiled, self.shapes, captured, settings, operands=operands, validate=False)
        work, tensors = Runner(node, program, settings).work_of(bound, self.scale)
        return work.functions(tensors, broadcast=True), bound

    @property
    def places(self) -> list[Tensor]:
        """b, h, q and kv, as the generated functions take them."""
        device = self.raw.device
        ones = [torch.tensor([[[[index]]]], device=device) for index in self.at]
        return [*ones, torch.arange(self.kv_len, device=device).view(1, 1, 1, -1)]

    def called(self, function: Callable[..., Tensor], *first: Tensor) -> Tensor:
        return function(*first, *self.places).expand(1, 1, 1, self.kv_len).flatten()

    # What the functions say.

    def of_functions(self) -> Cause | None:
        """The first key at which mask, score, gate on V or sink of the generated functions is not the oracle's."""
        seen = self.called(self.functions["mask_mod"])
        kv = _first(seen != self.seen)
        if kv is not None:
            return self._mask_cause(kv, bool(seen[kv]))
        raw = self.raw[self.at].view(1, 1, 1, -1)
        score = self.functions["score_mod"]
        found = raw.flatten() if score is None else self.called(score, raw)
        kv = _first(self.seen & ~_close(found.double(), self.score))
        if kv is not None:
            return self._score_cause(kv, float(found[kv]))
        gate = self.functions["value_gate"]
        weights = torch.ones_like(self.gate_v) if gate is None else self.called(gate).double()
        kv = _first(self.seen & ~_close(weights, self.gate_v))
        if kv is not None:
            there = (float(self.gate_v[kv]), float(weights[kv]))
            return Cause("gate on V", "", kv, *there, _at(kv, "the gate on V", "", *there))
        return self._sink_cause()

    def _mask_cause(self, kv: int, got: bool) -> Cause:
        culprit = self._culprit(self.node, kv)
        if culprit is None or culprit == self.node:
            parts = " and ".join(self.deciding(self.node, kv))
            said = f"each part agrees by itself; {parts} decides" if culprit is None or _composed(culprit) else ""
            says = _at(kv, "the mask", text(self.node), not got, got) + (f" ({said})" if said else "")
            return Cause("mask", parts, kv, float(not got), float(got), says)
        mine, theirs = self._values(culprit, kv)
        told = (bool(mine), bool(theirs)) if culprit.kind is Kind.BOOL else (mine, theirs)
        return Cause("mask", text(culprit), kv, mine, theirs, _at(kv, "in the mask,", text(culprit), *told))

    def _score_cause(self, kv: int, got: float) -> Cause:
        for expression in _score_expressions(self.node):
            culprit = self._culprit(expression, kv)
            if culprit is not None:
                mine, theirs = self._values(culprit, kv)
                says = _at(kv, "in the score,", text(culprit), mine, theirs)
                return Cause("score", text(culprit), kv, mine, theirs, says)
        expected = float(self.score[kv])
        whole = "; ".join(text(e) for e in _score_expressions(self.node))
        says = _at(kv, "the score", whole, expected, got) + " (each part agrees by itself)"
        return Cause("score", whole, kv, expected, got, says)

    def _sink_cause(self) -> Cause | None:
        if self.dense.sink is None:
            return None
        expected = self.dense.sink.expand(*self.raw.shape[:3], 1)[self.at]
        like = torch.zeros(1, 1, 1, dtype=torch.float64, device=self.raw.device)
        got = self.functions["sink_logit"](like, *(place[0] for place in self.places[:3])).double().flatten()
        if _close(got, expected.double()).all():
            return None
        logit = next((text(n.logit) for n in walk(self.node) if isinstance(n, Sunk)), "")
        there = (float(expected), float(got[0]))
        says = f"the sink's logit {logit}: expected {there[0]:.6g}, got {there[1]:.6g}"
        return Cause("sink", logit, None, *there, says)

    def _culprit(self, node: Node, kv: int) -> Node | None:
        """The smallest sub-expression that disagrees with the oracle when it is compiled by itself."""
        if isinstance(node, Constant | Symbol) or self._agrees(node, kv):
            return None
        for child in node.children:
            found = self._culprit(child, kv)
            if found is not None:
                return found
        return node

    def _agrees(self, node: Node, kv: int) -> bool:
        try:
            mine, theirs = self._values(node, kv)
        except (FlexsparseError, AssertionError, ArithmeticError):
            # Not everything inside of an expression can stand alone.
            return True
        return bool(_close(torch.tensor(mine), torch.tensor(theirs)))

    def _values(self, node: Node, kv: int) -> tuple[float, float]:
        """A sub-expression at one key: the oracle's value, and that of the function generated for it alone."""
        if node.kind is Kind.BOOL:
            mine = self.here(self.evaluator.pattern(node).mask)
            theirs = self.called(self.built(node)[0]["mask_mod"])
        else:
            mine = self.here(self.evaluator.number(node, self.raw, torch.float64).to(self.raw.device))
            score = self.built(Scored(Constant(True), node))[0]["score_mod"]
            raw = self.raw[self.at]
            theirs = raw if score is None else self.called(score, raw.view(1, 1, 1, -1))
        return float(mine[kv]), float(theirs[kv])

    def deciding(self, node: Node, kv: int) -> list[str]:
        """The parts of a mask that make it what it is at a key, by the oracle."""
        match node:
            case Named(_, _, body) if not is_plain(body) and not isinstance(body, SelectionNode):
                return self.deciding(body, kv)
            case Scored(inner, _) | Sunk(inner, _):
                return self.deciding(inner, kv)
            case PerHead(entries):
                return self.deciding(entries[self.at[1] * len(entries) // self.shapes.heads], kv)
            case Apply("and" | "or" as op, args):
                values = [bool(self.here(self.evaluator.pattern(a).mask)[kv]) for a in args]
                decides = op == "or"
                telling = [a for a, value in zip(args, values, strict=True) if value is decides] or list(args)
                return list(dict.fromkeys(part for a in telling for part in self.deciding(a, kv)))
        return [text(node)]

    # What the backend does.

    def of_tiles(self) -> Cause | None:
        """The first key that the oracle shows in a tile that was classified as empty."""
        tiles, (b, h, q) = self.bound.tiles, self.at
        kinds = tiles.kinds[b if tiles.kinds.shape[0] > 1 else 0, h if tiles.kinds.shape[1] > 1 else 0]
        row = kinds[q // tiles.block].repeat_interleave(tiles.block)[: self.kv_len]
        kv = _first(self.seen & (row == EMPTY).to(self.seen.device))
        if kv is None:
            return None
        parts = " and ".join(self.deciding(self.node, kv))
        first = [tiles.block * (n // tiles.block) for n in (q, kv)]
        says = f"key kv={kv}: expected seen by {parts}, got a tile that is left out, of {tiles.block} from {first}"
        return Cause("tiles", parts, kv, 1.0, 0.0, says)

    def of_weights(self, run: Run, call: Call) -> Cause:
        """The key whose weight is most wrong, by what the backend makes of values that are 1 at one key."""
        untouched = _with_values(run, call, torch.zeros_like(call.value))[self.at]
        if bool((untouched != 0).any()):
            found = float(untouched[untouched != 0][0])
            says = f"[b={self.at[0]}, h={self.at[1]}, q={self.at[2]}]: no key is to blame: where every value is 0, got "
            return Cause("arithmetic", "", None, 0.0, found, f"{says}{found:.6g}")
        got, expected = _weights(run, call, self.at), self.weights()
        sees = (got != 0) & ~got.isnan()
        kv = _first(sees & ~self.seen)
        # A weight may be too small for the dtype; one that is not is no rounding.
        kv = _first(~sees & (expected > torch.finfo(call.query.dtype).eps)) if kv is None else kv
        if kv is not None:
            parts = " and ".join(self.deciding(self.node, kv))
            told = (bool(self.seen[kv]), bool(sees[kv]))
            says = _at(kv, "the backend's mask; the generated one is right and", parts, *told)
            return Cause("mask", parts, kv, float(told[0]), float(told[1]), says)
        apart = (got - expected).abs().nan_to_num(nan=math.inf)
        if float(apart.max()) <= 16 * torch.finfo(call.query.dtype).eps * float(expected.max()):
            says = "pattern and weights of all keys agree with the oracle; what the backend does with them differs"
            return Cause("arithmetic", "", None, math.nan, math.nan, says)
        # By ratio: where one score is wrong, all weights move together and one moves against them.
        ratio = (got.log() - expected.log()).nan_to_num(nan=0.0)[self.seen]
        centre = ratio - ratio.median()
        keys = self.seen.nonzero().flatten()
        kv = _first(~torch.isfinite(got))
        kv = int(keys[int(centre.abs().argmax())]) if kv is None else kv
        there = (float(expected[kv]), float(got[kv]))
        says = _at(kv, "pattern and functions agree with the oracle; the backend's weight of", "it", *there)
        return Cause("arithmetic", "", kv, *there, says)

    def weights(self) -> Tensor:
        """The oracle's weights of this query, gates on V included: [S_kv]."""
        scores = torch.where(self.seen, self.score, -torch.inf)
        sink = None if self.dense.sink is None else self.dense.sink.expand(*self.raw.shape[:3], 1)[self.at].double()
        columns = scores if sink is None else torch.cat((scores, sink))
        found = torch.softmax(columns, -1)[: self.kv_len].nan_to_num(nan=0.0)
        return torch.where(self.seen, found * self.gate_v, 0.0)


@torch.no_grad()
def _with_values(run: Run, call: Call, value: Tensor) -> Tensor:
    out: Tensor = run(call.query, call.key, value, scale=call.scale, return_lse=True, **call.captured)[0]
    return out


def _weights(run: Run, call: Call, at: tuple[int, int, int]) -> Tensor:
    """What ``run`` makes of each key, [S_kv] float64: with values that are 1 at one key, value_dim keys at a time."""
    kv_len, width = call.value.shape[2:]
    found = []
    for first in range(0, kv_len, width):
        value = torch.zeros_like(call.value)
        count = min(width, kv_len - first)
        value[:, :, first : first + count, :count] = torch.eye(count).to(value)
        found.append(_with_values(run, call, value)[at][:count].double())
    return torch.cat(found)


def _score_expressions(node: Node) -> list[Node]:
    return [n.expression for n in walk(node) if isinstance(n, Scored)]


def _composed(node: Node) -> bool:
    """Whether a pattern consists of others."""
    patterns = isinstance(node, Scored | Sunk | PerHead) or (isinstance(node, Apply) and node.op in ("and", "or"))
    return patterns or (isinstance(node, Named) and _composed(node.body))


def _close(x: Tensor, y: Tensor) -> Tensor:
    return torch.isclose(x, y, rtol=_RELATIVE, atol=_ABSOLUTE, equal_nan=True)


def _first(wrong: Tensor) -> int | None:
    found = wrong.nonzero()
    return int(found[0]) if len(found) else None


def _at(kv: int, what: str, expression: str, expected: float, got: float) -> str:
    told = [_WORDS[x] if isinstance(x, bool) else f"{x:.6g}" for x in (expected, got)]
    about = " ".join(part for part in (what, expression) if part)
    return f"key kv={kv}: {about}: expected {told[0]}, got {told[1]}"
