"""``compile`` and what it gives: stages, plan, explanation, notices, and settings that are checked."""

from __future__ import annotations

import json
import pickle
import warnings
from typing import Any

import pytest
import torch

import flexsparse as fs
from flexsparse import compiler
from flexsparse.errors import BackendError, BackendNotice, DeviceError, NotBoundError, SettingError, ShapeError
from flexsparse.ir.program import Program
from flexsparse.patterns import catalogue
from tests.helpers import assert_same_result, make_inputs, oracle, run

P: Any = catalogue()
HYBRID = P["causal"]() & (P["sliding_window"](8) | P["sparsek"](4, after=8)) + P["alibi"]()


@pytest.fixture
def fresh_notices() -> None:
    """As in a new process: no notice has been said."""
    compiler._say_once.cache_clear()


def test_every_stage_can_be_read() -> None:
    attention = fs.compile(HYBRID)
    assert attention.pattern == HYBRID
    assert isinstance(attention.ir, Program)
    assert attention.code("expr") == str(HYBRID)
    assert attention.code("ir") == str(attention.ir)
    assert attention.code("source") == attention.source
    assert attention.code("mask_mod").startswith("def mask_mod(b, h, q, kv):")
    assert attention.code("score_mod").startswith("def score_mod(score, b, h, q, kv):")
    attention.bind(q_len=64, head_dim=16)
    assert attention.code("plan") == str(attention.explain())
    assert repr(attention) == f"flexsparse.compile({str(HYBRID)!r}, backend='auto')"


def test_text_and_expression_compile_to_the_same() -> None:
    text = "causal & (sliding_window(8) | sparsek(4, after=8)) + alibi"
    first, second = fs.compile(text), fs.compile(HYBRID)
    assert first.pattern == second.pattern
    assert first.ir == second.ir
    assert first.source == second.source
    inputs = make_inputs(["scores"])
    results = [
        fs.compile(p, backend="chunked")(inputs.query, inputs.key, inputs.value, **inputs.captured)
        for p in (text, HYBRID)
    ]
    assert torch.equal(*results)


def test_equal_patterns_share_one_compilation() -> None:
    assert fs.compile("causal & sinks(4)").ir is fs.compile(P["causal"]() & P["sinks"](4)).ir


SETTINGS: list[tuple[dict[str, Any], str]] = [
    (
        {"backend": "chunkd"},
        "backend: got 'chunkd', expected one of 'auto', 'gather', 'gather_flex', 'gather_flex_eager', "
        "'residue_flex', 'residue_flex_eager', 'flex', 'flex_eager', 'chunked', 'reference'. Did you mean 'chunked'?",
    ),
    ({"fallback": "dense"}, "fallback: got 'dense', expected None or 'reference'."),
    ({"deterministic": "yes"}, "deterministic: got 'yes', expected None, True or False."),
    ({"dynamic": 3}, "dynamic: got 3, expected True or False."),
    ({"kernel_options": [1]}, "kernel_options: got [1], expected a dictionary of options, or None."),
    ({"block_size": 100}, "block_size: got 100, expected a multiple of 16, such as 128."),
    ({"block_size": 0}, "block_size: got 0, expected a multiple of 16, such as 128."),
    ({"block_size": 64.0}, "block_size: got 64.0, expected a multiple of 16, such as 128."),
]


@pytest.mark.parametrize(("options", "message"), SETTINGS, ids=[m.split(",")[0] for _, m in SETTINGS])
def test_settings_are_checked_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError) as caught:
        fs.compile("causal", **options)
    assert str(caught.value) == message


def test_unknown_stage_is_refused() -> None:
    with pytest.raises(SettingError) as caught:
        fs.compile("causal").code("scoremod")
    assert str(caught.value) == (
        "stage: got 'scoremod', expected one of 'expr', 'canonical', 'ir', 'tiles', 'plan', 'source', 'mask_mod', "
        "'score_mod', 'rows', 'kernels', 'graph', 'triton', 'triton-backward', 'ttir', 'ttgir', 'llvm', 'ptx', 'sass', "
        "'amdgcn', 'resources', 'cpp'. "
        "Did you mean 'score_mod'?"
    )


@pytest.mark.parametrize("ask", [lambda a: a.plan, lambda a: a.explain(), lambda a: a.code("plan")])
def test_a_plan_needs_shapes(ask: Any) -> None:
    with pytest.raises(NotBoundError) as caught:
        ask(fs.compile("causal"))
    assert str(caught.value) == (
        "plan: got a compiled pattern that has met no shapes, expected a call, or bind(q_len=..., head_dim=..., ...). "
        "Call it once, or give shapes first: bind(q_len=4096, head_dim=64, heads=8)."
    )


def test_bind_makes_the_plan_without_tensors() -> None:
    attention = fs.compile("causal", backend="chunked", block_size=64)
    bound = attention.bind(q_len=256, head_dim=32, batch=2, heads=4, kv_heads=2, dtype=torch.float32)
    plan = bound.plan
    assert plan is attention.plan
    assert plan.backend == "chunked"
    assert plan.tiles is not None
    assert (plan.tiles.block, plan.tiles.full, plan.tiles.partial, plan.tiles.empty) == (64, 8 * 6, 8 * 4, 8 * 6)
    assert plan.tiles.density == pytest.approx(10 / 16)
    assert plan.flops == 2 * 8 * 10 * 64 * 64 * (32 + 32)
    assert (plan.mask_rows, plan.mask_heads, plan.calls) == (1, 1, 1)


def test_a_plan_for_a_gpu_is_made_without_one() -> None:
    text = "causal & (sliding_window(64) | sparsek(8, after=64))"
    for backend, chosen, calls in (("auto", "gather", 1), ("flex", "flex", 2)):
        plan = fs.compile(text, backend=backend).bind(q_len=512, head_dim=64, device="cuda", needs_grad=True).plan
        assert plan.backend == chosen
        assert plan.calls == calls
    assert fs.compile("causal").bind(q_len=512, head_dim=64, device="cuda").plan.tiles is not None


def test_explanation_in_words_and_as_data() -> None:
    attention = fs.compile("causal", backend="chunked")
    explained = attention.explain(q_len=256, head_dim=32, heads=4, dtype=torch.float32, needs_grad=True)
    lines = str(explained).splitlines()
    assert lines[0] == "pattern   causal()"
    assert lines[1] == "shapes    query [1, 4, 256, 32], key [1, 4, 256, 32], float32, cpu, with gradients"
    assert lines[2] == "backend   chunked"
    assert any(line.split()[:2] == [">", "chunked"] for line in lines)
    assert any("flex " in line and "cannot run: FlexAttention has no gradients on CPU." in line for line in lines)
    data = json.loads(json.dumps(explained.as_dict()))
    assert data["pattern"] == "causal()"
    assert data["backend"] == "chunked"
    assert data["shapes"]["needs_grad"] is True
    assert data["tiles"]["full"] == 4
    assert {c["backend"]: c["can_run"] for c in data["candidates"]}["flex"] is False
    assert all(c["reason"] for c in data["candidates"])


def test_tiles_of_a_selection_are_known_at_the_call_only() -> None:
    attention = fs.compile("sparsek(4)", backend="chunked")
    assert attention.bind(q_len=64, head_dim=16).plan.tiles is None
    assert "known at the call" in str(attention.explain())
    inputs = make_inputs(["scores"])
    attention(inputs.query, inputs.key, inputs.value, **inputs.captured)
    assert attention.plan.tiles is not None
    assert any("Tiles depend on the scores" in note for note in attention.plan.notes)


def test_the_mask_is_kept_once_where_batch_and_head_do_not_matter() -> None:
    shapes: dict[str, Any] = {"q_len": 64, "head_dim": 16, "batch": 3, "heads": 4}
    for text, rows, heads in (("causal", 1, 1), ("padding", 3, 1), ("sliding_window(per_head([2, 4]))", 1, 4)):
        plan = fs.compile(text, backend="chunked").bind(**shapes).plan
        assert (plan.mask_rows, plan.mask_heads) == (rows, heads)


@pytest.mark.usefixtures("fresh_notices")
def test_auto_on_cpu_says_once_that_it_takes_the_chunked_path() -> None:
    inputs = make_inputs()
    attention = fs.compile("causal")
    with pytest.warns(BackendNotice) as said:
        attention(inputs.query, inputs.key, inputs.value)
    assert [str(w.message) for w in said] == [
        "flexsparse runs its exact chunked path on CPU, where FlexAttention cannot train. "
        "Pass backend='chunked' to choose it without this notice."
    ]
    assert said[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attention(inputs.query, inputs.key, inputs.value)
        fs.compile("full")(inputs.query, inputs.key, inputs.value)
    assert attention.plan.backend == "chunked"


def test_flex_on_cpu_refuses_gradients_and_names_what_runs() -> None:
    inputs = make_inputs().to(torch.float32)
    with pytest.raises(BackendError) as caught:
        fs.compile("causal", backend="flex")(inputs.query, inputs.key, inputs.value)
    assert str(caught.value) == (
        "backend='flex': got torch.float32 on cpu with gradients, expected a call that this backend can run. "
        "FlexAttention has no gradients on CPU. backend='chunked' runs it exactly, on any device."
    )


@pytest.mark.parametrize(
    ("text", "dtype", "reason"),
    [
        ("causal", torch.float64, "Compiled FlexAttention takes no float64."),
        ("sparsek(3)", torch.float32, "A gate on V needs the LSE, which compiled CPU FlexAttention does not give."),
    ],
)
def test_flex_on_cpu_refuses_what_it_cannot_compute(text: str, dtype: torch.dtype, reason: str) -> None:
    with pytest.raises(BackendError) as caught:
        fs.compile(text, backend="flex").bind(q_len=64, head_dim=16, dtype=dtype)
    assert caught.value.mend.startswith(reason)


def test_auto_on_a_gpu_never_falls_to_another_path_in_silence() -> None:
    with pytest.raises(BackendError) as caught:
        fs.compile("causal").bind(q_len=64, head_dim=16, dtype=torch.float64, device="cuda")
    assert str(caught.value) == (
        "backend='auto': got torch.float64 on cuda, expected a call that FlexAttention can run. "
        "Compiled FlexAttention takes no float64. Ask for backend='chunked', which is exact and slower."
    )


def test_other_devices_are_refused_by_flex() -> None:
    with pytest.raises(DeviceError, match="FlexAttention is used on cuda and cpu, not on mps"):
        fs.compile("causal", backend="flex").bind(q_len=64, head_dim=16, device="mps")


def test_an_allowed_fallback_is_the_oracle_and_says_so() -> None:
    inputs = make_inputs(["scores"]).to(torch.float32)
    attention = fs.compile("sparsek(4) + alibi", backend="flex", fallback="reference")
    with pytest.warns(BackendNotice, match="Running the dense reference instead: backend='flex'") as said:
        got = run(attention, inputs)
    assert said[0].filename.endswith("helpers.py"), "the notice points at the call"
    assert_same_result(got, run(oracle("sparsek(4) + alibi"), inputs))


def test_the_reference_backend_is_the_oracle() -> None:
    inputs = make_inputs(["scores"])
    assert_same_result(run(fs.compile(HYBRID, backend="reference"), inputs), run(oracle(HYBRID), inputs))


def test_lse_comes_only_where_it_is_asked_for() -> None:
    inputs = make_inputs()
    for backend in ("chunked", "reference"):
        attention = fs.compile("causal", backend=backend)
        assert isinstance(attention(inputs.query, inputs.key, inputs.value), torch.Tensor)
        out, lse = attention(inputs.query, inputs.key, inputs.value, return_lse=True)
        assert lse.shape == out.shape[:3]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "heads"),
    [("causal & document & (sliding_window(50) | sinks(4)) + alibi", (4,)), ("causal + alibi", (4, 8))],
)
def test_compiled_flex_on_cpu_is_the_oracle(text: str, heads: tuple[int, ...]) -> None:
    for number in heads:
        names = ["doc"] if "document" in text else []
        inputs = make_inputs(names, size=200, heads=number, head_dim=16).to(torch.float32)
        query, key, value = (x.detach() for x in (inputs.query, inputs.key, inputs.value))
        out = fs.compile(text, backend="flex")(query, key, value, **inputs.captured)
        exact: Any = fs.reference(text, query.double(), key.double(), value.double(), **inputs.captured)
        # float32 softmax over at most 200 keys: 64 roundings of the largest cover the products and the sum.
        assert float((out - exact).abs().max()) <= 64 * torch.finfo(torch.float32).eps * float(exact.abs().max())


def test_a_compiled_pattern_is_pickled_as_what_it_was_compiled_from() -> None:
    attention = fs.compile("causal & sparsek(4)", backend="chunked", block_size=64)
    again = pickle.loads(pickle.dumps(attention))
    assert (again.pattern, again.settings) == (attention.pattern, attention.settings)
    query, scores = torch.randn(1, 2, 9, 4), torch.randn(1, 2, 9)
    assert torch.equal(again(query, query, query, scores=scores), attention(query, query, query, scores=scores))


def test_another_budget_of_a_compiled_pattern() -> None:
    attention = fs.compile("causal & sparsek(4)", backend="chunked", block_size=64).with_k(2)
    assert str(attention.pattern) == "causal() & sparsek(2)"
    assert attention.settings.block_size == 64


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"q_len": 0}, "q_len: got 0, expected an integer of at least 1."),
        ({"batch": True}, "batch: got True, expected an integer of at least 1."),
        ({"heads": 4, "kv_heads": 3}, "kv_heads: got 3 for 4 query heads, expected a divisor of heads."),
    ],
)
def test_a_plan_is_made_for_no_shapes_that_a_call_cannot_have(shapes: dict[str, Any], message: str) -> None:
    with pytest.raises(ShapeError) as caught:
        fs.compile("causal").bind(**{"q_len": 8, "head_dim": 4, **shapes})
    assert str(caught.value) == message
