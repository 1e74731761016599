"""Proofs: what is claimed holds, what is refuted comes with a pair that shows it, and the rest is unknown."""

from __future__ import annotations

import sys

import pytest
import torch

import flexsparse as fs
from flexsparse.dense import dense_mask
from flexsparse.errors import SettingError
from flexsparse.expression import Pattern


def pattern(text: str) -> Pattern:
    result = fs.parse(text)
    assert isinstance(result, Pattern)
    return result


EQUIVALENT = [
    ("causal & sliding_window(5)", "sliding_window(5)"),
    ("causal & sliding_window(5, causal=False)", "sliding_window(5)"),
    ("document & causal", "causal & document"),
    ("~(q < kv)", "causal"),
    ("dilated_window(6, 1)", "sliding_window(6)"),
    ("prefix_lm(0)", "causal"),
    ("causal ^ sliding_window(4)", "causal & ~sliding_window(4)"),
    ("q // 2 == kv // 2", "(q - q % 2) == (kv - kv % 2)"),
    ("(q % 3 == 0) | (q % 3 == 1) | (q % 3 == 2)", "full"),
]
DIFFERENT = [
    ("sliding_window(5)", "sliding_window(6)"),
    ("sliding_window(500)", "sliding_window(501)"),
    ("causal", "kv < q"),
    ("sinks(4)", "sinks(4) & causal"),
    ("q // 2 == kv // 2", "q // 3 == kv // 3"),
    ("(kv - q) % 3 == 0", "truncmod(kv - q, 3) == 1"),
]


@pytest.mark.parametrize(("a", "b"), EQUIVALENT)
def test_equivalent_masks(a: str, b: str) -> None:
    verdict = fs.equivalent(pattern(a), pattern(b))
    assert verdict.holds is True, verdict
    assert bool(verdict)


@pytest.mark.parametrize(("a", "b"), DIFFERENT)
def test_different_masks_come_with_a_pair_that_shows_it(a: str, b: str) -> None:
    verdict = fs.equivalent(pattern(a), pattern(b))
    assert verdict.holds is False
    assert verdict.counterexample is not None
    at = (0, 0, verdict.counterexample["q"], verdict.counterexample["kv"])
    length = max(at) + 1
    first, second = (dense_mask(pattern(text), length)[at] for text in (a, b))
    assert bool(first) != bool(second), verdict


def test_implies() -> None:
    assert fs.implies(pattern("dilated_window(5, 3)"), pattern("sliding_window(15)")).holds is True
    assert fs.implies(pattern("sliding_window(15)"), pattern("dilated_window(5, 3)")).holds is False
    assert fs.implies(pattern("q // 4 == kv // 4"), pattern("abs(q - kv) < 4")).holds is True
    assert fs.implies(pattern("document & causal"), pattern("document")).holds is True


def test_is_causal() -> None:
    for text in ("causal", "sparsek_window(4, 8)", "document & causal", "causal & (sliding_window(3) | sinks(4))"):
        assert fs.is_causal(pattern(text)).holds is True, text
    for text in ("sinks(4)", "document", "prefix_lm(3)", "sparsek(4) | sinks(4)"):
        verdict = fs.is_causal(pattern(text))
        assert verdict.holds is False, text
        assert verdict.counterexample is not None
        assert verdict.counterexample["kv"] > verdict.counterexample["q"]


def test_selections_are_known_to_be_causal_without_z3(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "z3", None)
    for text in (
        "sparsek(3)",
        "sliding_window(5) | sparsek(3, after=5)",
        "(sliding_window(5) | sparsek(3)) & document",
    ):
        assert fs.is_causal(text).holds is True, text
    assert fs.is_causal("sparsek(3) | sinks(4)").holds is None
    assert fs.implies("sparsek(3, after=5)", "kv <= q - 5").holds is True
    assert fs.implies("sparsek(3, after=5)", "kv <= q - 6").holds is None


def test_depends_on() -> None:
    assert fs.depends_on(pattern("document & causal"), "b").holds is True
    assert fs.depends_on(pattern("causal & sliding_window(4)"), "b").holds is False
    assert fs.depends_on(pattern("(q - q + kv) < 4"), "q").holds is False, "canonical forms drop what cancels"
    assert fs.depends_on(pattern("sparsek(4)"), "scores").holds is True
    with pytest.raises(SettingError, match="depends_on\\(name\\): got 'docs', expected one of b, h, q, kv"):
        fs.depends_on(pattern("document"), "docs")


def test_simplify_keeps_the_mask() -> None:
    for text in ("causal & sliding_window(3)", "~(causal & sliding_window(3))", "(2 * q - 2 * kv <= 5) | (q - kv < 9)"):
        simple = fs.simplify(pattern(text))
        assert bool((dense_mask(simple, 20) == dense_mask(pattern(text), 20)).all())
    assert str(fs.simplify(pattern("causal & sliding_window(3) & sliding_window(5)"))) == (
        "(kv - q <= 0) & (q - kv <= 2)"
    )


PATTERN_LEVEL = [
    ("(causal + 1.0) & (causal + 1.0)", "((kv - q <= 0) + 1.0) & ((kv - q <= 0) + 1.0)"),
    ("(causal + 1.0) | full", "((kv - q <= 0) + 1.0) | True"),
    ("causal.sink(0.5) & causal", "(kv - q <= 0).sink(0.5) & (kv - q <= 0)"),
    ("causal.sink(0.5) & ~full", "(kv - q <= 0).sink(0.5) & False"),
    ("(causal & causal).sink(1 + 1)", "(kv - q <= 0).sink(2)"),
]


@pytest.mark.parametrize(("text", "simple"), PATTERN_LEVEL)
def test_simplify_keeps_scores_and_sinks(text: str, simple: str) -> None:
    found = fs.simplify(pattern(text))
    assert str(found) == simple
    query = torch.randn(1, 2, 9, 4, dtype=torch.float64)
    for mine, theirs in zip(
        *(fs.reference(p, query, query, query, return_lse=True) for p in (found, text)), strict=True
    ):
        assert torch.equal(mine, theirs)


def test_equivalent_masks_with_other_sinks_say_so() -> None:
    verdict = fs.equivalent("causal.sink(0)", "causal")
    assert verdict.holds is True
    assert verdict.reason == "the canonical forms agree; this is of the masks, the sinks differ"
    assert fs.equivalent("causal.sink(1 + 1)", "causal.sink(2)").reason == "the canonical forms agree"
    assert fs.is_causal("causal.sink(0)").holds is True


def test_without_z3_the_answer_is_unknown_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "z3", None)
    verdict = fs.equivalent(pattern("causal & sliding_window(5, causal=False)"), pattern("sliding_window(5)"))
    assert verdict.holds is None
    assert "pip install flexsparse[proofs]" in verdict.reason
    assert not verdict


def test_what_z3_does_not_model_stays_unknown() -> None:
    verdict = fs.equivalent(pattern("exp(kv) < 3.0"), pattern("kv < 2"))
    assert verdict.holds is not True
