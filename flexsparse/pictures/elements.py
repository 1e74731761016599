"""The numbers behind single pairs: what the score of each becomes, and the gate that each has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from flexsparse.codegen.flex import generate
from flexsparse.errors import SettingError
from flexsparse.ir.lower import ONE
from flexsparse.ir.nodes import Node
from flexsparse.ir.program import Program
from flexsparse.pictures.mask import Drawable, Picture

_ACTS_ON = {"gate_k": "K", "gate_v": "V", "gate_logit": "the logits"}


def gate_parts(program: Program) -> dict[str, Node]:
    """The different gates of a pattern by what they act on, such as "K and V". Empty without a gate."""
    found: dict[Node, list[str]] = {}
    for name, place in _ACTS_ON.items():
        node = getattr(program, name)
        if node != ONE:
            found.setdefault(node, []).append(place)
    return {" and ".join(places): node for node, places in found.items()}


def gate_pictures(
    drawn: Drawable, head: int, queries: range, keys: range, cells: tuple[int, int]
) -> dict[str, Picture]:
    """The greatest gate of each cell, by what the gates act on.

    Raises SettingError for a pattern without a gate, and for too many pairs.
    """
    program = drawn.compiled.program
    parts = gate_parts(program)
    if not parts:
        raise SettingError(
            "--view",
            got="'gate' for a pattern without one",
            expected="a pattern with a selection under a soft gate",
            mend='For example "sparsek(8)", whose gate is on the values unless gate=... says otherwise.',
        )
    return {name: drawn.values(head, queries, keys, cells, _gate_function(drawn, node)) for name, node in parts.items()}


def _gate_function(drawn: Drawable, gate: Node) -> Callable[..., Tensor]:
    """``gate(b, h, q, kv)`` as the generated functions have it: printed as a gate on values, whatever it acts on."""
    program = replace(drawn.compiled.program, gate_k=ONE, gate_logit=ONE, gate_v=gate)
    generated = generate(program, drawn.compiled.title)
    function: Callable[..., Tensor] = generated.build(
        **{name: drawn.bound.buffers[name] for name in generated.arguments}
    )["value_gate"]
    return function


def score_picture(
    drawn: Drawable, head: int, queries: range, keys: range, cells: tuple[int, int], raw: float
) -> Picture:
    """The greatest final score of each cell, for a product of query and key that is ``raw`` everywhere."""
    return drawn.values(head, queries, keys, cells, score_function(drawn, raw))


def score_function(drawn: Drawable, raw: float) -> Callable[..., Tensor]:
    """``score(b, h, q, kv)`` for a raw score; float64. The raw score itself where the pattern leaves it as it is."""

    def score(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        shape = torch.broadcast_shapes(b.shape, h.shape, q.shape, kv.shape)
        running = torch.full(shape, raw, dtype=torch.float64, device=kv.device)
        return running if drawn.score is None else drawn.score(running, b, h, q, kv)

    return score
