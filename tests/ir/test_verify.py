"""The verifier refuses a program for each invariant that it breaks, and names the expression."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from flexsparse.errors import VerificationError
from flexsparse.ir.lower import lower
from flexsparse.ir.nodes import (
    FALSE,
    TRUE,
    Apply,
    BlockTopK,
    Constant,
    Kind,
    Load,
    Node,
    PerHead,
    SelectionNode,
    Symbol,
    TensorSpec,
)
from flexsparse.ir.program import Chosen, Gate, Program, Selected
from flexsparse.ir.verify import verify
from flexsparse.language import kv, q, topk
from flexsparse.patterns import catalogue

GOOD = lower((topk(3, gate="kv") & (kv <= q)).node)
DOC = TensorSpec("doc", ("b", "s"))
WEIGHT = TensorSpec("weight", ("s",), Kind.REAL)
Q, KV, SCORE = Symbol("q"), Symbol("kv"), Symbol("score")
LOAD = Load(DOC, (Symbol("b"), KV))

SYMBOL_RULE = "a symbol of the language, and the running score only in scores"
LOAD_RULE = "a declared tensor with one index for each dimension"
ARITY_RULE = "an operation of the table with its number of operands"
SINK_RULE = "a sink that does not depend on a key"
BLOCK_RULE = "at least one block of at least one key, and a known score"
NUMBER_RULE = "numbers as operands, integers for // and %"


class Unknown(Symbol):
    """A symbol that the language does not have."""

    @property
    def kind(self) -> Kind:
        return Kind.INT


class Untyped(Apply):
    """An operation that claims a kind, so that the verifier meets it instead of the table."""

    @property
    def kind(self) -> Kind:
        return Kind.BOOL


BROKEN: list[tuple[str, dict[str, Any], Node, str]] = [
    ("mask", {"mask": Constant(1)}, Constant(1), "a mask"),
    ("score", {"score": TRUE}, TRUE, "a number"),
    ("gate_k", {"gate_k": FALSE}, FALSE, "a number"),
    ("gate_logit", {"gate_logit": Selected(0)}, Selected(0), "a number"),
    ("mask", {"mask": Apply("lt", (SCORE, KV))}, SCORE, SYMBOL_RULE),
    ("gate_v", {"gate_v": SCORE}, SCORE, SYMBOL_RULE),
    ("mask", {"mask": Apply("lt", (Unknown("z"), KV))}, Unknown("z"), SYMBOL_RULE),
    ("mask", {"mask": Apply("eq", (LOAD, Q))}, LOAD, LOAD_RULE),
    (
        "mask",
        {"tensors": (DOC,), "mask": Apply("eq", (Load(DOC, (KV,)), Q))},
        Load(DOC, (KV,)),
        LOAD_RULE,
    ),
    (
        "score",
        {"tensors": (WEIGHT,), "score": Load(WEIGHT, (Constant(0.5),))},
        Load(WEIGHT, (Constant(0.5),)),
        "integer indices",
    ),
    ("mask", {"mask": Untyped("nand", (TRUE, TRUE))}, Untyped("nand", (TRUE, TRUE)), ARITY_RULE),
    ("mask", {"mask": Apply("lt", (Q, KV, Q))}, Apply("lt", (Q, KV, Q)), ARITY_RULE),
    ("score", {"score": Apply("where", (Q, SCORE, KV))}, Apply("where", (Q, SCORE, KV)), "a mask and two numbers"),
    (
        "gate_k",
        {"gate_k": Apply("where", (TRUE, Constant(1.0), TRUE))},
        Apply("where", (TRUE, Constant(1.0), TRUE)),
        "a mask and two numbers",
    ),
    ("mask", {"mask": Apply("and", (TRUE, Q))}, Apply("and", (TRUE, Q)), "masks as operands"),
    ("mask", {"mask": Apply("not", (Q,))}, Apply("not", (Q,)), "masks as operands"),
    ("mask", {"mask": Apply("lt", (TRUE, Q))}, Apply("lt", (TRUE, Q)), NUMBER_RULE),
    ("score", {"score": Apply("mod", (Q, SCORE))}, Apply("mod", (Q, SCORE)), NUMBER_RULE),
    ("mask", {"mask": Selected(1)}, Selected(1), "one of 1 selections"),
    ("gate_v", {"gate_v": Gate(-1)}, Gate(-1), "one of 1 selections"),
    ("score", {"score": Gate(0)}, Gate(0), "gates only in gates"),
    ("mask", {"mask": Apply("ge", (Gate(0), Constant(0.5)))}, Gate(0), "gates only in gates"),
    ("sink", {"sink": TRUE}, TRUE, "a number"),
    ("sink", {"sink": Apply("mul", (KV, Constant(0.5)))}, KV, SINK_RULE),
    ("sink", {"sink": SCORE}, SCORE, SYMBOL_RULE),
    ("sink", {"sink": Gate(0)}, Gate(0), SINK_RULE),
    ("mask", {"mask": Chosen(BlockTopK(0, 4))}, Chosen(BlockTopK(0, 4)), BLOCK_RULE),
    ("mask", {"mask": Chosen(BlockTopK(1, 4, "max"))}, Chosen(BlockTopK(1, 4, "max")), BLOCK_RULE),
    ("mask", {"mask": BlockTopK(1, 4)}, BlockTopK(1, 4), "a flattened node"),
    ("mask", {"mask": SelectionNode(3)}, SelectionNode(3), "a flattened node"),
    ("mask", {"mask": PerHead((TRUE, FALSE))}, PerHead((TRUE, FALSE)), "a flattened node"),
]


@pytest.mark.parametrize(
    ("name", "change", "node", "rule"), BROKEN, ids=[f"{n}-{r}-{i}" for i, (n, _, _, r) in enumerate(BROKEN)]
)
def test_broken_program_is_refused(name: str, change: dict[str, Any], node: Node, rule: str) -> None:
    broken: Program = replace(GOOD, **change)
    with pytest.raises(VerificationError) as caught:
        verify(broken)
    assert str(caught.value) == (
        f"program.{name}: got {node!r}, expected {rule}. This is a defect of flexsparse; please report it."
    )


@pytest.mark.parametrize("name", sorted(catalogue()))
def test_every_catalogue_program_verifies(name: str) -> None:
    pattern = catalogue()[name]
    for arguments in pattern.examples:
        made: Any = pattern(**arguments)
        whole = made if made.node.kind is Kind.BOOL else catalogue()["full"]().score(made)
        program = lower(whole.node)
        assert verify(program) is program
