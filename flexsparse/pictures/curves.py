"""Score modifications as curves: against the distance q - kv, or against the raw score, for each head that differs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flexsparse.errors import SettingError
from flexsparse.ir.nodes import Opaque, Symbol, walk
from flexsparse.ir.program import Gate, Selected
from flexsparse.pictures.elements import score_function
from flexsparse.pictures.mask import Drawable

_RAW = 60.0


@dataclass(frozen=True)
class Line:
    """A name and the values at each x; NaN where there is none."""

    name: str
    y: tuple[float, ...]


@dataclass(frozen=True)
class Curves:
    """Several lines over one x. ``x_name`` and ``y_name`` say what the axes are."""

    title: str
    x_name: str
    y_name: str
    x: tuple[float, ...]
    lines: tuple[Line, ...]


def score_curves(drawn: Drawable, query: int | None, raw: float, points: int) -> Curves:
    """What the pattern makes of a raw score: at the keys that one query sees, by their distance q - kv.

    ``query`` None takes the last one, or the middle one where that sees keys behind it. At most ``points`` keys of
    those that are seen by some head are evaluated, evenly chosen, the first and the last among them; a key that none
    sees stands between them where there is one, without a value. A score that
    depends on no index is drawn against raw scores from -60 to 60. Raises SettingError where the score is left as it
    is, and where the query sees no key.
    """
    if drawn.score is None:
        raise SettingError(
            "--view",
            got="'score' for a pattern that leaves scores as they are",
            expected="a pattern with a score of its own",
            mend='For example "causal() + alibi()".',
        )
    if not _depends_on_place(drawn):
        return _against_raw(drawn, points)
    at = _fitting_query(drawn) if query is None else query
    heads, keys = torch.arange(drawn.shapes.heads)[:, None], torch.arange(drawn.shapes.kv_len)
    zero, q = torch.tensor(0), torch.tensor(at)
    # Head by head: a row of a million booleans for many heads is not small.
    seen = torch.stack([drawn.mask(zero, h, q, keys).expand(len(keys)) for h in heads.flatten()])
    some = seen.any(0).nonzero().flatten()
    if not len(some):
        raise SettingError("--query", got=f"{at}, which sees no key", expected="a query that sees some key")
    chosen = _with_gaps(some[_spread(len(some), points)], (~seen.any(0)).nonzero().flatten()).flip(0)
    values = score_function(drawn, raw)(zero, heads, q, chosen).expand(len(heads), len(chosen))
    values = torch.where(seen[:, chosen], values, torch.nan)
    return Curves(
        f"score of query {at}",
        "distance q - kv",
        f"score, raw {raw:g}",
        tuple(float(x) for x in (at - chosen).tolist()),
        _grouped_by_head(values.tolist()),
    )


def _against_raw(drawn: Drawable, points: int) -> Curves:
    x = torch.linspace(-_RAW, _RAW, points, dtype=torch.float64)
    zero = torch.zeros_like(x, dtype=torch.int64)
    assert drawn.score is not None
    made = [drawn.score(x, zero, zero + head, zero, zero).expand(len(x)).tolist() for head in range(drawn.shapes.heads)]
    return Curves("score of every pair", "raw score", "score", tuple(x.tolist()), _grouped_by_head(made))


def _depends_on_place(drawn: Drawable) -> bool:
    program = drawn.compiled.program
    nodes = [n for e in (program.score, program.gate_k, program.gate_logit) for n in walk(e)]
    return any(isinstance(n, Gate | Opaque | Selected) or n in (Symbol("q"), Symbol("kv")) for n in nodes)


def _fitting_query(drawn: Drawable) -> int:
    last, middle = drawn.shapes.q_len - 1, drawn.shapes.q_len // 2
    behind = torch.arange(middle + 1, drawn.shapes.kv_len)
    zero, q = torch.tensor(0), torch.tensor(middle)
    return middle if bool(drawn.mask(zero, zero, q, behind).any()) else last


def _with_gaps(chosen: Tensor, hidden: Tensor) -> Tensor:
    """The chosen keys, with the first hidden one between two of them: no line is drawn across it."""
    if not len(hidden):
        return chosen
    after = hidden[torch.searchsorted(hidden, chosen[:-1]).clamp(max=len(hidden) - 1)]
    between = (after > chosen[:-1]) & (after < chosen[1:])
    return torch.cat((chosen, after[between])).sort().values


def _spread(count: int, points: int) -> list[int]:
    if count <= points:
        return list(range(count))
    return sorted({round(n * (count - 1) / max(points - 1, 1)) for n in range(points)})


def _grouped_by_head(values: Sequence[Sequence[float]]) -> tuple[Line, ...]:
    """One line for all heads with the same values."""
    groups: dict[tuple[float | None, ...], list[int]] = {}
    for head, line in enumerate(values):
        groups.setdefault(tuple(None if math.isnan(v) else v for v in line), []).append(head)
    every = len(values) > 1 and len(groups) == 1
    return tuple(
        Line("every head" if every else head_names(heads), tuple(math.nan if v is None else v for v in line))
        for line, heads in groups.items()
    )


def head_names(heads: Sequence[int]) -> str:
    """ "head 3", "heads 0-3" or "heads 0, 2, 5"."""
    if len(heads) == 1:
        return f"head {heads[0]}"
    if list(heads) == list(range(heads[0], heads[-1] + 1)):
        return f"heads {heads[0]}-{heads[-1]}"
    return f"heads {', '.join(map(str, heads))}"
