"""Interval arithmetic on whole arrays of tiles: what an expression can be where q, kv lie in given ranges.

Numbers are intervals [low, high]; masks are the pair (must hold everywhere, may hold somewhere). Every rule is
sound: the true range lies inside. Captured tensors take part through range minima and maxima.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flexsparse.analysis.loads import load_bounds
from flexsparse.analysis.region import Bounds, Region
from flexsparse.ir.nodes import Apply, Constant, Kind, Load, Node, Opaque, Symbol
from flexsparse.ir.program import Chosen, Selected

_FAR = 1 << 40  # stands for an unbounded integer; products of two still fit int64 after clamping


def bounds(node: Node, region: Region) -> Bounds:
    """The bounds of a plain mask or number, or of a flattened mask, on every tile of the region."""
    match node:
        case Constant(value):
            dtype = {Kind.BOOL: torch.bool, Kind.INT: torch.int64, Kind.REAL: torch.float64}[node.kind]
            constant = torch.tensor(value, dtype=dtype, device=region.device)
            return Bounds(constant, constant)
        case Symbol(name) if name in region.ranges:
            return region.ranges[name]
        case Symbol("score"):
            return _unbounded(region, Kind.REAL)
        case Symbol(name):
            size = torch.tensor(region.sizes[name], device=region.device)
            return Bounds(size, size)
        case Load(spec, index):
            return load_bounds(region, spec.name, [bounds(i, region) for i in index], spec.kind)
        case Opaque(function, kind, args):
            return _opaque(function, kind, [bounds(a, region) for a in args], region)
        case Selected(number):
            return _selected(number, region)
        case Chosen(topk):
            return _chosen(region.tensors.get(f"{topk.name}_counts"), region)
        case Apply(op, args):
            parts = [bounds(a, region) for a in args]
            if node.kind is Kind.REAL or any(a.kind is Kind.REAL for a in args):
                parts = [p if a.kind is Kind.BOOL else _as_real(p) for p, a in zip(parts, args, strict=True)]
            return _RULES[op](*parts)
    raise AssertionError(f"no bounds for {type(node).__name__}")


def _as_real(x: Bounds) -> Bounds:
    return Bounds(x.low.double(), x.high.double())


def _unbounded(region: Region, kind: Kind) -> Bounds:
    far = float("inf") if kind is Kind.REAL else _FAR
    return Bounds(torch.tensor(-far, device=region.device), torch.tensor(far, device=region.device))


def _opaque(function: Callable[..., Any], kind: Kind, args: list[Bounds], region: Region) -> Bounds:
    """What is known of a function that could not be traced: its value at single elements, nothing on larger boxes."""
    if kind is Kind.BOOL and not args:
        ranges = [region.ranges[name] for name in ("b", "h", "q", "kv")]
        if all(r.low.dim() == 1 and torch.equal(r.low, r.high) for r in ranges):
            value = torch.vmap(function)(*(r.low for r in ranges))
            return Bounds(value, value)
        false = torch.zeros((), dtype=torch.bool, device=region.device)
        return Bounds(false, ~false)
    return _unbounded(region, Kind.REAL)


def _selected(number: int, region: Region) -> Bounds:
    """birth <= q < death, of the key kv in the row and head at hand."""
    group = region.tensors[f"group_{number}"]
    heads = region.ranges["h"]
    index = [region.ranges["b"], Bounds(heads.low // group, heads.high // group), region.ranges["kv"]]
    birth = load_bounds(region, f"birth_{number}", index, Kind.INT)
    death = load_bounds(region, f"death_{number}", index, Kind.INT)
    q = region.ranges["q"]
    return _and(_less_equal(birth, q), _less(q, death))


def _chosen(counts: Any, region: Region) -> Bounds:
    """Of blocks that queries chose, from what is known of their tiles; anything without that."""
    b, h, q, kv = (region.ranges[name] for name in ("b", "h", "q", "kv"))
    if counts is None or not (torch.equal(b.low, b.high) and torch.equal(h.low, h.high)):
        false = torch.zeros((), dtype=torch.bool, device=region.device)
        return Bounds(false, ~false)
    return Bounds(*counts.bounds(b.low, h.low, (q.low, q.high), (kv.low, kv.high)))


def _and(a: Bounds, b: Bounds) -> Bounds:
    return Bounds(a.low & b.low, a.high & b.high)


def _or(a: Bounds, b: Bounds) -> Bounds:
    return Bounds(a.low | b.low, a.high | b.high)


def _not(a: Bounds) -> Bounds:
    return Bounds(~a.high, ~a.low)


def _xor(a: Bounds, b: Bounds) -> Bounds:
    return _or(_and(a, _not(b)), _and(_not(a), b))


def _less(a: Bounds, b: Bounds) -> Bounds:
    return Bounds(a.high < b.low, a.low < b.high)


def _less_equal(a: Bounds, b: Bounds) -> Bounds:
    return Bounds(a.high <= b.low, a.low <= b.high)


def _equal(a: Bounds, b: Bounds) -> Bounds:
    same = (a.low == a.high) & (b.low == b.high) & (a.low == b.low)
    return Bounds(same, (a.low <= b.high) & (b.low <= a.high))


def _hull(candidates: list[Tensor]) -> Bounds:
    """From the least to the greatest candidate; NaN (0 times infinity, say) widens to everything."""
    low = functools.reduce(torch.minimum, candidates)
    high = low if len(candidates) == 1 else functools.reduce(torch.maximum, candidates)
    if low.is_floating_point():
        # minimum and maximum hand NaN on.
        unclear = torch.isnan(low)
        return Bounds(low.masked_fill(unclear, -torch.inf), high.masked_fill(unclear, torch.inf))
    low = low.clamp(-_FAR, _FAR)
    return Bounds(low, low if len(candidates) == 1 else high.clamp(-_FAR, _FAR))


def _ends(x: Bounds) -> tuple[Tensor, ...]:
    """The ends of an interval, once where they are one."""
    return (x.low,) if x.low is x.high else (x.low, x.high)


def _clear(low: Tensor, high: Tensor) -> Bounds:
    """Infinity less infinity is NaN, which could be anything."""
    if not low.is_floating_point():
        return Bounds(low, high)
    return Bounds(torch.where(low.isnan(), -torch.inf, low), torch.where(high.isnan(), torch.inf, high))


def _mul(a: Bounds, b: Bounds) -> Bounds:
    whole = not a.low.is_floating_point()
    # Products of integers beyond 2^31 could wrap: they may be anything.
    if whole and not all(torch.equal(x.clamp(-(1 << 31), 1 << 31), x) for x in (*_ends(a), *_ends(b))):
        far = torch.full_like(a.low * b.low, _FAR)
        return Bounds(-far, far)
    return _hull([x * y for x in _ends(a) for y in _ends(b)])


def _crosses_zero(b: Bounds) -> Tensor:
    return (b.low <= 0) & (b.high >= 0)


def _quotient(rounding: str | None) -> Callable[[Bounds, Bounds], Bounds]:
    def rule(a: Bounds, b: Bounds) -> Bounds:
        zero = _crosses_zero(b)
        divisors = [torch.where(zero, 1, end) for end in _ends(b)]
        result = _hull([torch.div(x, y, rounding_mode=rounding) for x in _ends(a) for y in divisors])
        far = torch.inf if result.low.is_floating_point() else _FAR
        return Bounds(torch.where(zero, -far, result.low), torch.where(zero, far, result.high))

    return rule


def _mod(a: Bounds, b: Bounds) -> Bounds:
    """Floor remainder: exact inside one period of a constant divisor, else between 0 and the divisor."""
    constant = (b.low == b.high) & (b.low != 0)
    divisor = torch.where(constant, b.low, 1)
    if a.low is a.high:
        one_period, inside = constant, [torch.remainder(a.low, divisor)] * 2
    else:
        first, last = (torch.div(end, divisor, rounding_mode="floor") for end in (a.low, a.high))
        # Where both ends lie in one period, what is left of each is its remainder.
        one_period, inside = constant & (first == last), [a.low - first * divisor, a.high - last * divisor]
    low, high = (b.low + 1).clamp(max=0), (b.high - 1).clamp(min=0)
    exact_low, exact_high = torch.minimum(*inside), torch.maximum(*inside)
    return Bounds(torch.where(one_period, exact_low, low), torch.where(one_period, exact_high, high))


def _truncmod(a: Bounds, b: Bounds) -> Bounds:
    """The remainder has the sign of the dividend and is smaller than the divisor and no larger than the dividend."""
    size = torch.maximum(b.low.abs(), b.high.abs()) - 1
    return Bounds(torch.maximum(a.low.clamp(max=0), -size), torch.minimum(a.high.clamp(min=0), size))


def _abs(a: Bounds) -> Bounds:
    least = torch.where(_crosses_zero(a), torch.zeros_like(a.low), torch.minimum(a.low.abs(), a.high.abs()))
    return Bounds(least, torch.maximum(a.low.abs(), a.high.abs()))


def _where(c: Bounds, a: Bounds, b: Bounds) -> Bounds:
    if a.low.dtype != b.low.dtype:
        a, b = _as_real(a), _as_real(b)
    low = torch.where(c.low, a.low, torch.where(c.high, torch.minimum(a.low, b.low), b.low))
    high = torch.where(c.low, a.high, torch.where(c.high, torch.maximum(a.high, b.high), b.high))
    return Bounds(low, high)


def _rising(function: Callable[[Tensor], Tensor], *, slack: float = 1e-6) -> Callable[[Bounds], Bounds]:
    """A function that never falls, widened by more than float32 evaluation can differ."""

    def rule(a: Bounds) -> Bounds:
        low, high = function(a.low), function(a.high)
        # Where part of the range is outside the domain, some values are NaN, and nothing is decided.
        undefined = torch.isnan(low) | torch.isnan(high)
        low = torch.nan_to_num(low - slack * (1 + low.abs()), nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        high = torch.nan_to_num(high + slack * (1 + high.abs()), nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
        return Bounds(low.masked_fill(undefined, -torch.inf), high.masked_fill(undefined, torch.inf))

    return rule


def _cos(a: Bounds) -> Bounds:
    """Exact to rounding at single points, between -1 and 1 elsewhere."""
    same = a.low == a.high
    low, high = torch.cos(a.low) - 1e-6, torch.cos(a.high) + 1e-6
    return Bounds(torch.where(same, low, -1.000001), torch.where(same, high, 1.000001))


def _floor(a: Bounds) -> Bounds:
    near = [x.clamp(-float(_FAR), float(_FAR)).floor().long() for x in (a.low, a.high)]
    return Bounds(*near)


_RULES: dict[str, Callable[..., Any]] = {
    "and": _and,
    "or": _or,
    "not": _not,
    "xor": _xor,
    "eq": _equal,
    "ne": lambda a, b: _not(_equal(a, b)),
    "lt": _less,
    "le": _less_equal,
    "gt": lambda a, b: _less(b, a),
    "ge": lambda a, b: _less_equal(b, a),
    "add": lambda a, b: _clear(a.low + b.low, a.high + b.high),
    "sub": lambda a, b: _clear(a.low - b.high, a.high - b.low),
    "mul": _mul,
    "div": _quotient(None),
    "floordiv": _quotient("floor"),
    "truncdiv": _quotient("trunc"),
    "mod": _mod,
    "truncmod": _truncmod,
    "neg": lambda a: Bounds(-a.high, -a.low),
    "abs": _abs,
    "minimum": lambda a, b: Bounds(torch.minimum(a.low, b.low), torch.minimum(a.high, b.high)),
    "maximum": lambda a, b: Bounds(torch.maximum(a.low, b.low), torch.maximum(a.high, b.high)),
    "where": _where,
    **{name: _rising(getattr(torch, name)) for name in ("exp", "exp2", "log", "log2", "sqrt", "tanh", "sigmoid")},
    "cos": _cos,
    "floor": _floor,
}
