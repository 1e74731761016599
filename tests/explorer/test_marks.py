"""Which lines of kernels come from the user's pattern: marks, folds and differences."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("triton")

import flexsparse as fs
from flexsparse import _torch
from flexsparse.explorer.difference import difference
from flexsparse.explorer.flex_marks import mark_flex
from flexsparse.explorer.marks import Mark, MarkedText
from flexsparse.explorer.origins import Origins
from flexsparse.ir.nodes import walk
from flexsparse.ir.program import program_text

generates = pytest.mark.skipif(
    _torch.VERSION < (2, 11), reason=f"torch {_torch.VERSION} lacks private names that generating code takes"
)


def marked(text: str, stage: str = "triton", backend: str = "auto", **shapes: Any) -> dict[str, list[Mark]]:
    """The marks of the lines that have one, by the line."""
    attention = fs.compile(text, backend=backend)
    attention.bind(**{"q_len": 256, "heads": 2, "head_dim": 64, "device": "cuda", **shapes})
    found: dict[str, list[Mark]] = {}
    for line, mark in attention.marked_code(stage).lines:
        if mark is not None:
            found.setdefault(line.strip(), []).append(mark)
    return found


def origins_of(text: str) -> dict[str, tuple[str, ...]]:
    """The origins of every operation of a mask and, behind "score: ", of a score."""
    attention = fs.compile(text)
    origins, program = Origins(fs.parse(text).node, attention.ir), attention.ir
    found = {program_text(n): origins.of(n, "mask") for n in walk(program.mask)}
    return found | {f"score: {program_text(n)}": origins.of(n, "score") for n in walk(program.score)}


def test_origins_are_the_innermost_names() -> None:
    found = origins_of("(causal() & sliding_window(7) & (q - kv < 5)) + alibi()")
    assert found["kv <= q"] == ("causal()", "sliding_window(7)")
    assert found["q - kv < 7"] == ("sliding_window(7)",)
    # The user's own comparison has no name, though sliding_window() subtracts as well.
    assert found["q - kv < 5"] == ()
    assert found["score: abs(q - kv)"] == ("alibi()",)
    assert found["score: q - kv"] == ("alibi()",)
    assert found["score: score"] == ()
    hybrid = origins_of("sparsek_window(16, 32) & document()")
    assert hybrid["q - kv < 32"] == ("sliding_window(32)",)
    assert hybrid["selected_0"] == ("sparsek_window(16, 32)",)
    assert hybrid["doc[b, q] == doc[b, kv]"] == ("document()",)
    assert origins_of("topk(16) | sinks(2)")["selected_0"] == ("topk(16)",)


def test_lines_of_kernels_that_gather() -> None:
    found = marked("((sliding_window(96) | sparsek(64, after=96)) & (q - kv < 200)).score(softcap(30))")
    (near,) = found["visible = seen & ((kv <= q) & (q - kv < 96) & (q - kv < 200))"]
    assert near == Mark("mask", "(kv <= q) & (q - kv < 96) & (q - kv < 200)", ("sliding_window(96)",))
    # Slots: selected, and within what the user asks besides.
    (slots,) = found["visible = seen & (q - kv < 200)"]
    assert slots == Mark("mask", "selected_0 & (q - kv < 200)", ("sparsek(64, after=96)",))
    assert found["seen = q < gone"] == [Mark("mask", "selected_0", ("sparsek(64, after=96)",))]
    # Where keys enter: either of both.
    line = "visible = seen & ((kv <= q) & (q - kv < 96) & (q - kv < 200) | selected_0 & (q - kv < 200))"
    (joined,) = found[line]
    assert joined.kind == "mask"
    assert joined.origins == ("sliding_window(96)", "sparsek(64, after=96)")
    (enters,) = [marks for line, marks in found.items() if line.startswith("selected_0 = (kv + after_0 <= q)")]
    assert enters == [Mark("mask", "selected_0", ("sparsek(64, after=96)",))]
    gates = marked("sliding_window(96) | sparsek(64, after=96)")
    for line in ("x_0 = u_0 - known_tau_0", "m_0 = saturated(x_0, least_0)", "gate_k = m_0", "p = p * (m_0)"):
        assert set(gates[line]) == {Mark("gate", "m_0", ("sparsek(64, after=96)",))}, line
    score = [m for line, marks in found.items() if line.startswith("score = 30 * tanh(") for m in marks]
    assert set(score) == {Mark("score", "30 * tanh(score / 30)", ("softcap(30)",))}
    assert len(score) == 4
    # Loads of operands and the softmax are boilerplate.
    assert not [line for line in found if line.startswith(("key =", "value =", "p = tl.exp2", "total =", "raw ="))]


def test_gradients_are_marked_and_the_text_stays_a_program() -> None:
    found = marked("(sliding_window(96) | sparsek(64, after=96)) + alibi()", "triton-backward")
    line = "d_x_0 = tl.where((m_0 > least_0) & (m_0 < 1.0) & visible, d_raw * raw + d_gate_v, 0.0)"
    assert set(found[line]) == {Mark("gate", "m_0", ("sparsek(64, after=96)",))}
    attention = fs.compile("sliding_window(96) | sparsek(64, after=96)")
    attention.bind(q_len=256, head_dim=64)
    text = attention.code("triton")
    compile(text, "kernels", "exec")
    bare = "\n".join(line for line, _ in attention.marked_code("triton").lines)
    assert "# mask from sliding_window(96): (kv <= q) & (q - kv < 96)" in text
    assert "# mask from" not in bare
    assert attention.code("kernels").count("# mask from") >= text.count("# mask from")


@generates
def test_lines_of_flex_attention() -> None:
    found = marked("(causal() & sliding_window(77)) + alibi()", backend="flex")
    by_expression = {m.expression: m for marks in found.values() for m in marks}
    assert by_expression["q - kv < 77"] == Mark("mask", "q - kv < 77", ("sliding_window(77)",))
    assert by_expression["kv <= q"].origins == ("causal()", "sliding_window(77)")
    assert by_expression["abs(q - kv)"] == Mark("score", "abs(q - kv)", ("alibi()",))
    compared = [line for line, marks in found.items() if marks[0].expression == "q - kv < 77"]
    assert all("<" in line for line in compared)
    assert compared
    # A constant is of the mask; which part of it, the text does not say.
    (bound,) = (marks[0] for line, marks in found.items() if "tl.full([1], 77, tl.int32)" in line)
    assert (bound.kind, bound.expression, bound.origins) == ("mask", "", ())
    assert not [line for line in found if "tl.dot(" in line or "load_checked_2d" in line]


SECTION = """
def block(m, n):
    qk *= SM_SCALE
    tmp0 = (qk)
    post_mod_scores = tmp0

    if not IS_FULL_BLOCKS:
        tmp1 = (m)
        tmp2 = (n)
        tmp3 = tmp1 >= tmp2
        tmp4 = tl.load(in_ptr0 + tmp1)
        tmp5 = tmp3 & tmp4
        mask_mod_output = tmp5
        post_mod_scores = tl.where(mask_mod_output, post_mod_scores, float("-inf"))
    tmp6 = (ds)
    grad_scores = tmp6

def reduce(in_ptr):
    tmp1 = tl.load(in_ptr)
    tl.store(in_ptr, tmp1)
"""


def section(pattern: str) -> tuple[tuple[str, Mark | None], ...]:
    return mark_flex(SECTION, fs.parse(pattern).node, fs.compile(pattern).ir).lines


def test_a_section_is_marked_whatever_can_be_read_of_it() -> None:
    lines = section("causal() & (sinks(4) | document())")
    marks = {line.strip(): mark for line, mark in lines if mark is not None}
    assert marks["tmp3 = tmp1 >= tmp2"].expression == "kv <= q"
    assert marks["tmp4 = tl.load(in_ptr0 + tmp1)"] == Mark("mask")
    assert marks["tmp5 = tmp3 & tmp4"] == Mark("mask")
    assert marks["mask_mod_output = tmp5"].origins == ("causal()", "sinks(4)", "document()")
    # The pattern leaves the score as it is, and a temporary without a section is nobody's.
    assert not [line for line in marks if line.startswith(("tmp0", "grad_scores", "tmp6"))]
    assert "tmp1 = tl.load(in_ptr)" not in marks
    assert {mark.kind for mark in marks.values()} == {"mask"}
    both = section("(sliding_window(4) | sparsek(8, after=4)).score(softcap(30))")
    gated = {line.strip(): mark for line, mark in both if mark}
    assert gated["tmp0 = (qk)"] == Mark("score and gate")
    assert gated["grad_scores = tmp6"].expression.startswith("gradient of ")


def test_what_is_folded() -> None:
    mark = Mark("mask", "kv <= q", ("causal()",))
    lines = ["# k: num_warps=4", "import triton", "", "@triton.jit", "def k(", "    a,", "    b,", "):"]
    lines += [
        "    one = 1",
        "    # why",
        "    for i in range(3):",
        "        x = 1",
        "        seen = kv <= q",
        "        y = 2",
    ]
    text = MarkedText(tuple((line, mark if "seen" in line else None) for line in lines))
    folded = [line for line, _ in text.folded().lines]
    assert folded == [
        "# k: num_warps=4", "import triton", "", "@triton.jit", "def k(", "# ... 4 lines", "    # why",
        "    for i in range(3):", "        x = 1", "        seen = kv <= q", "        y = 2",
    ]  # fmt: skip
    assert [m for _, m in text.folded().lines if m] == [mark]
    assert str(text).splitlines()[-2] == "        seen = kv <= q  # mask from causal(): kv <= q"


def test_a_comment_is_cut_and_a_mark_is_not() -> None:
    long = Mark("score", "score + " + "x" * 100, ("alibi()",))
    assert str(long) == f"# score from alibi(): score + {'x' * 49}..."
    assert len(long.expression) == 108
    assert str(Mark("gate")) == "# gate"


def test_a_difference_is_one_of_lines_and_not_of_marks() -> None:
    before = MarkedText((("a = 1", Mark("mask", "x", ("old()",))), ("b = 2", None)))
    same = MarkedText((("a = 1", Mark("mask", "x", ("new()",))), ("b = 2", None)))
    after = MarkedText((("a = 1", None), ("b = 3", Mark("score"))))
    assert difference(before, same, ("A", "B")) == ""
    assert difference(before, after, ("A", "B")) == (
        "--- A\n+++ B\n@@ -1,2 +1,2 @@\n a = 1  # mask from old(): x\n-b = 2\n+b = 3  # score\n"
    )
