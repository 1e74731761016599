"""``check``: attention against the oracle, against itself, on NaN and on rows that see no key; what is wrong, where."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from flexsparse.compiler import CompiledAttention, compile
from flexsparse.dense import dense_mask
from flexsparse.errors import NonFiniteScoresError
from flexsparse.example_inputs import learned_names
from flexsparse.expression import Pattern
from flexsparse.ir.scalars import scalars_of
from flexsparse.locating import Cause, find_cause
from flexsparse.row_lengths import LENGTHS, names_lengths
from flexsparse.runtime.inputs import check_scale, shapes_of, with_values
from flexsparse.runtime.numbers import split_numbers
from flexsparse.tolerance import Call, Comparison, Run, evaluate, judge

_DIMS = {
    "out": ("b", "h", "q", "d"),
    "lse": ("b", "h", "q"),
    "d query": ("b", "h", "q", "d"),
    "d key": ("b", "kv_head", "kv", "d"),
    "d value": ("b", "kv_head", "kv", "d"),
}


@dataclass(frozen=True)
class Element:
    """One element of a result: its place by dimension, what it should be, and what it is."""

    result: str
    at: Mapping[str, int]
    expected: float
    got: float

    def __str__(self) -> str:
        place = ", ".join(f"{dim}={index}" for dim, index in self.at.items())
        return f"{self.result}[{place}]: expected {self.expected:.6g}, got {self.got:.6g}"


@dataclass(frozen=True)
class Checked:
    """What was found in one call.

    ``comparisons`` has each result with its largest error and what is allowed; ``wrong`` the first wrong element of
    each result that fails; ``cause`` why the first of those in out or lse is wrong; ``changed`` the first element of
    each result that two runs gave different bits (expected is the first run's), of which ``excused`` names those that
    the plan does not promise; ``empty_wrong`` the results that are not 0 in the ``empty_rows`` rows that see no key;
    ``nan_wrong`` what a NaN in the input did that it should not.
    """

    pattern: str
    dtype: torch.dtype
    length: int
    backend: str
    comparisons: tuple[Comparison, ...]
    wrong: tuple[Element, ...]
    cause: Cause | None
    changed: tuple[Element, ...]
    excused: tuple[str, ...]
    empty_rows: int
    empty_wrong: tuple[str, ...]
    nan_wrong: tuple[str, ...]

    @property
    def holds(self) -> bool:
        """Every error allowed, two runs alike but for what the plan excuses, empty rows and NaN as defined."""
        unexpected = {e.result for e in self.changed} - set(self.excused)
        return all(c.holds for c in self.comparisons) and not (unexpected or self.empty_wrong or self.nan_wrong)

    def __bool__(self) -> bool:
        return self.holds

    def __str__(self) -> str:
        """One line that says whether it holds, then one for each thing that is wrong."""
        head = f"{self.pattern} by {self.backend}, {dtype_name(self.dtype)}, {self.length} queries"
        return "\n  ".join((f"{head}: {'holds' if self.holds else 'FAILS'}", *self.lines()))

    def lines(self) -> list[str]:
        """What is wrong, a line each."""
        counts = {c.name: c for c in self.comparisons}
        found = []
        for element in self.wrong:
            c = counts[element.result]
            found.append(f"{element}, allowed {c.allowed:.2g} apart; {c.wrong:,} elements are wrong")
        found[1:1] = [f"because at {self.cause}"] if self.cause is not None else []
        found += [f"{c.name}: its shape is wrong" for c in self.comparisons if not c.holds and c.first is None]
        found += [f"two runs differ: {e}" for e in self.changed if e.result not in self.excused]
        found += [f"{name} is not 0 in rows that see no key" for name in self.empty_wrong]
        return found + list(self.nan_wrong)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {
            "dtype": dtype_name(self.dtype),
            "length": self.length,
            "backend": self.backend,
            "results": [
                {"name": c.name, "error": c.error, "allowed": c.allowed, "wrong": c.wrong, "holds": c.holds}
                for c in self.comparisons
            ],
            "first_wrong": [asdict(e) for e in self.wrong],
            "cause": None if self.cause is None else asdict(self.cause),
            "changed_between_runs": [e.result for e in self.changed],
            "first_changed": [asdict(e) for e in self.changed],
            "allowed_to_change": list(self.excused),
            "empty_rows": self.empty_rows,
            "empty_rows_wrong": list(self.empty_wrong),
            "nan_wrong": list(self.nan_wrong),
            "holds": self.holds,
        }


def check(
    attention: CompiledAttention | Pattern | str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    run: Run | None = None,
    scale: float | None = None,
    seed: int = 0,
    **captured: Tensor | int | float,
) -> Checked:
    """Check attention under a pattern on these tensors against the dense float64 oracle; for tests of your own.

    query [B, H, S_q, D], key [B, H_kv, S_kv, D], value [B, H_kv, S_kv, D_v] and captured tensors as in a call. Compared
    are out, lse and the gradients of query, key, value, selection scores and learnable tensors, for random gradients
    from ``seed``; two runs must give the same bits; rows that see no key give 0; a NaN stays in its row, is not
    swallowed, and is refused in scores. Allowed is twice the error of PyTorch's dense formula in the same dtype on the
    same input, plus 4 units in the last place. ``run`` is judged in place of the compiled pattern: a function that
    takes (query, key, value, scale=..., return_lse=True, **captured) and returns (out, lse). Scores and learnable
    tensors widen to float64 with the operands.

        assert (found := flexsparse.check("causal() & sliding_window(64)", query, key, value)), str(found)

    Every score is materialised, up to S_q, S_kv of some thousands. Raises what a call raises.
    """
    compiled = attention if isinstance(attention, CompiledAttention) else compile(attention)
    scalars = scalars_of(compiled.pattern.node)
    numbers, tensors = split_numbers(scalars, captured)
    compiled = compiled.with_values(**dict(numbers)) if numbers else compiled
    if tensors.get(LENGTHS) is not None and not names_lengths(compiled.pattern.node):
        compiled = compiled.within_lengths
    shapes = shapes_of(query, key, value, 0)
    check_scale(scale, shapes.head_dim)
    generator = torch.Generator().manual_seed(seed)
    rows = (shapes.batch, shapes.heads, shapes.q_len)
    flow = torch.randn(*rows, shapes.value_dim, generator=generator).to(query)
    real = torch.float64 if shapes.dtype is torch.float64 else torch.float32
    flow_lse = torch.randn(rows, generator=generator).to(query.device, real)
    given = {name: tensor.detach() for name, tensor in with_values(compiled.pattern.node, tensors).items()}
    query, key, value = (x.detach() for x in (query, key, value))
    # A call without one of them says so itself.
    learned = tuple(name for name in learned_names(compiled.ir) if name in given)
    call = Call(query, key, value, given, learned, flow, flow_lse, scale)
    # Where everything else is float64, a gradient in float32 would be judged as if it were, too.
    return check_call(compiled, call.cast(torch.float64) if query.dtype is torch.float64 else call, run)


def check_call(attention: CompiledAttention, call: Call, run: Run | None = None) -> Checked:
    """``check`` of a call with its gradients. Raises what the call raises."""
    judged = attention if run is None else run
    first, second = evaluate(judged, call), evaluate(judged, call)
    backend = attention.plan.backend if run is None else getattr(run, "__name__", type(run).__name__)
    comparisons = judge(attention.pattern, first, call)
    seen = _seen(attention.pattern, call)
    count, empty_wrong = _empty_rows(first, ~seen.any(-1))
    return Checked(
        pattern=str(attention.pattern),
        dtype=call.query.dtype,
        length=call.query.shape[2],
        backend=backend,
        comparisons=comparisons,
        wrong=tuple(
            Element(c.name, _place(attention, c.name, c.first), c.expected, c.got)
            for c in comparisons
            if c.first is not None
        ),
        cause=_cause(attention, judged, call, comparisons),
        changed=_changed(attention, first, second),
        excused=() if run is not None else _excused(attention),
        empty_rows=count,
        empty_wrong=empty_wrong,
        nan_wrong=tuple(_nan_wrong(attention, judged, call, seen)),
    )


def dtype_name(dtype: torch.dtype) -> str:
    """The name without the module."""
    return str(dtype).removeprefix("torch.")


def _place(attention: CompiledAttention, result: str, index: tuple[int, ...]) -> dict[str, int]:
    """An index by the names of its dimensions; those of a tensor of the pattern are its own."""
    specs = {f"d {spec.name}": spec.dims for spec in attention.ir.tensors}
    scores = {f"d {s.scores}": ("b", "head", "kv") for s in attention.ir.selections}
    names = (_DIMS | specs | scores)[result][-len(index) :]
    return dict(zip(names, index, strict=True))


def _cause(attention: CompiledAttention, run: Run, call: Call, comparisons: tuple[Comparison, ...]) -> Cause | None:
    """Why the forward pass is wrong where it first is; wrong gradients of a right forward pass have no such place."""
    for c in comparisons:
        if c.name in ("out", "lse") and c.first is not None:
            b, h, q = c.first[:3]
            return find_cause(attention, run, call, b, h, q)
    return None


def _changed(
    attention: CompiledAttention, first: Mapping[str, Tensor], second: Mapping[str, Tensor]
) -> tuple[Element, ...]:
    """The first element of each result whose bits differ between two runs."""
    found = []
    for name, before in first.items():
        after = second[name]
        differs = (_bits(before) != _bits(after)).flatten(before.dim()).any(-1).nonzero()
        if len(differs):
            at = tuple(differs[0].tolist())
            found.append(Element(name, _place(attention, name, at), float(before[at]), float(after[at])))
    return tuple(found)


def _bits(x: Tensor) -> Tensor:
    """The bytes of each element, in a dimension of their own."""
    return x.contiguous().unsqueeze(-1).view(torch.uint8)


def _excused(attention: CompiledAttention) -> tuple[str, ...]:
    """Results whose last bits the plan does not promise: FlexAttention adds gradients of scores with atomics."""
    if not attention.plan.backend.startswith("flex") or attention.settings.deterministic is True:
        return ()
    return tuple(f"d {s.scores}" for s in attention.ir.selections)


def _seen(pattern: Pattern, call: Call) -> Tensor:
    """The oracle's mask, [B, H, S_q, S_kv]: with a sink, lse does not tell which rows see no key."""
    (batch, heads, q_len, _), kv_len = call.query.shape, call.key.shape[2]
    sizes = {"batch": batch, "heads": heads, "device": call.query.device}
    operands = {"query": call.query, "key": call.key}
    return dense_mask(pattern, q_len, kv_len, **sizes, **operands, **call.captured)  # type: ignore[arg-type]


def _empty_rows(found: Mapping[str, Tensor], empty: Tensor) -> tuple[int, tuple[str, ...]]:
    """How many rows see no key, and which results are wrong there: out and gradient are 0; lse is compared anyway."""
    rows = {"out": found["out"][empty], "d query": found["d query"][empty]}
    wrong = tuple(name for name, x in rows.items() if bool((x != 0).any()))
    return int(empty.sum()), wrong


@torch.no_grad()
def _nan_wrong(attention: CompiledAttention, run: Run, call: Call, seen: Tensor) -> list[str]:
    """What NaN does that it should not: in a query it fills its row alone, in a value it reaches who see its key."""
    rows = seen.any(-1).nonzero().tolist()
    if not rows:
        return []
    b, h, q = rows[len(rows) // 2]
    kv = int(seen[b, h, q].nonzero()[0])
    group = call.query.shape[1] // call.key.shape[1]

    def out_of(**changed: Tensor) -> Tensor:
        operands = {**call.operands, **changed}.values()
        out, _ = run(*operands, scale=call.scale, return_lse=True, **call.captured)
        return torch.as_tensor(out).isnan()

    wrong = []
    query, value = call.query.clone(), call.value.clone()
    query[b, h, q, 0], value[b, h // group, kv, 0] = torch.nan, torch.nan
    found, place = out_of(query=query), f"[b={b}, h={h}, q={q}]"
    if not bool(found[b, h, q].all()):
        wrong.append(f"NaN in query{place} is swallowed: its row of out is not NaN")
    found[b, h, q] = False
    if bool(found.any()):
        other = ", ".join(f"{n}={i}" for n, i in zip("bhqd", found.nonzero()[0].tolist(), strict=True))
        wrong.append(f"NaN in query{place} reaches another row, out[{other}]")
    heads = slice(h // group * group, (h // group + 1) * group)
    missed = seen[b, heads, :, kv] & ~out_of(value=value)[b, heads, :, 0]
    if bool(missed.any()):
        head, row = missed.nonzero()[0].tolist()
        there = f"out[b={b}, h={heads.start + head}, q={row}, d=0], which sees kv={kv}"
        wrong.append(f"NaN in value[b={b}, kv_head={h // group}, kv={kv}] is swallowed: {there}")
    return wrong + (_nan_scores_wrong(attention, call) if run is attention else [])


def _nan_scores_wrong(attention: CompiledAttention, call: Call) -> list[str]:
    wrong = []
    for name in sorted({s.scores for s in attention.ir.selections}):
        spoiled: dict[str, Any] = {**call.captured, name: call.captured[name].clone()}
        spoiled[name][(0,) * spoiled[name].dim()] = torch.nan
        try:
            attention(call.query, call.key, call.value, scale=call.scale, **spoiled)
            wrong.append(f"NaN in {name} is not refused")
        except NonFiniteScoresError:
            pass
    return wrong
