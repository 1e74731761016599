"""Numbers that a call gives: the result is that of the literal number, and nothing is built for another one."""

from __future__ import annotations

import os
import pathlib
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import flexsparse as fs
from flexsparse.codegen.gathered import gathered_source
from flexsparse.errors import CapturedError, ExpressionError, PatternArgumentError
from flexsparse.execution import launchers_of
from flexsparse.language import exp, h, kv, maximum, minimum, per_head, q, score, where
from flexsparse.tolerance import evaluate, judge
from tests.gathered.calls import DEVICE, call_of
from tests.runtime.compositions import P

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" or torch.cuda.is_available()
gathers = pytest.param(
    "gather", marks=pytest.mark.skipif(not INTERPRETED, reason="needs a GPU or Triton's interpreter")
)
EAGER = ("chunked", "flex_eager")
# Every pattern as a function of a window and of a cap, which stand in it in many places.
PLAIN: dict[str, Callable[[Any, Any], Any]] = {
    "window": lambda w, c: P["sliding_window"](w),
    "capped": lambda w, c: (P["causal"]() & (q - kv < 2 * w + 1)).score(P["softcap"](c)),
    "two sides": lambda w, c: P["sliding_window"](w, causal=False) + (-0.01 * w) * abs(q - kv),
    "blocks": lambda w, c: P["block_causal"](w) & (kv % w != 1),
    "by head": lambda w, c: P["sliding_window"](per_head([w, w * 3])).score(where(h < 1, score / c, score * 0.5)),
    "functions": lambda w, c: (kv <= q) + where(q - kv < w, maximum(minimum(c, 3.0), exp(-c)), c / w),
    "condition": lambda w, c: P["causal"]() & (where(w > 4, q - kv, 2 * (q - kv)) < 12),
    "real mask": lambda w, c: P["causal"]() & ((q - kv) / c < w),
    "sink": lambda w, c: P["sliding_window"](w).sink(-c),
}
SELECTED: dict[str, Callable[[Any, Any], Any]] = {
    "hybrid": lambda w, c: P["sliding_window"](w) | P["sparsek"](6, after=w),
    "two numbers": lambda w, c: (P["sinks"](2) | P["sliding_window"](w) | P["sparsek"](w + 1, after=9)) + P["alibi"](),
    "capped hybrid": lambda w, c: P["sparsek_window"](5, w).score(P["softcap"](c)),
    "inside": lambda w, c: P["sparsek"](8, gate="logit") & (q - kv < 4 * w) | (q == kv),
}
VALUES = ((5, 2.0), (1, 0.5), (17, 3.0), (80, 7.0))
pytestmark = [
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]
W, C = fs.scalar("window", 5), fs.scalar("cap", 2.0)


def same_bits(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> list[str]:
    assert got.keys() == wanted.keys()
    return [name for name, x in got.items() if not torch.equal(x, wanted[name])]


def check_values(made: Callable[[Any, Any], Any], backend: str, dtype: torch.dtype) -> None:
    """Out, lse and gradients at several values: within the policy of the oracle, and the literal pattern's bits."""
    attention = fs.compile(made(W, C), backend=backend)
    # The interpreter takes its time.
    call = call_of(made(W, C), 40 if backend == "gather" and DEVICE == "cpu" else 70, dtype)
    for window, cap in VALUES:
        literal = made(window, cap)
        numbers: Any = {
            n: v for n, v in (("window", window), ("cap", cap)) if f"scalar({n!r}" in str(attention.pattern)
        }
        got = evaluate(attention, replace(call, captured={**call.captured, **numbers}))
        assert [str(c) for c in judge(literal, got, call) if not c.holds] == []
        assert same_bits(got, evaluate(fs.compile(literal, backend=backend), call)) == [], (window, cap)


@pytest.mark.parametrize("backend", EAGER)
@pytest.mark.parametrize("name", PLAIN)
def test_plain_patterns(name: str, backend: str) -> None:
    check_values(PLAIN[name], backend, torch.float32)


@pytest.mark.parametrize("name", PLAIN)
def test_in_float64(name: str) -> None:
    check_values(PLAIN[name], "chunked", torch.float64)


@pytest.mark.parametrize("backend", [*EAGER, "gather_flex_eager", gathers])
@pytest.mark.parametrize("name", SELECTED)
def test_selections(name: str, backend: str) -> None:
    check_values(SELECTED[name], backend, torch.float32)


@pytest.mark.parametrize("backend", ["chunked", gathers])
def test_names_that_kernels_use(backend: str) -> None:
    pattern = P["sliding_window"](fs.scalar("count", 5)) | P["sparsek"](6, after=fs.scalar("length", 5))
    call = call_of(pattern, 40)
    names = {"count": 9, "length": 9}
    captured: Any = {**call.captured, **names}
    got = evaluate(fs.compile(pattern, backend=backend), replace(call, captured=captured))
    written = P["sliding_window"](9) | P["sparsek"](6, after=9)
    assert same_bits(got, evaluate(fs.compile(written, backend=backend), call)) == []


@pytest.mark.parametrize("backend", ["residue_flex_eager", "flex_eager"])
def test_beside_a_fixed_modulus(backend: str) -> None:
    """Positions are reordered by a modulus that is written; the window beside it may change."""
    check_values(lambda w, c: (kv <= q) & ((q - kv) % 5 == 0) & (q - kv < 5 * w), backend, torch.float32)


def test_a_modulus_of_the_call_is_not_reordered_by() -> None:
    attention = fs.compile((kv <= q) & ((q - kv) % W == 0), backend="residue_flex_eager")
    with pytest.raises(fs.errors.BackendError, match="no condition such as"):
        attention(*torch.randn(3, 1, 1, 20, 16))


def operands(size: int = 70, heads: int = 2) -> tuple[Any, Any]:
    return torch.randn(3, 1, heads, size, 16), torch.randn(1, heads, size)


def test_tiles_are_those_of_the_number() -> None:
    attention = fs.compile(P["sliding_window"](W), backend="chunked", block_size=16)
    for window in (1, 30, 100):
        attention(*operands()[0], window=window)
        literal = fs.compile(P["sliding_window"](window), backend="chunked", block_size=16)
        wanted = literal.bind(q_len=70, head_dim=16, heads=2).plan.tiles
        assert attention.plan.tiles == wanted
        bound = attention.with_values(window=window).bind(q_len=70, head_dim=16, heads=2)
        assert bound.plan.tiles == wanted


def test_the_plan_counts_the_slots_of_the_number() -> None:
    attention = fs.compile(P["sparsek"](fs.scalar("budget", 8)), backend="gather_flex_eager")
    for k in (8, 300):
        literal = fs.compile(P["sparsek"](k), backend="gather_flex_eager").bind(q_len=512, head_dim=16)
        assert attention.with_values(budget=k).bind(q_len=512, head_dim=16).plan.notes == literal.plan.notes


def test_no_text_has_the_number() -> None:
    """What is printed names the scalars, so another number cannot change it."""
    first, second = (
        fs.compile(SELECTED["capped hybrid"](W, C).with_values(window=n, cap=x)) for n, x in ((7913, 0.7919), (3, 1.0))
    )
    for stage in ("source", "mask_mod", "score_mod", "rows", "kernels", "canonical"):
        text = first.code(stage)
        assert text == second.code(stage)
        assert "7913" not in text
        assert "0.7919" not in text
        assert "window" in text or stage == "score_mod"
    assert "number     window = 7913" in first.code("ir")
    assert "scalar('window', 7913)" in first.code("expr")


@pytest.mark.skipif(not INTERPRETED, reason="needs a GPU or Triton's interpreter")
def test_no_number_is_a_file_or_a_kernel(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flexsparse.codegen import gathered

    monkeypatch.setenv("FLEXSPARSE_CACHE_DIR", str(tmp_path))
    gathered.load_module.cache_clear()
    attention: Any = fs.compile((P["sliding_window"](W) | P["sparsek"](6, after=W)) + 0.0321 * C, backend="gather")
    (query, key, value), scores = operands()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    query, key, value, scores = (x.to(device).requires_grad_() for x in (query, key, value, scores))
    files = []
    for window, cap in VALUES:
        attention(query, key, value, scores=scores, window=window, cap=cap).sum().backward()
        files.append(sorted(path.name for path in gathered.cached_files()))
    assert len(files[0]) == 1
    assert files == [files[0]] * len(files)


def test_triton_looks_at_no_number() -> None:
    """Kernels are not built anew for 1 and for multiples of 16."""
    pattern = P["sliding_window"](W) + 0.5 * C | P["sparsek"](6, after=W)
    assert (
        "@triton.jit(do_not_specialize=['after_0', 'c_0', 'given_window'])"
        in gathered_source(fs.compile(pattern).ir).text
    )
    assert "do_not_specialize" not in gathered_source(fs.compile(P["sparsek_window"](6, 5)).ir).text


@pytest.mark.slow
def test_compiled_flex_is_built_once() -> None:
    attention = fs.compile(PLAIN["capped"](W, C), backend="flex", recompile_budget=1)
    (query, key, value), _ = operands(150)
    for window, cap in (*VALUES, (16, 1.0)):
        got = attention(query, key, value, window=window, cap=cap)
        wanted = fs.reference(PLAIN["capped"](window, cap), query, key, value)
        assert (got - wanted).abs().max() < 1e-5
        assert attention.builds == 1
    other = attention.with_values(window=9)
    assert (other(query, key, value) - fs.reference(other.pattern, query, key, value)).abs().max() < 1e-5
    assert other.builds == 1


def test_launchers_are_those_of_every_number() -> None:
    first, second = (fs.compile(PLAIN["window"](W, C).with_values(window=n), backend="flex_eager") for n in (4, 8))
    (query, key, value), _ = operands()
    (first(query, key, value), second(query, key, value))
    at = (first.settings, False, "flex_eager")
    assert launchers_of(first.runner.node, *at) is launchers_of(second.runner.node, *at)


@pytest.mark.parametrize("backend", ["chunked", gathers])
def test_under_torch_compile(backend: str) -> None:
    """The number is a constant of the caller's graph, and right when it changes."""
    attention = fs.compile(SELECTED["capped hybrid"](W, C), backend=backend)
    (query, key, value), scores = operands()
    query.requires_grad_()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def traced(window: int, cap: float) -> Any:
        return attention(query, key, value, scores=scores, window=window, cap=cap)

    for window, cap in VALUES:
        got, wanted = traced(window, cap), attention(query, key, value, scores=scores, window=window, cap=cap)
        assert torch.equal(got, wanted)
        assert torch.equal(torch.autograd.grad(got.sum(), query)[0], torch.autograd.grad(wanted.sum(), query)[0])


# The language.


@pytest.mark.parametrize("made", [*PLAIN.values(), *SELECTED.values()])
def test_text_and_pickle_give_it_back(made: Callable[[Any, Any], Any]) -> None:
    pattern = made(W, C)
    assert fs.parse(str(pattern)) == pattern
    assert pickle.loads(pickle.dumps(pattern)) == pattern
    if "window" in str(pattern):
        assert pattern.with_values(window=6) != pattern


def test_with_values_is_another_default() -> None:
    pattern = P["head_windows"]([W, 60]) & P["sliding_window"](W)
    changed = pattern.with_values(window=9)
    assert str(changed) == "head_windows([scalar('window', 9), 60]) & sliding_window(scalar('window', 9))"
    assert changed.with_values(window=5) == pattern
    assert torch.equal(
        fs.dense_mask(changed, 40, heads=2),
        fs.dense_mask(P["head_windows"]([9, 60]) & P["sliding_window"](9), 40, heads=2),
    )


def test_masks_functions_and_checks_take_numbers() -> None:
    pattern = P["causal"]() & P["sliding_window"](W)
    at_48 = fs.block_mask(pattern, 512, window=148)
    assert torch.equal(at_48.to_dense(), fs.block_mask("causal & sliding_window(148)", 512).to_dense())
    assert not torch.equal(at_48.to_dense(), fs.block_mask(pattern, 512).to_dense())
    mask_mod, _ = pattern.to_flex(window=3)
    places = torch.arange(10)
    seen = mask_mod(torch.tensor(0), torch.tensor(0), places[:, None], places)
    assert torch.equal(seen, fs.dense_mask("sliding_window(3)", 10)[0, 0])
    (query, key, value), _ = operands()
    attention = fs.compile(pattern, backend="chunked")
    assert fs.check(attention, query, key, value, window=11)

    def wrong(q: Any, k: Any, v: Any, *, scale: Any, return_lse: bool) -> Any:
        other: Any = fs.compile("sliding_window(9)", backend="chunked")
        return other(q, k, v, scale=scale, return_lse=return_lse)

    found = fs.check(attention, query, key, value, run=wrong, window=11)
    assert not found
    assert "at key kv=" in str(found)


def test_mass_takes_numbers() -> None:
    (query, key, _), _ = operands()
    attention = fs.compile(P["sliding_window"](W))
    assert torch.equal(attention.mass(query, key, window=9), fs.compile("sliding_window(9)").mass(query, key))


def test_explain_names_them() -> None:
    attention = fs.compile(P["sliding_window"](W), backend="chunked")
    attention(*operands()[0], window=11)
    assert "pattern   sliding_window(scalar('window', 5))\nnumbers   window = 11" in str(attention.explain())
    assert attention.explain().as_dict()["numbers"] == {"window": 11}
    assert attention.explain(q_len=64, head_dim=16).as_dict()["numbers"] == {"window": 5}


def test_questions_are_for_every_number() -> None:
    pytest.importorskip("z3")
    window = P["sliding_window"](W)
    assert fs.is_causal(window)
    assert fs.implies(window, "causal")
    assert fs.equivalent(P["sliding_window"](W) | P["sliding_window"](W), window.with_values(window=9))
    verdict = fs.equivalent(window, "sliding_window(5)")
    assert verdict.holds is False
    assert "window=" in verdict.reason
    assert fs.depends_on(window, "window")


# Mistakes.


@pytest.mark.parametrize(
    ("numbers", "error", "says"),
    [
        ({"window": 2.5}, PatternArgumentError, r"window: got 2\.5, float, expected an integer, as its default is"),
        ({"window": True}, PatternArgumentError, "window: got True, bool, expected an integer"),
        ({"window": torch.tensor(3)}, PatternArgumentError, r"window: got Tensor, .* Pass window=window\.item\(\)"),
        ({"window": 0}, PatternArgumentError, r"sliding_window\(window\): got 0, expected an integer of at least 1"),
        ({"cap": -1.0}, PatternArgumentError, r"softcap\(cap\): got -1\.0, expected a number above 0"),
        ({"cap": float("nan")}, PatternArgumentError, "cap: got NaN"),
        ({"windw": 3}, CapturedError, r"windw: got the number 3, expected .* Did you mean 'window'\?"),
        ({"windw": torch.tensor(3)}, CapturedError, r"windw: got a tensor .* Did you mean 'window'\?"),
    ],
)
def test_a_wrong_number_is_refused(numbers: Any, error: Any, says: str) -> None:
    attention: Any = fs.compile(P["sliding_window"](W).score(P["softcap"](C)), backend="chunked")
    with pytest.raises(error, match=says):
        attention(*operands()[0], **numbers)
    attention(*operands()[0], window=3)


def test_a_pattern_without_numbers_takes_none() -> None:
    with pytest.raises(
        CapturedError, match=r"window: got the number 3, expected no numbers\. Pass a tensor, or write scalar\('window'"
    ):
        fs.compile("causal", backend="chunked")(*operands()[0], window=3)
    with pytest.raises(PatternArgumentError, match=r"with_values\(k\): got 3, expected a scalar of causal\(\)"):
        P["causal"]().with_values(k=3)
    with pytest.raises(PatternArgumentError, match=r"sparsek\(k\): got 0, expected an integer of at least 1"):
        P["sparsek"](fs.scalar("budget", 4)).with_values(budget=0)


@pytest.mark.parametrize("name", ["q", "query", "argument", "c_0", "two words", "class", "min"])
def test_a_name_that_means_something_else_is_refused(name: str) -> None:
    with pytest.raises(PatternArgumentError, match=r"scalar\(name\): got .*, expected an identifier"):
        fs.scalar(name, 3)


@pytest.mark.parametrize("default", [True, "3", None, float("nan")])
def test_a_default_that_is_no_number_is_refused(default: Any) -> None:
    with pytest.raises(PatternArgumentError, match=r"scalar\('w', default\): got .*, expected an integer or a float"):
        fs.scalar("w", default)


def test_one_name_is_one_number() -> None:
    with pytest.raises(CapturedError, match=r"scalar 'window': got two declarations, with the defaults 5 and 6"):
        fs.compile(P["sliding_window"](W) | (q - kv == fs.scalar("window", 6)))
    with pytest.raises(CapturedError, match=r"scalar 'scores': got a name that is also a tensor of the call"):
        fs.compile(P["sliding_window"](fs.scalar("scores", 6)) | P["sparsek"](3))


def test_what_shapes_a_pattern_is_known_when_it_is_written() -> None:
    with pytest.raises(PatternArgumentError, match=r"bigbird\(random=scalar\('window', 5\)\): got a number that each"):
        P["bigbird"](16, W)
    with pytest.raises(PatternArgumentError, match=r"sparsek_window\(window\): got scalar\('cap', 2\.0\), Score"):
        P["sparsek_window"](3, C)
    with pytest.raises(PatternArgumentError, match=r"topk\(k\): got q, expected an integer"):
        fs.topk(q)
    with pytest.raises(ExpressionError):
        _ = score // C
