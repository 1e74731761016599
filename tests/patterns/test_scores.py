"""The score patterns against scores written by hand, through attention."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import flexsparse as fs
from flexsparse.ir.nodes import mentions
from flexsparse.patterns import catalogue
from tests.helpers import assert_close, make_inputs, tensors_of
from tests.patterns.witnesses import SCORES, World, alibi_slopes

EXAMPLES = [(name, dict(e)) for name, p in catalogue().items() if name in SCORES for e in p.examples]


def scored(name: str, arguments: dict[str, Any]) -> Any:
    """``causal`` with the score pattern on it, added or in place of the score as its documentation says."""
    expression: Any = catalogue()[name](**arguments)
    base: Any = fs.parse("causal")
    return base.score(expression) if mentions(expression.node, "score") else base + expression


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("heads", [8, 12])
@pytest.mark.parametrize("size", [1, 17, 40])
@pytest.mark.parametrize(("name", "arguments"), EXAMPLES, ids=[f"{n}-{a}" for n, a in EXAMPLES])
def test_score_is_what_its_witness_says(
    name: str, arguments: dict[str, Any], size: int, heads: int, backend: str
) -> None:
    pattern = scored(name, arguments)
    inputs = make_inputs(tensors_of(pattern), size=size, batch=1, heads=heads, kv_heads=heads)
    query, key, value = (x.detach() for x in (inputs.query, inputs.key, inputs.value))
    captured = {n: t.detach() for n, t in inputs.captured.items()}
    world = World(size, heads, {n: t.tolist() for n, t in captured.items()})
    out, lse = fs.compile(pattern, backend=backend)(query * 8, key, value, return_lse=True, **captured)
    products = (query * 8 @ key.transpose(-1, -2) / math.sqrt(query.shape[-1]))[0].tolist()
    for h in range(heads):
        for q in range(size):
            scores = [SCORES[name](world, h, q, kv, products[h][q][kv], **arguments) for kv in range(q + 1)]
            total = math.fsum(math.exp(s) for s in scores)
            weights = torch.tensor([math.exp(s) / total for s in scores], dtype=torch.float64)
            assert_close("lse", lse[0, h, q], torch.tensor(math.log(total), dtype=torch.float64))
            assert_close("out", out[0, h, q], weights @ value[0, h, : q + 1])


def test_alibi_slopes_of_eight_heads_are_the_papers() -> None:
    assert alibi_slopes(8) == [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256]


@pytest.mark.parametrize("heads", [1, 2, 8, 12, 20])
def test_alibi_alone_gives_slope_times_distance(heads: int) -> None:
    # With a query of zeros, the weights of the two keys of query 1 show the slope.
    zeros, identity = torch.zeros(1, heads, 2, 2, dtype=torch.float64), torch.eye(2, dtype=torch.float64)
    value = identity.expand(1, heads, 2, 2)
    out = fs.compile("causal + alibi", backend="chunked")(zeros, zeros, value)
    slopes = torch.log(out[0, :, 1, 1] / out[0, :, 1, 0])
    assert_close("slopes", slopes, torch.tensor(alibi_slopes(heads), dtype=torch.float64))


def test_alibi_of_twelve_heads_written_out() -> None:
    halves = [2.0**-n for n in range(1, 9)]
    between = [2 ** (-(2 * n + 1) / 2) for n in range(4)]
    assert alibi_slopes(12) == pytest.approx(halves + between, rel=1e-15)


def test_relative_bias_shares_an_entry_from_span_on() -> None:
    size, span = 9, 2
    bias = torch.arange(5.0, dtype=torch.float64)[None]
    zeros = torch.zeros(1, 1, size, 2, dtype=torch.float64)
    _, lse = fs.compile("full + relative_bias(2)", backend="chunked")(zeros, zeros, zeros, return_lse=True, bias=bias)
    for q in range(size):
        entries = [min(max(q - kv, -span), span) + span for kv in range(size)]
        wanted = math.log(math.fsum(math.exp(e) for e in entries))
        assert float(lse[0, 0, q]) == pytest.approx(wanted, rel=1e-14)


def test_softcap_bounds_the_score_before_what_is_added_after_it() -> None:
    query = torch.tensor([[[[1e6]], [[-1e6]]]], dtype=torch.float64)
    ones = torch.ones_like(query)
    _, lse = fs.compile("causal.score(softcap(30.0))", backend="chunked")(query, ones, ones, return_lse=True)
    assert lse.flatten().tolist() == [30.0, -30.0]
    _, lse = fs.compile("causal.score(softcap(30.0)) + 5", backend="chunked")(query, ones, ones, return_lse=True)
    assert lse.flatten().tolist() == [35.0, -25.0]
