"""One case of a check: a compiled pattern against the oracle, against itself, and on rows that see no key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flexsparse.compiler import CompiledAttention
from flexsparse.dense import dense_mask
from flexsparse.expression import Pattern
from flexsparse.runtime.inputs import Shapes
from flexsparse.tolerance import Call, Comparison, evaluate, judge


@dataclass(frozen=True)
class Case:
    """What was found at one dtype and length."""

    dtype: torch.dtype
    length: int
    backend: str
    comparisons: tuple[Comparison, ...]
    changed: tuple[str, ...]
    excused: tuple[str, ...]
    empty_rows: int
    empty_wrong: tuple[str, ...]

    @property
    def holds(self) -> bool:
        """Every error allowed, two runs alike but for what the plan excuses, and empty rows as defined."""
        unexpected = set(self.changed) - set(self.excused)
        return all(c.holds for c in self.comparisons) and not unexpected and not self.empty_wrong

    def as_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {
            "dtype": dtype_name(self.dtype),
            "length": self.length,
            "backend": self.backend,
            "results": [
                {"name": c.name, "error": c.error, "allowed": c.allowed, "holds": c.holds} for c in self.comparisons
            ],
            "changed_between_runs": list(self.changed),
            "allowed_to_change": list(self.excused),
            "empty_rows": self.empty_rows,
            "empty_rows_wrong": list(self.empty_wrong),
            "holds": self.holds,
        }


def run_case(attention: CompiledAttention, call: Call, *, deterministic: bool | None) -> Case:
    """Run a call twice and judge it. Raises what the call raises."""
    first, second = evaluate(attention, call), evaluate(attention, call)
    changed = tuple(name for name in first if not _same_bits(first[name], second[name]))
    count, wrong = _empty_rows(first, ~_seen(attention.pattern, call).any(-1))
    plan = attention.plan
    return Case(
        dtype=call.query.dtype,
        length=call.query.shape[2],
        backend=plan.backend,
        comparisons=judge(attention.pattern, first, call),
        changed=changed,
        excused=_excused(attention, plan.shapes, deterministic),
        empty_rows=count,
        empty_wrong=wrong,
    )


def dtype_name(dtype: torch.dtype) -> str:
    """The name without the module."""
    return str(dtype).removeprefix("torch.")


def _same_bits(x: Tensor, y: Tensor) -> bool:
    return torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8))


def _excused(attention: CompiledAttention, shapes: Shapes, deterministic: bool | None) -> tuple[str, ...]:
    """Results whose last bits the plan does not promise: FlexAttention adds gradients of scores with atomics."""
    if not attention.plan.backend.startswith("flex") or deterministic is True:
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
