"""Generated FlexAttention functions: text that tools find, people read, and Python runs anywhere."""

from __future__ import annotations

import inspect
import pickle
import re
import sys
import traceback
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

import flexsparse as fs
from flexsparse.codegen.flex import generate
from flexsparse.ir.lower import lower
from flexsparse.language import b, captured, floor, h, kv, minimum, q, topk, truncdiv, truncmod, where
from flexsparse.patterns import catalogue
from flexsparse.pipeline import compile_pattern
from tests.helpers import bound_and_functions, generated_mask, make_captured, plain_shapes, tensors_of
from tests.language.strategies import SIZES

P: Any = catalogue()
doc: Any = captured("doc", dims=("b", "s"))
bias: Any = captured("bias", dims=("h",), learnable=True)
HYBRID = P["causal"]() & (P["sliding_window"](8) | P["sinks"](2) | P["sparsek"](4, after=8)) + P["alibi"]()


def functions_of(pattern: Any, size: int = 12, heads: int = 2, **given: Tensor) -> dict[str, Any]:
    shapes = plain_shapes(size, heads=heads, kv_heads=heads)
    return bound_and_functions(pattern, shapes, given)[1]


def test_inspect_finds_the_source() -> None:
    functions = functions_of(P["causal"]() + bias[h], bias=torch.zeros(2))
    assert inspect.getsource(functions["mask_mod"]) == (
        "    def mask_mod(b, h, q, kv):\n        # kv <= q\n        return kv <= q\n"
    )
    assert inspect.getsource(functions["score_mod"]) == (
        "    def score_mod(score, b, h, q, kv):\n        # score + bias[h]\n"
        "        score = score + bias[h]\n        return score\n"
    )


def test_code_gives_the_same_text_without_its_indent() -> None:
    attention = fs.compile(P["causal"]() + bias[h])
    assert attention.code("mask_mod") == "def mask_mod(b, h, q, kv):\n    # kv <= q\n    return kv <= q"
    assert attention.code("score_mod").startswith("def score_mod(score, b, h, q, kv):\n    # score + bias[h]\n")
    assert fs.compile("causal").code("score_mod") == "# no score_mod: the pattern leaves it as it is"


def test_traceback_shows_the_generated_line() -> None:
    functions = functions_of(doc[b, q] == doc[b, kv], doc=torch.zeros(1, 12, dtype=torch.long))
    with pytest.raises(IndexError) as caught:
        functions["mask_mod"](torch.tensor(0), torch.tensor(0), torch.tensor(99), torch.tensor(0))
    shown = "".join(traceback.format_exception(caught.value))
    assert "return doc[b, q] == doc[b, kv]" in shown
    assert 'File "<flexsparse ' in shown


def test_comment_carries_the_expression_as_it_was_typed() -> None:
    source = fs.compile(HYBRID).source
    assert source.splitlines()[0] == f"# {HYBRID}"
    assert "# selection 0: key kv is selected for the queries birth <= q < death" in source


def test_a_long_expression_is_cut_in_the_comment_only() -> None:
    pattern: Any = P["causal"]()
    for n in range(40):
        pattern = pattern & (q - kv != n * 3 + 1)
    text = fs.compile(pattern).code("mask_mod")
    comment = text.splitlines()[1]
    assert len(comment) <= 4 + 2 + 160
    assert comment.endswith("...")
    assert text.count("!=") >= 40
    wanted = [(k <= n and all(n - k != m * 3 + 1 for m in range(40))) for n in range(50) for k in range(50)]
    shapes = plain_shapes(50)
    mask = generated_mask(bound_and_functions(pattern, shapes, {})[1], shapes)
    assert mask.flatten().tolist() == wanted


NEGATIVES: list[tuple[Any, Any]] = [
    ((q - kv) // 3, lambda d: d // 3),
    ((q - kv) % 3, lambda d: d % 3),
    ((q - kv) // -3, lambda d: d // -3),
    ((q - kv) % -3, lambda d: d % -3),
    (truncdiv(q - kv, 3), lambda d: int(d / 3)),
    (truncmod(q - kv, 3), lambda d: d - 3 * int(d / 3)),
    (truncdiv(q - kv, -3), lambda d: int(d / -3)),
    (truncmod(q - kv, -3), lambda d: d + 3 * int(d / -3)),
    (-(q - kv) // 2, lambda d: -d // 2),
    (abs(q - kv) % 4, lambda d: abs(d) % 4),
    (floor((q - kv) / 4), lambda d: d // 4),
    (7 // (q - kv + 20), lambda d: 7 // (d + 20)),
    (7 % (q - kv + 20), lambda d: 7 % (d + 20)),
    (where(q < kv, -1, 1) * (q - kv), lambda d: abs(d)),
    (minimum(q - kv, 2) - 1, lambda d: min(d, 2) - 1),
    (q - kv - (kv - q) - 1, lambda d: 2 * d - 1),
    (0 - (0 - (q - kv)), lambda d: d),
]


@pytest.mark.parametrize(("expression", "meaning"), NEGATIVES, ids=[str(e) for e, _ in NEGATIVES])
def test_integers_floor_or_truncate_as_written(expression: Any, meaning: Any) -> None:
    size = 9
    for target in range(-5, 6):
        mask = generated_mask(functions_of(expression == target, size, heads=1), plain_shapes(size))
        wanted = [[meaning(i - j) == target for j in range(size)] for i in range(size)]
        assert mask[0, 0].tolist() == wanted


@settings(max_examples=300)
@given(SIZES)
def test_functions_of_sizes_are_what_they_say(number: Any) -> None:
    mask = number % 5 == kv
    found = generated_mask(functions_of(mask, 9, heads=2), plain_shapes(9, heads=2, kv_heads=2))
    assert torch.equal(found, fs.dense_mask(mask, 9, heads=2).expand_as(found))


def test_reals_in_float64_keep_their_precision() -> None:
    third = 1 / 3
    functions = functions_of(P["full"]() + (q / 3 + third * kv))
    score = functions["score_mod"](torch.tensor(0.125, dtype=torch.float64), *(torch.tensor(n) for n in (0, 0, 7, 5)))
    assert score.dtype is torch.float64
    assert float(score) == 0.125 + (7 / 3 + third * 5)


def test_reals_follow_the_scores_dtype() -> None:
    for expression in (q / 3, where(kv < q, 1, 2.5), where(kv < q, 0.25, 0.5) * q, floor(q / 2)):
        functions = functions_of(P["full"]() + expression)
        for dtype in (torch.float32, torch.float64):
            index = [torch.tensor(n) for n in (0, 1, 7, 5)]
            assert functions["score_mod"](torch.zeros((), dtype=dtype), *index).dtype is dtype, expression


def pasted(pattern: Any) -> dict[str, Any]:
    """The text alone, run in a namespace of its own, as someone would who pastes it into a file."""
    namespace: dict[str, Any] = {}
    exec(compile(fs.compile(pattern).source, "pasted.py", "exec"), namespace)
    return namespace


PASTED = [
    "causal & sliding_window(5)",
    "document & causal",
    "causal + alibi",
    "padding | sinks(3)",
    "sliding_window(per_head([2, 6]))",
    "causal & (sliding_window(3) | sparsek(2, after=3))",
]


@pytest.mark.parametrize("text", PASTED)
def test_source_is_valid_where_it_is_pasted(text: str) -> None:
    pattern: Any = fs.parse(text)
    shapes = plain_shapes(19, batch=2, heads=2, kv_heads=2)
    generator = torch.Generator().manual_seed(1)
    given = make_captured(tensors_of(pattern), batch=2, heads=2, size=19, score_heads=2, generator=generator)
    bound, _ = bound_and_functions(pattern, shapes, given)
    arguments = compile_pattern(pattern.node).generated.arguments
    functions = pasted(pattern)["build"](**{name: bound.buffers[name] for name in arguments})
    assert torch.equal(generated_mask(functions, shapes), fs.dense_mask(pattern, 19, batch=2, heads=2, **given))


def test_source_names_nothing_of_flexsparse() -> None:
    source = fs.compile(HYBRID).source
    imports = [line for line in source.splitlines() if line.startswith(("import", "from"))]
    assert imports == ["import math", "import torch"]


def test_equal_programs_share_one_generated_module() -> None:
    first, second = (generate(lower((kv <= q).node), "kv <= q") for _ in range(2))
    assert first.filename == second.filename
    assert f"flexsparse_generated_{first.filename[12:-1]}" in sys.modules
    assert generate(lower((kv < q).node), "kv < q").filename != first.filename


def test_offset_is_added_to_the_query_index_alone() -> None:
    source = compile_pattern((kv <= q).node, True).generated.source
    assert "q = q + q_offset" in source
    assert "q_offset" not in compile_pattern((kv <= q).node).generated.source


def test_functions_of_sizes_are_computed_once_in_front() -> None:
    source = fs.compile("causal + alibi").source
    build, _, body = source.partition("def mask_mod")
    assert "math.log2(heads)" in build
    assert not [line for line in body.splitlines() if "log2" in line and not line.strip().startswith("#")]


def test_gates_are_indexed_once_and_written_once() -> None:
    text = fs.compile(topk(4, gate="kv")).source.partition("def kept_score_mod")[2].partition("def lost_score_mod")[0]
    assert text.count("= u_0[") == 1
    assert text.count("tau_0[") == 1
    assert "torch.log(gate)" in text


def test_a_straight_through_gate_says_whose_gradient_it_takes() -> None:
    source = fs.compile(topk(4, gate="ste_sigmoid")).source
    assert "# its gate is 1, with the gradient of sigmoid(u - tau)" in source
    assert source.count("m_0_fixed = torch.sigmoid(x)") == 4
    identity = fs.compile(topk(4, gate="ste_identity")).source
    assert "tau_0" not in identity.partition("def mask_mod")[2]


def test_generated_functions_are_none_where_nothing_is_to_do() -> None:
    functions = functions_of(P["causal"]())
    assert functions["score_mod"] is functions["kept_score_mod"] is functions["value_gate"] is None
    gated = functions_of(topk(2, gate="v"), scores=torch.randn(1, 2, 12))
    assert gated["score_mod"] is None
    assert gated["kept_score_mod"] is not None
    assert gated["gate_total"] == 1.0
    assert functions_of(topk(2, gate="ste"), scores=torch.randn(1, 2, 12))["gate_total"] == 2.0


def test_constant_masks_still_give_a_tensor_for_each_pair() -> None:
    for text, wanted in (("full", True), ("full & False", False)):
        shapes = plain_shapes(5)
        mask = generated_mask(bound_and_functions(fs.parse(text), shapes, {})[1], shapes)  # type: ignore[arg-type]
        assert mask.dtype is torch.bool
        assert bool(mask.all()) is wanted
        assert bool(mask.any()) is wanted


def test_compiled_pattern_text_survives_pickle() -> None:
    again = pickle.loads(pickle.dumps(HYBRID))
    assert fs.compile(again).source == fs.compile(HYBRID).source


@pytest.mark.parametrize(
    ("text", "fine", "refused", "reason"),
    [
        ("exp(kv_len) > q", 5, 800, "math range error"),
        ("sqrt(10 - q_len / 4) >= q", 5, 800, "math domain error|expected a nonnegative input"),
        ("log(q_len - 5) < q", 800, 5, "math domain error|expected a positive input"),
    ],
)
def test_functions_of_sizes_outside_their_domain_are_refused_in_words(
    text: str, fine: int, refused: int, reason: str
) -> None:
    pattern: Any = fs.parse(text)
    mask = generated_mask(bound_and_functions(pattern, plain_shapes(fine), {})[1], plain_shapes(fine))
    assert torch.equal(mask, fs.dense_mask(pattern, fine))
    with pytest.raises(fs.errors.ShapeError) as caught:
        bound_and_functions(pattern, plain_shapes(refused), {})
    assert re.search(rf"sizes: got (q|kv)_len={refused} \(.*({reason})", str(caught.value))
    assert f"every function of sizes alone in {text} has a value. Bound its argument" in str(caught.value)


def test_the_refusal_is_what_a_call_raises() -> None:
    query = torch.randn(1, 1, 800, 16)
    with pytest.raises(fs.errors.ShapeError, match="sizes: got kv_len=800"):
        fs.compile("exp(kv_len) > q", backend="chunked")(query, query, query)
