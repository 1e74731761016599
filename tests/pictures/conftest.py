"""Small patterns, bound to example tensors, beside what the dense oracle says of every pair."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import flexsparse
from flexsparse.dense import dense_mask
from flexsparse.dense_evaluator import DenseSizes, Evaluator
from flexsparse.example_inputs import example_captured, example_operands, fitting_heads
from flexsparse.expression import Pattern
from flexsparse.parser import parse
from flexsparse.patterns import catalogue
from flexsparse.pictures.mask import Drawable, drawable, square_shapes
from tests.helpers import tensors_of

LENGTH = 80


@dataclass(frozen=True)
class Dense:
    """A drawable pattern, and the oracle over the same tensors."""

    drawn: Drawable
    pattern: Pattern
    captured: dict[str, Tensor]

    def mask(self, pattern: Pattern | str) -> Tensor:
        """[H, S, S] booleans of any pattern over these tensors."""
        shapes, operands = self.drawn.shapes, {}
        if self.drawn.compiled.program.chosen:
            operands = dict(zip(("query", "key"), example_operands(shapes, 0), strict=True))
        sizes = {"q_len": shapes.q_len, "heads": shapes.heads}
        expression = parse(pattern) if isinstance(pattern, str) else pattern
        given = {name: tensor for name, tensor in self.captured.items() if name in tensors_of(expression)}
        return dense_mask(expression, **sizes, **operands, **given)[0]  # type: ignore[arg-type]

    def parts(self) -> Any:
        """Scores and gates of every pair as the oracle evaluates them."""
        shapes = self.drawn.shapes
        sizes = DenseSizes(1, shapes.heads, shapes.q_len, shapes.kv_len, 0, torch.device("cpu"))
        operands = example_operands(shapes, 0) if self.drawn.compiled.program.chosen else None
        return Evaluator(sizes, self.captured, operands).pattern(self.pattern.node)


def dense(pattern: Pattern | str, length: int = LENGTH, block: int = 16) -> Dense:
    """A pattern over example tensors of seed 0."""
    attention = flexsparse.compile(pattern, backend="chunked")
    shapes = square_shapes(length, fitting_heads(attention.pattern.node, 4))
    captured = example_captured(attention.ir, shapes, 0)
    return Dense(drawable(attention, shapes, captured, block), attention.pattern, captured)


def catalogue_masks() -> list[Any]:
    """One case for each example of a pattern of the catalogue that is a mask."""
    found = []
    for function in catalogue().values():
        for arguments in function.examples:
            pattern = function(**arguments)
            if isinstance(pattern, Pattern):
                found.append(pytest.param(pattern, id=repr(pattern)))
    return found
