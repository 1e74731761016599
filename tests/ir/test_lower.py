"""Expression to program: golden text of small programs, and what lowering drops and refuses."""

from __future__ import annotations

from typing import Any

import pytest

import flexsparse as fs
from flexsparse.errors import ExpressionError
from flexsparse.ir.lower import lower
from flexsparse.ir.program import Gate
from flexsparse.language import captured, h, kv, per_head, q, topk
from flexsparse.patterns import catalogue

P: Any = catalogue()
bias = captured("bias", dims=("h",), learnable=True)

NO_GATES = "gate_k     = 1.0\ngate_v     = 1.0\ngate_logit = 1.0"

GOLDEN: dict[str, tuple[Any, str]] = {
    "causal": (P["causal"](), f"mask       = kv <= q\nscore      = score\n{NO_GATES}"),
    "full": (P["full"](), f"mask       = True\nscore      = score\n{NO_GATES}"),
    "window": (
        P["causal"]() & P["sliding_window"](8),
        f"mask       = (kv <= q) & (q - kv < 8)\nscore      = score\n{NO_GATES}",
    ),
    "document": (
        P["document"](),
        f"tensor     doc: int[b, s]\nmask       = doc[b, q] == doc[b, kv]\nscore      = score\n{NO_GATES}",
    ),
    "added": (
        P["causal"]() + bias[h],
        f"tensor     bias: real[h] learnable\nmask       = kv <= q\nscore      = score + bias[h]\n{NO_GATES}",
    ),
    "replaced": (
        P["causal"]().score(P["softcap"](30.0)) + 1,
        f"mask       = kv <= q\nscore      = 30.0 * tanh(score / 30.0) + 1\n{NO_GATES}",
    ),
    "both_scores_left_then_right": (
        (P["causal"]() + 1) & P["sinks"](4).score(P["softcap"](30.0)),
        f"mask       = (kv <= q) & (kv < 4)\nscore      = 30.0 * tanh((score + 1) / 30.0)\n{NO_GATES}",
    ),
    "left_score_wins": (
        (P["causal"]() + 1) | (P["sinks"](4) + 2),
        "mask       = (kv <= q) | (kv < 4)\nscore      = where(kv <= q, score + 1, score + 2)\n" + NO_GATES,
    ),
    "selection": (
        P["sparsek"](8, after=2),
        "selection  selected_0, m_0 = topk(8, after=2, gate='kv')\n"
        "mask       = selected_0\nscore      = score\ngate_k     = m_0\ngate_v     = m_0\ngate_logit = 1.0",
    ),
    "window_or_selection": (
        P["sliding_window"](4) | topk(8, after=4, gate="v"),
        "selection  selected_0, m_0 = topk(8, after=4, gate='v')\n"
        "mask       = ((kv <= q) & (q - kv < 4)) | selected_0\nscore      = score\ngate_k     = 1.0\n"
        "gate_v     = where((kv <= q) & (q - kv < 4), 1.0, m_0)\ngate_logit = 1.0",
    ),
    "logit_gate": (
        topk(8, gate="logit"),
        "selection  selected_0, m_0 = topk(8, gate='logit')\n"
        "mask       = selected_0\nscore      = score\ngate_k     = 1.0\ngate_v     = 1.0\ngate_logit = m_0",
    ),
    "straight_through": (
        topk(8, gate="ste"),
        "selection  selected_0, m_0 = topk(8, gate='ste')\n"
        "mask       = selected_0\nscore      = score\ngate_k     = ste(m_0)\ngate_v     = ste(m_0)\ngate_logit = 1.0",
    ),
    "straight_through_the_identity": (
        topk(8, gate="ste_identity") & topk(8, gate="ste_sigmoid"),
        "selection  selected_0, m_0 = topk(8, gate='ste_identity')\n"
        "selection  selected_1, m_1 = topk(8, gate='ste_sigmoid')\n"
        "mask       = selected_0 & selected_1\nscore      = score\n"
        "gate_k     = ste_identity(m_0) * ste_sigmoid(m_1)\ngate_v     = ste_identity(m_0) * ste_sigmoid(m_1)\n"
        "gate_logit = 1.0",
    ),
    "gates_multiply": (
        topk(8, gate="v") & topk(9, scores="u", gate="v"),
        "selection  selected_0, m_0 = topk(8, gate='v')\nselection  selected_1, m_1 = topk(9, scores='u', gate='v')\n"
        "mask       = selected_0 & selected_1\nscore      = score\ngate_k     = 1.0\n"
        "gate_v     = m_0 * m_1\ngate_logit = 1.0",
    ),
    "larger_gate": (
        topk(8, gate="v") | topk(9, scores="u", gate="v"),
        "selection  selected_0, m_0 = topk(8, gate='v')\nselection  selected_1, m_1 = topk(9, scores='u', gate='v')\n"
        "mask       = selected_0 | selected_1\nscore      = score\ngate_k     = 1.0\n"
        "gate_v     = where(selected_0 & (~selected_1 | (m_0 >= m_1)), m_0, m_1)\ngate_logit = 1.0",
    ),
    "table": (
        P["sliding_window"](per_head([8, 16])),
        "table      table_0 = [8, 16]\n"
        f"mask       = (kv <= q) & (q - kv < table_0[h * 2 // heads])\nscore      = score\n{NO_GATES}",
    ),
    "pattern_of_head": (
        per_head([P["causal"](), P["sinks"](4)]),
        "mask       = ((h * 2 // heads == 0) & (kv <= q)) | (~(h * 2 // heads == 0) & (kv < 4))\n"
        f"score      = score\n{NO_GATES}",
    ),
    "sink": (
        (P["causal"]() + 1) & P["learned_sinks"](),
        f"tensor     sink_logits: real[h] learnable\nmask       = kv <= q\nscore      = score + 1\n{NO_GATES}\n"
        "sink       = sink_logits[h]",
    ),
    "sink_of_head": (
        per_head([P["causal"]().sink(0.5), P["causal"]()]),
        f"table      table_0 = [0.5, -inf]\n"
        f"mask       = ((h * 2 // heads == 0) & (kv <= q)) | (~(h * 2 // heads == 0) & (kv <= q))\n"
        f"score      = score\n{NO_GATES}\nsink       = table_0[h * 2 // heads]",
    ),
    "blocks": (
        P["moba"](16, 2) & P["document"](),
        "tensor     doc: int[b, s]\nblocks     chosen_mean_16_2 = block_topk(2, block=16)\n"
        f"mask       = chosen_mean_16_2 & (kv <= q) & (doc[b, q] == doc[b, kv])\nscore      = score\n{NO_GATES}",
    ),
    "two_kinds_of_blocks": (
        P["moba"](16, 2) | P["quest"](16, 2) | P["moba"](16, 2),
        "blocks     chosen_mean_16_2 = block_topk(2, block=16)\n"
        "blocks     chosen_bounds_16_2 = block_topk(2, block=16, score='bounds')\n"
        f"mask       = (chosen_mean_16_2 & (kv <= q)) | (chosen_bounds_16_2 & (kv <= q))\nscore      = score\n"
        f"{NO_GATES}",
    ),
    "boundaries": (
        P["document"](cu_seqlens="ends"),
        f"tensor     ends: int[s] boundaries\nmask       = ends[q] == ends[kv]\nscore      = score\n{NO_GATES}",
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_program_text(name: str) -> None:
    pattern, text = GOLDEN[name]
    assert str(lower(pattern.node)) == text


def test_one_selection_written_twice_is_resolved_once() -> None:
    program = lower((topk(8, gate="kv") & (kv < 9) | topk(8, gate="kv")).node)
    assert len(program.selections) == 1


def test_selections_that_differ_in_anything_are_two() -> None:
    for other in (topk(9), topk(8, after=1), topk(8, scores="u"), topk(8, segments="doc"), topk(8, gate="v")):
        assert len(lower((topk(8) | other).node).selections) == 2


def test_a_selection_that_simplification_removes_is_not_resolved() -> None:
    program = lower(((topk(8, scores="u") & False) | topk(9)).node)
    assert [s.k for s in program.selections] == [9]
    assert str(program.mask) == "Selected(number=0)"


def test_gates_of_one_selection_on_both_sides_stay_one() -> None:
    program = lower((topk(8, gate="kv") | topk(8, gate="kv")).node)
    assert program.gate_k == Gate(0)


def test_names_leave_no_trace() -> None:
    assert lower(P["causal"]().node) == lower((kv <= q).node)


@pytest.mark.parametrize(
    ("text", "shown"), [("alibi", "alibi()"), ("softcap(30.0)", "softcap(30.0)"), ("q - kv", "q - kv")]
)
def test_a_score_alone_is_no_pattern(text: str, shown: str) -> None:
    with pytest.raises(ExpressionError) as caught:
        lower(fs.parse(text).node)
    assert caught.value.argument == f"pattern {shown}"
    assert caught.value.mend.startswith(f"Add it to the keys it scores: full() + {shown}")
