"""``flexsparse.check``: real faults, put in one at a time, are found, and named by element, key and sub-expression."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import flexsparse
from flexsparse.analysis.tiles import EMPTY, classify
from flexsparse.checks import Checked
from flexsparse.codegen.emitter import Emitter
from flexsparse.ir.nodes import Apply, Node
from flexsparse.language import kv, q
from flexsparse.pipeline import compile_pattern, forget_tiles
from flexsparse.runtime import chunked
from flexsparse.tolerance import evaluate

B, H, H_KV, S, D = 2, 4, 2, 24, 8
HYBRID = "causal() & (sliding_window(4) | sinks(2) | sparsek(3, after=4))"


def _operands(dtype: torch.dtype = torch.float32, length: int = S) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    query, key, value = (torch.randn(B, heads, length, D).to(dtype) for heads in (H, H_KV, H_KV))
    return query, key, value


def _check(pattern: str, backend: str = "chunked", run: Any = None, dtype: torch.dtype = torch.float32) -> Checked:
    attention = flexsparse.compile(pattern, backend=backend)
    query, key, value = _operands(dtype)
    given: dict[str, Any] = {}
    if "sparsek" in pattern:
        given["scores"] = torch.randn(B, H_KV, S)
    if "document" in pattern:
        given["doc"] = torch.arange(S).expand(B, S) // 7
    if "relative_bias" in pattern:
        given["bias"] = torch.randn(H, 11)
    if "learned_sinks" in pattern:
        given["sink_logits"] = torch.randn(H)
    return flexsparse.check(attention, query, key, value, run=run, **given)


@pytest.fixture
def fresh() -> Iterator[None]:
    """What is compiled during a test is compiled for it, and forgotten."""
    compile_pattern.cache_clear()
    forget_tiles()
    yield
    compile_pattern.cache_clear()
    forget_tiles()


@pytest.fixture
def emits(fresh: None, monkeypatch: pytest.MonkeyPatch) -> Callable[[Node, Node], None]:
    """From now on, the code generator prints one node as another."""

    def instead(right: Node, wrong: Node) -> None:
        usual = Emitter._render
        monkeypatch.setattr(Emitter, "_render", lambda self, node: usual(self, wrong if node == right else node))

    return instead


def _node(text: str) -> Node:
    return flexsparse.parse(text).node


# torch's own, while it traces FlexAttention.
@pytest.mark.filterwarnings("ignore:The .grad attribute")
@pytest.mark.parametrize("backend", ["chunked", "flex_eager", "reference"])
@pytest.mark.parametrize(
    "pattern",
    [
        "causal()",
        "causal() & (kv > 4)",
        "causal() & document() + alibi()",
        HYBRID,
        "(causal() + relative_bias(3)).score(softcap(2.0))",
        "causal() & sliding_window(1) & learned_sinks()",
        "sparsek(4, gate='logit')",
        "moba(4, 2)",
    ],
)
def test_what_is_right_holds(pattern: str, backend: str) -> None:
    if "learned_sinks" in pattern:
        pattern = "learned_sinks() & causal() & sliding_window(1)"
    found = _check(pattern, backend, dtype=torch.float64)
    assert found, found
    assert found.lines() == []
    assert (found.wrong, found.cause, found.changed, found.nan_wrong) == ((), None, (), ())
    assert str(found).endswith("holds")


def test_a_wrong_mask_is_found_in_its_sub_expression(emits: Callable[[Node, Node], None]) -> None:
    """The window's edge is printed one too narrow."""
    emits(_node("q - kv < 4"), _node("q - kv < 3"))
    found = _check("causal() & (sliding_window(4) | sinks(2))")
    assert not found
    first = found.wrong[0]
    # Query 5 is the first whose window ends at a key, 2, that is no sink.
    assert (first.result, first.at) == ("out", {"b": 0, "h": 0, "q": 5, "d": 0})
    assert found.cause is not None
    assert (found.cause.part, found.cause.kv) == ("mask", 2)
    assert found.cause.expression == "q - kv < 4"
    assert str(found.cause) == "key kv=2: in the mask, q - kv < 4: expected seen, got hidden"
    assert (found.cause.expected, found.cause.got) == (1.0, 0.0)


def test_a_wrong_number_in_a_score_is_found_in_its_sub_expression(emits: Callable[[Node, Node], None]) -> None:
    distance = Apply("sub", (_node("q"), _node("kv")))
    emits(distance, Apply("sub", (_node("q"), Apply("add", (_node("kv"), _node("h"))))))
    pattern = "causal() + where(q - kv > 5, -0.5, 0.0) * 1.0 + cos(1.0 * (q - kv))"
    found = _check(pattern)
    assert found.cause is not None
    assert found.cause.part == "score"
    assert found.cause.expression == "q - kv"
    # Head 0 is right, head 1 is the first that is not.
    assert found.wrong[0].at["h"] == 1
    assert found.cause.got == found.cause.expected - 1


def test_functions_that_differ_as_a_whole_name_the_parts_that_decide(fresh: None) -> None:
    """Every part is right by itself, but their combination lets key 16 through for query 20."""
    pattern = "causal() & sliding_window(4) & document()"
    compiled = compile_pattern(_node(pattern), False)
    build = compiled.generated.build

    def wider(**values: Any) -> dict[str, Any]:
        functions = build(**values)
        mask = functions["mask_mod"]
        return {**functions, "mask_mod": lambda b, h, q, kv: mask(b, h, q, kv) | ((q == 20) & (kv == 16) & (b == 1))}

    object.__setattr__(compiled, "generated", replace(compiled.generated, build=wider))
    found = _check(pattern)
    assert found.wrong[0].at == {"b": 1, "h": 0, "q": 20, "d": 0}
    assert found.cause is not None
    assert (found.cause.part, found.cause.kv, found.cause.expression) == ("mask", 16, "sliding_window(4)")
    assert "each part agrees by itself; sliding_window(4) decides" in found.cause.says


def test_a_wrong_gate_and_a_wrong_sink_are_told_apart(fresh: None) -> None:
    for pattern, name, part in ((HYBRID, "value_gate", "gate on V"), ("causal().sink(0.5)", "sink_logit", "sink")):
        compiled = compile_pattern(_node(pattern), False)
        build = compiled.generated.build

        def spoiled(build: Any = build, name: str = name, **values: Any) -> dict[str, Any]:
            functions = build(**values)
            return {**functions, name: lambda *at: 0.9 * functions[name](*at)}

        object.__setattr__(compiled, "generated", replace(compiled.generated, build=spoiled))
        found = _check(pattern)
        assert not found
        assert found.cause is not None
        assert found.cause.part == part
        assert found.cause.got == pytest.approx(0.9 * found.cause.expected)


def test_a_tile_that_is_left_out_is_named(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = classify

    def without_a_tile(*arguments: Any, **named: Any) -> Any:
        tiles = usual(*arguments, **named)
        tiles.kinds[..., 1, 0] = EMPTY
        return tiles

    monkeypatch.setattr("flexsparse.pipeline.classify", without_a_tile)
    attention = flexsparse.compile("causal()", backend="chunked", block_size=16)
    found = flexsparse.check(attention, *_operands())
    assert found.wrong[0].at["q"] == 16
    assert found.cause is not None
    assert (found.cause.part, found.cause.kv, found.cause.expression) == ("tiles", 0, "causal()")
    assert "a tile that is left out, of 16 from [16, 0]" in str(found)


def _spoiled(change: Callable[[Tensor, Tensor, Tensor], Tensor], pattern: str = "causal()") -> Checked:
    """The check of a backend whose softmax is changed: ``change(weights, q, kv)``."""
    attention = flexsparse.compile(pattern, backend="reference")

    def run(query: Tensor, key: Tensor, value: Tensor, **named: Any) -> Any:
        weights, lse = attention(query, key, torch.eye(S).expand(B, H_KV, S, S).to(query), **named)
        q, kv = torch.arange(S).view(-1, 1), torch.arange(S)
        return change(weights, q, kv) @ value.repeat_interleave(H // H_KV, 1), lse

    return _check(pattern, run=run)


def test_a_backend_that_shows_a_hidden_key_is_named() -> None:
    found = _spoiled(lambda w, q, kv: w + 0.25 * ((q == 7) & (kv == 9)))
    assert found.backend == "run"
    assert found.wrong[0].at == {"b": 0, "h": 0, "q": 7, "d": 0}
    assert found.cause is not None
    assert (found.cause.part, found.cause.kv, found.cause.expression) == ("mask", 9, "causal()")
    assert "the backend's mask; the generated one is right" in found.cause.says


def test_a_backend_with_a_wrong_weight_names_its_key() -> None:
    found = _spoiled(lambda w, q, kv: w * torch.where((q == 11) & (kv == 5), 1.5, 1.0))
    assert found.wrong[0].at == {"b": 0, "h": 0, "q": 11, "d": 0}
    assert found.cause is not None
    assert (found.cause.part, found.cause.kv) == ("arithmetic", 5)
    assert found.cause.got == pytest.approx(1.5 * found.cause.expected, rel=1e-3)


def test_a_nan_in_the_output_is_placed_and_is_no_keys() -> None:
    attention = flexsparse.compile("causal()", backend="chunked")

    def run(*operands: Tensor, **named: Any) -> Any:
        out, lse = attention(*operands, **named)
        hole = torch.zeros_like(out)
        hole[1, 2, 13, 4] = math.nan
        return out + hole, lse

    found = _check("causal()", run=run)
    first = found.wrong[0]
    assert (first.result, first.at) == ("out", {"b": 1, "h": 2, "q": 13, "d": 4})
    assert math.isnan(first.got)
    assert math.isfinite(first.expected)
    assert [c.wrong for c in found.comparisons if c.name == "out"] == [1]
    assert found.cause is not None
    assert (found.cause.part, found.cause.kv) == ("arithmetic", None)
    assert "[b=1, h=2, q=13]: no key is to blame: where every value is 0, got nan" in str(found)


def test_a_wrong_gradient_is_placed_and_the_forward_pass_is_not_blamed(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = chunked.gradients

    def spoiled(*arguments: Any) -> Any:
        found = usual(*arguments)
        if found[1] is not None:
            found[1][1, 0, 6, 2] += 5.0
        return found

    monkeypatch.setattr(chunked, "gradients", spoiled)
    found = _check("causal()")
    (only,) = found.wrong
    assert (only.result, only.at) == ("d key", {"b": 1, "kv_head": 0, "kv": 6, "d": 2})
    assert only.got == pytest.approx(only.expected + 5, rel=1e-4)
    assert found.cause is None


def test_gradients_of_tensors_are_placed_by_their_own_dimensions(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = evaluate

    def spoiled(*arguments: Any) -> Any:
        found = usual(*arguments)
        found["d bias"][3, 1] += 9.0
        found["d scores"][1, 1, 20] -= 9.0
        return found

    monkeypatch.setattr("flexsparse.checks.evaluate", spoiled)
    found = _check(f"({HYBRID}) + relative_bias(5)")
    places = {element.result: list(element.at.values()) for element in found.wrong}
    assert places == {"d bias": [3, 1], "d scores": [1, 1, 20]}
    assert dict(found.wrong[0].at if found.wrong[0].result == "d scores" else found.wrong[1].at) == {
        "b": 1,
        "head": 1,
        "kv": 20,
    }


def test_a_backend_that_changes_between_runs_is_caught() -> None:
    attention, runs = flexsparse.compile("causal()", backend="chunked"), itertools.count()

    def run(*operands: Tensor, **named: Any) -> Any:
        out, lse = attention(*operands, **named)
        noise = torch.zeros_like(out)
        noise[1, 3, 2, 7] = 1e-7 * next(runs)
        return out + noise, lse

    found = _check("causal()", run=run)
    assert all(c.holds for c in found.comparisons)
    assert not found
    assert {e.result: dict(e.at) for e in found.changed} == {"out": {"b": 1, "h": 3, "q": 2, "d": 7}}
    assert "two runs differ: out[b=1, h=3, q=2, d=7]" in str(found)


def test_a_nan_that_is_swallowed_or_spreads_is_caught() -> None:
    attention = flexsparse.compile("causal()", backend="chunked")

    def swallows(query: Tensor, key: Tensor, value: Tensor, **named: Any) -> Any:
        out, lse = attention(query.nan_to_num(0.0), key, value.nan_to_num(0.0), **named)
        return out, lse

    found = _check("causal()", run=swallows)
    assert all(c.holds for c in found.comparisons)
    assert [line.split(" is swallowed")[0][:12] for line in found.nan_wrong] == ["NaN in query", "NaN in value"]
    assert not found

    def spreads(query: Tensor, key: Tensor, value: Tensor, **named: Any) -> Any:
        out, lse = attention(query, key, value, **named)
        return out + 0 * out.sum(), lse

    (said,) = _check("causal()", run=spreads).nan_wrong
    assert "reaches another row, out[b=0, h=0, q=0, d=0]" in said


def test_rows_that_see_no_key_must_be_zero() -> None:
    attention = flexsparse.compile("causal() & (kv > 4)", backend="chunked")

    def run(*operands: Tensor, **named: Any) -> Any:
        out, lse = attention(*operands, **named)
        return out + 1e-8 * torch.isneginf(lse).unsqueeze(-1), lse

    found = _check("causal() & (kv > 4)", run=run)
    assert found.empty_rows == B * H * 5
    assert found.empty_wrong == ("out",)
    assert not found


def test_nan_scores_must_be_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from flexsparse.runtime import inputs

    assert _check("sparsek(4)").nan_wrong == ()
    monkeypatch.setattr(inputs, "refuse_nan", lambda *arguments: None)
    assert _check("sparsek(4)").nan_wrong == ("NaN in scores is not refused",)


@pytest.mark.filterwarnings("ignore::flexsparse.BackendNotice")
def test_text_and_patterns_are_compiled_and_mistakes_keep_their_errors() -> None:
    query, key, value = _operands()
    assert flexsparse.check(kv <= q, query, key, value)
    assert flexsparse.check("causal()", query, key, value)
    with pytest.raises(flexsparse.errors.ShapeError, match="value: got"):
        flexsparse.check("causal()", query, key[:, :, :5], value)
    with pytest.raises(flexsparse.errors.CapturedError, match="scores"):
        flexsparse.check("sparsek(4)", query, key, value)
