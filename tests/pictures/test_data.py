"""What pictures say of cells, gates and scores, against every element of small masks."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from flexsparse.analysis.tiles import EMPTY, FULL, PARTIAL
from flexsparse.expression import Pattern
from flexsparse.pictures.curves import score_curves
from flexsparse.pictures.elements import gate_pictures, score_picture
from flexsparse.pictures.lifetimes import lifetimes
from flexsparse.pictures.mask import Picture
from flexsparse.pictures.reasons import reasons
from tests.pictures.conftest import LENGTH, catalogue_masks, dense

COMPOSED = (
    "causal() & (sliding_window(20) | sinks(4) | sparsek(8, after=20)) + alibi()",
    "per_head([sliding_window(8), causal() & document()])",
    "(causal() ^ sliding_window(9)) | ~document()",
    "sliding_window(per_head([4, 30]))",
    "(sliding_window(16) | global_tokens(2)) & causal()",
)


def _part(picture: Picture, seen: torch.Tensor, row: int, column: int) -> torch.Tensor:
    top, left = picture.queries.start + row * picture.cell[0], picture.keys.start + column * picture.cell[1]
    bottom, right = min(top + picture.cell[0], picture.queries.stop), min(left + picture.cell[1], picture.keys.stop)
    return seen[top:bottom, left:right]


@pytest.mark.parametrize("cells", [2, 3, 5])
@pytest.mark.parametrize("pattern", [*catalogue_masks(), *COMPOSED])
def test_a_cell_is_empty_or_full_only_if_all_of_it_is(pattern: Pattern | str, cells: int) -> None:
    found = dense(pattern)
    seen = found.mask(pattern)
    for head in (0, found.drawn.shapes.heads - 1):
        picture = found.drawn.tiles(head, (cells, cells))
        assert len(picture.kinds) <= cells
        exact = picture.undecided == 0
        for r, row in enumerate(picture.kinds):
            for c, kind in enumerate(row):
                part = _part(picture, seen[head], r, c)
                assert kind != EMPTY or not part.any()
                assert kind != FULL or part.all()
                assert not exact or kind == EMPTY or part.any()


@pytest.mark.parametrize("pattern", [*catalogue_masks(), *COMPOSED])
def test_reasons_are_true_of_every_pair(pattern: Pattern | str) -> None:
    found = dense(pattern)
    masks: dict[str, torch.Tensor] = {}
    window = (range(3, 60), range(20, LENGTH))
    for head, pairs in itertools.product((0, found.drawn.shapes.heads - 1), (False, True)):
        picture = found.drawn.pairs(head, *window, (7, 11)) if pairs else found.drawn.tiles(head, (5, 5))
        why = reasons(found.drawn, head, picture, pairs=pairs)
        for r, row in enumerate(picture.kinds):
            for c, kind in enumerate(row):
                for claim in why.texts[why.of[r][c]].split("; "):
                    label, says = _claim(claim)
                    if label not in masks:
                        masks[label] = found.mask(label)
                    part = _part(picture, masks[label][head], r, c)
                    assert {EMPTY: not part.any(), FULL: bool(part.all()), PARTIAL: True}[says], claim
                    if kind != PARTIAL and len(why.texts[why.of[r][c]].split("; ")) == 1:
                        assert says == kind


def _claim(text: str) -> tuple[str, int]:
    for ending, kind in (
        (" hides every pair", EMPTY),
        (" shows every pair", FULL),
        (" may show some pairs", PARTIAL),
        (" shows some pairs", PARTIAL),
    ):
        if text.endswith(ending):
            return text.removesuffix(ending).removesuffix(" as a whole"), kind
    raise AssertionError(text)


def test_reasons_name_the_part_that_decides() -> None:
    found = dense("causal() & (sliding_window(20) | sinks(4))")
    why = reasons(found.drawn, 0, found.drawn.tiles(0, (5, 5)))
    said = [[why.texts[n] for n in row] for row in why.of]
    hidden = "causal() hides every pair; sliding_window(20) hides every pair; sinks(4) hides every pair"
    assert said[0][4] == hidden
    assert said[4][1] == "sliding_window(20) hides every pair; sinks(4) hides every pair"
    assert said[1][1] == "causal() shows some pairs; sliding_window(20) shows some pairs"
    assert said[4][0] == "sinks(4) shows some pairs"


GATED = ("sparsek(6)", 'sparsek(6, gate="logit")', 'sparsek(6, gate="capped_softmax") | sliding_window(9)')


@pytest.mark.parametrize("cells", [LENGTH, 13])
@pytest.mark.parametrize("text", GATED)
def test_gates_are_the_oracles(text: str, cells: int) -> None:
    found = dense(text)
    parts, seen = found.parts(), found.mask(text)
    for name, picture in gate_pictures(found.drawn, 2, range(LENGTH), range(LENGTH), (cells, cells)).items():
        gate = {"K": parts.gate_k, "V": parts.gate_v, "the logits": parts.gate_logit}[name.split(" and ")[-1]]
        _same_values(picture, gate.expand(1, 4, LENGTH, LENGTH)[0, 2], seen[2])


SCORED = ("causal() + alibi()", "(causal() + alibi()).score(softcap(3.0))", "sliding_window(9) + alibi() | sinks(2)")


@pytest.mark.parametrize("cells", [LENGTH, 7])
@pytest.mark.parametrize("text", SCORED)
def test_scores_are_the_oracles(text: str, cells: int) -> None:
    found = dense(text)
    wanted = found.parts().score(torch.full((1, 4, LENGTH, LENGTH), 1.5, dtype=torch.float64))[0, 3]
    picture = score_picture(found.drawn, 3, range(10, 70), range(LENGTH), (cells, cells), 1.5)
    _same_values(picture, wanted, found.mask(text)[3])


def _same_values(picture: Picture, wanted: torch.Tensor, seen: torch.Tensor) -> None:
    assert picture.values is not None
    for r, row in enumerate(picture.values):
        for c, value in enumerate(row):
            part, there = _part(picture, wanted, r, c), _part(picture, seen, r, c)
            if there.any():
                assert value == pytest.approx(float(part[there].max()), abs=1e-5)
            else:
                assert math.isnan(value)
                assert picture.kinds[r][c] == EMPTY


@pytest.mark.parametrize("query", [None, 0, 41])
@pytest.mark.parametrize("text", [*SCORED, "document() + alibi()", "per_head([causal(), sliding_window(5)]) + alibi()"])
def test_curves_pass_through_every_evaluated_pair(text: str, query: int | None) -> None:
    found = dense(text)
    curves = score_curves(found.drawn, query, 1.5, 30)
    wanted = found.parts().score(torch.full((1, 4, LENGTH, LENGTH), 1.5, dtype=torch.float64))[0]
    seen = found.mask(text)
    at = query if query is not None else (LENGTH // 2 if seen[0, LENGTH // 2, LENGTH // 2 + 1 :].any() else LENGTH - 1)
    assert curves.title == f"score of query {at}"
    some = seen[:, at].any(0)
    keys = [at - int(distance) for distance in curves.x]
    assert sum(bool(some[key]) for key in keys) == min(30, int(some.sum()))
    # A line that is drawn from one key to the next passes over seen keys alone.
    for later, key in itertools.pairwise(keys):
        assert not (some[key] and some[later]) or bool(some[key : later + 1].all())
    assert list(curves.x) == sorted(curves.x)
    lines = {head: line for line in curves.lines for head in _heads(line.name)}
    for head in range(4):
        for distance, y in zip(curves.x, lines[head].y, strict=True):
            key = at - int(distance)
            assert math.isnan(y) == (not seen[head, at, key])
            assert math.isnan(y) or y == pytest.approx(float(wanted[head, at, key]), abs=1e-5)


def _heads(name: str) -> list[int]:
    if name == "every head":
        return [0, 1, 2, 3]
    first, _, last = name.removeprefix("heads ").removeprefix("head ").partition("-")
    return list(range(int(first), int(last or first) + 1))


def test_a_score_of_no_index_is_drawn_against_the_raw_score() -> None:
    curves = score_curves(dense("causal().score(softcap(30.0))").drawn, None, 0.0, 61)
    (line,) = curves.lines
    assert curves.x_name == "raw score"
    for x, y in zip(curves.x, line.y, strict=True):
        assert y == pytest.approx(30 * math.tanh(x / 30))


@pytest.mark.parametrize("text", ["sparsek(6)", "sparsek_window(5, 9)", 'document() & sparsek(3, segments="doc")'])
def test_lifetimes_are_what_the_oracle_selects(text: str) -> None:
    found = dense(text)
    selection = found.drawn.compiled.program.selections[0]
    alone = f"sparsek({selection.k}, after={selection.after}"
    alone += f', segments="{selection.segments}")' if selection.segments else ")"
    seen = found.mask(alone)
    for head in range(4):
        lived = lifetimes(found.drawn, 0, head, bars=LENGTH, slots=LENGTH, columns=LENGTH)
        rebuilt = torch.zeros(LENGTH, LENGTH, dtype=torch.bool)
        for bar in lived.bars:
            rebuilt[bar.birth : bar.death, bar.key] = True
        assert torch.equal(rebuilt, seen[head])
        assert lived.selected == len(lived.bars) == int(seen[head].any(0).sum())
        for query in range(LENGTH):
            held = {row[query] for row in lived.slots} - {-1}
            assert held == set(seen[head, query].nonzero().flatten().tolist())


def test_fewer_bars_are_those_that_live_longest() -> None:
    found = dense("sparsek(6)").drawn
    every, some = (lifetimes(found, 0, 0, bars=n, slots=2, columns=9) for n in (LENGTH, 5))
    longest = sorted((bar.death - bar.birth for bar in every.bars), reverse=True)[:5]
    assert sorted((bar.death - bar.birth for bar in some.bars), reverse=True) == longest
    assert some.selected == every.selected > 5
    assert (len(some.slots), len(some.slots[0])) == (2, 9)
