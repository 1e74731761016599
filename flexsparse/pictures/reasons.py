"""Why a cell of a picture is empty, partial or full: what each named part of the pattern says of it.

Every part is classified on the cells by the same analysis as the whole pattern, so a reason claims no more than what
was proved of that part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flexsparse.analysis.tiles import EMPTY, FULL, PARTIAL, classify
from flexsparse.codegen.flex import generate
from flexsparse.ir.lower import ONE, SCORE, lower
from flexsparse.ir.nodes import SIZE_SYMBOLS, Apply, Kind, Named, Node, PerHead, Scored, SelectionNode, Sunk, is_plain
from flexsparse.ir.program import Program, table_name
from flexsparse.ir.text import text
from flexsparse.pictures.mask import Drawable, Picture, rows_of

# Parts that are told apart: three classes each, packed into one integer of 64 bits.
_PARTS = 38


@dataclass(frozen=True)
class Reasons:
    """``texts[of[row][column]]`` is the reason of a cell."""

    texts: tuple[str, ...]
    of: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Part:
    """A part of a pattern with a name, or several under "and" or "or"; ``number`` counts the named ones."""

    label: str
    op: str = ""
    inner: tuple[Part, ...] = ()
    number: int = -1


def reasons(drawn: Drawable, head: int, picture: Picture, *, pairs: bool = False) -> Reasons:
    """The reason of every cell of a picture of tiles, or of ``pairs``, of this head."""
    leaves: list[Node] = []
    whole = _parts(drawn.pattern, drawn.shapes.heads, head, leaves)
    if len(leaves) > _PARTS:
        whole, leaves = Part(text(drawn.pattern), number=0), [drawn.pattern]
    kinds_of = _kinds_of_pairs if pairs else part_kinds
    found = [kinds_of(drawn, leaf, head, picture) for leaf in leaves]
    vague = [undecided for _, undecided in found]
    code = torch.tensor(picture.kinds).long()
    for kinds, _ in found:
        code = 3 * code + kinds.long()
    distinct, of = code.unique(return_inverse=True)
    texts = []
    for number in distinct.tolist():
        classes: list[int] = []
        for _ in found:
            number, kind = divmod(number, 3)
            classes.insert(0, kind)
        texts.append(_reason(whole, number, classes, vague))
    return Reasons(tuple(texts), rows_of(of))


def part_kinds(drawn: Drawable, part: Node, head: int, picture: Picture) -> tuple[Tensor, bool]:
    """The class of each cell under one part alone, [rows, columns] uint8, and whether PARTIAL may be another one."""
    program = lower(part)
    sizes, device, buffers = drawn.shapes.sizes, drawn.shapes.device, _buffers(program, drawn)
    tiles = classify(program.mask, sizes, buffers, block=picture.cell[0], device=device, tables=program.tables)
    return tiles.kinds[0, head if tiles.distinct_heads > 1 else 0].cpu(), tiles.undecided > 0


def _kinds_of_pairs(drawn: Drawable, part: Node, head: int, picture: Picture) -> tuple[Tensor, bool]:
    """The same for a window of pairs, by evaluating each of them."""
    program = replace(lower(part), score=SCORE, gate_k=ONE, gate_v=ONE, gate_logit=ONE)
    generated = generate(program, text(part))
    values = {name: drawn.bound.buffers[name] for name in SIZE_SYMBOLS} | _buffers(program, drawn)
    for number, numbers in enumerate(program.tables):
        values[table_name(number)] = torch.tensor(numbers, device=drawn.shapes.device)
    mask = generated.build(**{name: values[name] for name in generated.arguments})["mask_mod"]
    shares = replace(drawn, mask=mask).shares(head, picture.queries, picture.keys, picture.cell)
    return (shares > 0).to(torch.uint8) + (shares == 1).to(torch.uint8), False


def _buffers(program: Program, drawn: Drawable) -> dict[str, Any]:
    """What the program of a part reads, from the whole pattern's; selections have numbers of their own in each."""
    whole = drawn.compiled.program
    names = {spec.name for spec in program.tensors} | {topk.name for topk in program.chosen}
    found = {name: drawn.bound.buffers[name] for name in names}
    for number, selection in enumerate(program.selections):
        there = whole.selections.index(selection)
        found |= {f"{name}_{number}": drawn.bound.buffers[f"{name}_{there}"] for name in ("birth", "death", "group")}
    return found


def _parts(node: Node, heads: int, head: int, leaves: list[Node]) -> Part:
    """The tree of parts of one head; ``leaves`` takes the named ones, in order."""
    match node:
        case Named(_, _, body) if not (is_plain(body) or isinstance(body, SelectionNode)):
            return _parts(body, heads, head, leaves)
        case Scored(inner, _) | Sunk(inner, _):
            return _parts(inner, heads, head, leaves)
        case PerHead(entries) if node.kind is Kind.BOOL:
            return _parts(entries[head * len(entries) // heads], heads, head, leaves)
        case Apply("and" | "or" as op, _):
            parts = tuple(_parts(child, heads, head, leaves) for child in _chain(node, op))
            return Part(text(node), op, parts)
    leaves.append(node)
    return Part(text(node), number=len(leaves) - 1)


def _chain(node: Node, op: str) -> list[Node]:
    if isinstance(node, Apply) and node.op == op:
        return [child for arg in node.args for child in _chain(arg, op)]
    return [node]


def _reason(part: Part, kind: int, classes: Sequence[int], vague: Sequence[bool]) -> str:
    """Why a part has this class on a cell, from the classes of the named parts."""
    if not part.op:
        some = "may show some pairs" if vague[part.number] else "shows some pairs"
        return f"{part.label} {('hides every pair', some, 'shows every pair')[kind]}"
    decides = EMPTY if part.op == "and" else FULL
    inner = [(x, _kind(x, classes)) for x in part.inner]
    telling = [(x, of) for x, of in inner if (of != 2 - decides if kind == PARTIAL else of == kind)]
    if (kind == 2 - decides and len(telling) < len(part.inner)) or not telling:
        verb = ("hides every pair", "shows some pairs", "shows every pair")[kind]
        return f"{part.label} as a whole {verb}"
    return "; ".join(_reason(x, of, classes, vague) for x, of in telling)


def _kind(part: Part, classes: Sequence[int]) -> int:
    """What the classes of the named parts prove of a part; PARTIAL where they prove neither of the others."""
    if not part.op:
        return classes[part.number]
    inner = {_kind(x, classes) for x in part.inner}
    decides = EMPTY if part.op == "and" else FULL
    if decides in inner:
        return decides
    return 2 - decides if inner == {2 - decides} else PARTIAL
