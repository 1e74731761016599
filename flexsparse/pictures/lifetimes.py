"""What a selection keeps over time: a bar for each key, from birth to death, a row for each slot, the threshold."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flexsparse.errors import SettingError
from flexsparse.ir.nodes import SelectionNode
from flexsparse.ir.text import text
from flexsparse.ops.capped_softmax import causal_capped_softmax
from flexsparse.ops.causal import CausalSelection
from flexsparse.ops.selection import causal_sparsek, slot_table
from flexsparse.pictures.curves import Curves, Line
from flexsparse.pictures.mask import Drawable


@dataclass(frozen=True)
class Bar:
    """Key ``key`` with ``score`` stands in ``slot`` for the queries ``birth`` to ``death - 1``."""

    key: int
    birth: int
    death: int
    slot: int
    score: float


@dataclass(frozen=True)
class Lifetimes:
    """One selection of one KV head over ``length`` queries.

    ``bars`` are the keys that live longest, at most as many as asked for, in order of the keys; ``selected`` is how
    many keys are selected at all. ``slots[s][c]`` is the key in slot s as query ``c * chunk`` finds it, -1 for none;
    of more than as many slots as asked for, the first. ``k`` is the budget, ``tau`` the threshold by query.
    """

    title: str
    length: int
    k: int
    selected: int
    bars: tuple[Bar, ...]
    slots: tuple[tuple[int, ...], ...]
    chunk: int
    tau: Curves


def lifetimes(drawn: Drawable, number: int, head: int, *, bars: int, slots: int, columns: int) -> Lifetimes:
    """What selection ``number`` of the program keeps for a query head; at most ``columns`` chunks and points of tau."""
    selection = drawn.compiled.program.selections[number]
    buffers, length = drawn.bound.buffers, drawn.shapes.kv_len
    row = head // int(buffers[f"group_{number}"])
    scores: Tensor = _scores(drawn, selection)[row]
    found = CausalSelection(*(buffers[f"{name}_{number}"][0, row] for name in CausalSelection._fields))
    lived = (found.death - found.birth).long()
    some = int((lived > 0).sum())
    kept = lived.sort(descending=True, stable=True).indices[: min(bars, some)].sort().values
    columns_of_bars = [x[kept].tolist() for x in (*found, scores)]
    chunk = -(-length // columns)
    table = slot_table(CausalSelection(*(x.unsqueeze(0) for x in found)), selection.k, chunk)[0]
    return Lifetimes(
        f"{text(selection)}, KV head {row}",
        length,
        selection.k,
        some,
        tuple(Bar(*bar) for bar in zip(kept.tolist(), *columns_of_bars, strict=True)),
        tuple(tuple(line) for line in table.T[:slots].tolist()),
        chunk,
        _threshold(drawn, selection, scores, columns),
    )


def check_selects(drawn: Drawable) -> None:
    """Refuse a pattern without a selection whose keys have lifetimes. Raises SettingError."""
    if not drawn.compiled.program.selections:
        raise SettingError(
            "--view",
            got="'selection' for a pattern that selects no keys by scores",
            expected="a pattern with a selection",
            mend='For example "sparsek(8)".',
        )


def _scores(drawn: Drawable, selection: SelectionNode) -> Tensor:
    return drawn.captured[selection.scores][0]


def _threshold(drawn: Drawable, selection: SelectionNode, scores: Tensor, points: int) -> Curves:
    """tau of evenly spaced queries; SPARSEK's, also for a selection without a gate."""
    segments = None if selection.segments is None else drawn.bound.buffers[selection.segments]
    if segments is not None and segments.dim() == 2:
        segments = segments[0]
    capped = selection.gate == "capped_softmax"
    function = causal_capped_softmax if capped else causal_sparsek
    with torch.no_grad():
        tau = function(scores, selection.k, selection.after, segments, validate=False).tau
    step = -(-len(tau) // points)
    x = torch.arange(0, len(tau), step)
    # Not a number stands for a query that keeps every candidate, whose threshold is -inf.
    y = torch.where(torch.isfinite(tau[x]), tau[x], torch.nan)
    name = "capped softmax's tau" if capped else "SPARSEK's tau"
    line = Line(name, tuple(y.double().tolist()))
    return Curves("threshold", "query", "tau", tuple(float(n) for n in x.tolist()), (line,))
