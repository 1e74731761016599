"""Pictures and example data: sound when cut down, complete for every pattern of the catalogue."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import flexsparse
from flexsparse.cli import render
from flexsparse.dense import dense_mask
from flexsparse.example_inputs import example_call, example_captured, fitting_heads, learned_names
from flexsparse.expression import Pattern
from flexsparse.ir.nodes import mentions
from flexsparse.language import everything
from flexsparse.patterns import catalogue
from flexsparse.pictures.mask import Drawable, drawable, square_shapes
from flexsparse.tolerance import evaluate

CASES = [
    pytest.param(function, arguments, id=repr(function(**arguments)))
    for function in catalogue().values()
    for arguments in function.examples
]


def _drawn(text: str, length: int, heads: int = 4, block: int = 16) -> tuple[Drawable, torch.Tensor]:
    attention = flexsparse.compile(text, backend="chunked")
    shapes = square_shapes(length, heads)
    captured: dict[str, Any] = example_captured(attention.ir, shapes, 0)
    return drawable(attention, shapes, captured, block), dense_mask(text, length, heads=heads, **captured)[0]


@pytest.mark.parametrize("cells", [(2, 3), (5, 7), (64, 64)])
@pytest.mark.parametrize("text", ["causal() & sliding_window(40)", "sparsek(5) | sinks(3)", "causal() & document()"])
def test_a_cell_claims_no_more_than_its_pairs(text: str, cells: tuple[int, int]) -> None:
    drawn, seen = _drawn(text, 150)
    for picture in (drawn.tiles(1, cells), drawn.pairs(1, range(20, 101), range(7, 150), cells)):
        assert len(picture.kinds) <= cells[0]
        assert len(picture.kinds[0]) <= cells[1]
        assert picture.shares is not None
        for r, row in enumerate(picture.kinds):
            for c, kind in enumerate(row):
                top, left = picture.queries.start + r * picture.cell[0], picture.keys.start + c * picture.cell[1]
                bottom, right = top + picture.cell[0], left + picture.cell[1]
                part = seen[1, top : min(bottom, picture.queries.stop), left : min(right, picture.keys.stop)]
                assert picture.shares[r][c] == pytest.approx(float(part.double().mean()))
                assert bool(part.all()) if kind == 2 else True
                assert not bool(part.any()) if kind == 0 else True


def test_pairs_are_exact() -> None:
    drawn, seen = _drawn("sparsek(3) & sliding_window(9)", 33)
    picture = drawn.pairs(2, range(33), range(33), (33, 33))
    assert torch.equal(torch.tensor(picture.kinds) == 2, seen[2])
    assert picture.counts == (33 * 33 - int(seen[2].sum()), 0, int(seen[2].sum()))
    assert picture.pairs == pytest.approx(float(seen[2].double().mean()))


@pytest.mark.parametrize(("function", "arguments"), CASES)
def test_every_pattern_has_example_data(function: object, arguments: dict[str, object]) -> None:
    example = function(**arguments)  # type: ignore[operator]
    pattern = example
    if not isinstance(example, Pattern):
        pattern = everything.score(example) if mentions(example.node, "score") else everything + example
    attention = flexsparse.compile(pattern, backend="chunked")
    shapes = square_shapes(64, fitting_heads(pattern.node, 4), 2)
    call = example_call(attention, shapes, 0)
    found = evaluate(attention, call)
    assert {f"d {name}" for name in learned_names(attention.ir)} < set(found)
    again = example_call(attention, shapes, 0)
    assert torch.equal(call.query, again.query)
    assert all(torch.equal(tensor, again.captured[name]) for name, tensor in call.captured.items())


def test_free_sizes_fit_every_index() -> None:
    text = 'full() + captured("table", dims=("n", "h"), learnable=True)[minimum(q // 3, 7), h]'
    attention = flexsparse.compile(text, backend="chunked")
    shapes = square_shapes(40, 4)
    assert example_captured(attention.ir, shapes, 0)["table"].shape == (8, 4)


def test_heads_fit_per_head() -> None:
    pattern = flexsparse.parse("sliding_window(per_head([1, 2, 3]))")
    assert fitting_heads(pattern.node, 4) == 12


def test_characters_tell_the_kinds_apart() -> None:
    drawn, _ = _drawn("causal()", 64)
    text = str(render.mask(drawn.tiles(0, (4, 4)), render.stdout()))
    assert [line[-8:] for line in text.splitlines()[1:]] == ["▒▒······", "██▒▒····", "████▒▒··", "██████▒▒"]
