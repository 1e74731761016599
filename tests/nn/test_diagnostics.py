"""The diagnostics against the definition: every prefix solved in fractions, every pair looked at."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from flexsparse.errors import CapturedError, NonFiniteScoresError, ShapeError
from flexsparse.ir.nodes import SelectionNode
from flexsparse.language import topk
from flexsparse.nn import Scorer, SparseKAttention
from flexsparse.nn.diagnostics import diagnose

FIELDS = ("support", "saturated", "turnover", "spread", "dead")
REGIMES = {
    "equal": lambda u: torch.zeros_like(u),
    "close": lambda u: 0.01 * u,
    "ordinary": lambda u: u,
    "integers": lambda u: (2 * u).round(),
    "spread": lambda u: 30 * u,
    "rising": lambda u: u + 0.1 * torch.arange(u.shape[-1]),
    "falling": lambda u: u - 0.1 * torch.arange(u.shape[-1]),
    "some excluded": lambda u: u.masked_fill(u < -0.5, -torch.inf),
}


def exact_threshold(scores: Sequence[Fraction], k: int) -> Fraction | None:
    """inf { t : sum of clip(z - t, 0, 1) <= k } without rounding; None for -inf."""
    if len(scores) <= k:
        return None

    def total(t: Fraction) -> Fraction:
        return sum((min(max(z - t, Fraction(0)), Fraction(1)) for z in scores), Fraction(0))

    kinks = sorted({*scores, *(z - 1 for z in scores)})
    above = bisect.bisect_left(kinks, True, key=lambda t: total(t) <= k)
    low, high = kinks[above - 1], kinks[above]
    return low + (high - low) * (total(low) - k) / (total(low) - total(high))


def looped(u: Tensor, k: int, after: int, ids: Tensor) -> dict[str, Tensor]:
    """Support, saturated share and turnover by head, from u [B, H, S] and ids [B, S], one query after the other."""
    return {name: (part / of.clamp(min=1)).float() for name, (part, of) in counted(u, k, after, ids).items()}


def counted(u: Tensor, k: int, after: int, ids: Tensor) -> dict[str, tuple[Tensor, ...]]:
    """How many of how many each share is, by head."""
    heads = []
    for head in range(u.shape[1]):
        count = dict.fromkeys(("support", "pairs", "saturated", "evicted", "queries", "contested"), 0)
        for row, id_ in zip(u[:, head].double(), ids.tolist(), strict=True):
            before: set[int] = set()
            for i in range(len(row)):
                keys = [j for j in range(i - after + 1) if id_[j] == id_[i] and row[j] > -torch.inf]
                before = before if i and id_[i] == id_[i - 1] else set()
                if not keys:
                    continue
                exact = {j: Fraction(float(row[j])) for j in keys}
                tau = exact_threshold(list(exact.values()), k)
                best = set(sorted(keys, key=lambda j: (-exact[j], j))[:k])
                count["queries"] += 1
                count["support"] += sum(tau is None or exact[j] > tau for j in keys)
                count["pairs"] += len(best)
                count["saturated"] += sum(tau is None or exact[j] - tau >= 1 for j in best)
                count["contested"] += len(keys) > k
                count["evicted"] += len(before - best)
                before = best
        heads.append(count)

    def of_heads(*names: str) -> tuple[Tensor, ...]:
        return tuple(torch.tensor([c[name] for c in heads], dtype=torch.float64) for name in names)

    return {
        "support": of_heads("support", "queries"),
        "saturated": of_heads("saturated", "pairs"),
        "turnover": of_heads("evicted", "contested"),
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize(("k", "after", "size"), [(1, 0, 17), (4, 5, 60), (8, 1, 33), (5, 40, 17)])
def test_the_numbers_are_those_of_the_definition(
    k: int, after: int, size: int, regime: str, dtype: torch.dtype
) -> None:
    u = REGIMES[regime](torch.randn(2, 3, size, dtype=torch.float64)).to(dtype)
    found = diagnose(u, u.nan_to_num(neginf=0.0), SelectionNode(k, after), None)
    wanted = looped(u, k, after, torch.zeros(2, size))
    for name, expected in wanted.items():
        assert torch.equal(getattr(found, name), expected), name


@pytest.mark.parametrize("rank", [1, 2])
def test_segments_restart_the_selection(rank: int) -> None:
    u = torch.randn(2, 3, 50, dtype=torch.float64)
    ids = (torch.rand(2, 50) < 0.1).long().cumsum(-1)
    given = ids[0] if rank == 1 else ids
    found = diagnose(u, u, SelectionNode(3, 2, segments="doc"), given)
    for name, expected in looped(u, 3, 2, given.expand(2, 50)).items():
        assert torch.equal(getattr(found, name), expected), name


def test_spread_is_that_of_the_content_along_a_row() -> None:
    """What differs between rows but not along one ranks nothing."""
    content = torch.stack((torch.zeros(2, 40), torch.randn(2, 40)), 1) + 100 * torch.randn(2, 1, 1)
    u = content + torch.arange(40)
    found = diagnose(u, content, SelectionNode(4, 8), None)
    mean = content.double().mean(-1, keepdim=True)
    wanted = (content.double() - mean).square().mean((0, 2)).sqrt().float()
    torch.testing.assert_close(found.spread, wanted, rtol=1e-6, atol=0)
    assert found.dead.tolist() == [True, False]


def test_by_position_alone_each_new_key_evicts_one() -> None:
    module = SparseKAttention(16, 4, 2, k=4, window=8, backend="chunked")
    torch.nn.init.zeros_(module.scorer.weight)
    found = module.diagnose(torch.randn(2, 100, 16))
    assert found.turnover.tolist() == [1.0, 1.0]
    assert found.dead.tolist() == [True, True]


@pytest.mark.parametrize("k", [1, 4, 64])
def test_the_default_slope_saturates_nothing_at_the_start(k: int) -> None:
    """Equal contents and a full prefix: gates from about 1 at the newest candidate to 0 at the 2k-th."""
    slope = SparseKAttention(4, 1, k=k, window=1, head_dim=2, backend="chunked").scorer.initial_slope
    scores = [Fraction(slope) * n for n in range(8 * k + 8)]
    tau = exact_threshold(scores, k)
    assert tau is not None
    assert Fraction(7, 10) < scores[-1] - tau < 1
    assert abs(sum(z > tau for z in scores) - 2 * k) <= 1


def test_a_module_describes_its_own_selection() -> None:
    module = SparseKAttention(
        16, 4, 2, k=3, window=5, segments="doc", pattern="document", backend="chunked", dtype=torch.float64
    )
    x = torch.randn(2, 60, 16, dtype=torch.float64, requires_grad=True)
    doc = torch.arange(60) // 25
    found = module.diagnose(x, positions=torch.arange(60) % 25, doc=doc)
    for name, expected in looped(module.scorer(x).detach(), 3, 5, doc.expand(2, 60)).items():
        assert torch.equal(getattr(found, name), expected), name
    for name in FIELDS:
        tensor = getattr(found, name)
        assert tensor.shape == (2,)
        assert not tensor.requires_grad
        assert tensor.dtype is (torch.bool if name == "dead" else torch.float32)


def test_a_pattern_that_changes_the_selection_is_followed() -> None:
    module = SparseKAttention(16, 4, 2, k=3, window=5, pattern=lambda p: p | topk(2, after=9), backend="chunked")
    assert [s.k for s in module.attention.ir.selections] == [3, 2]
    assert module.selection.k == 3


@pytest.mark.parametrize("segments", [None, "doc"])
def test_what_stands_behind_a_rows_length_counts_nowhere(segments: str | None) -> None:
    """Rows of different length, together and with rubbish behind them, are the rows one after the other, cut."""
    module = SparseKAttention(16, 4, 2, k=3, window=5, segments=segments, backend="chunked", dtype=torch.float64)
    x, ends = torch.randn(4, 60, 16, dtype=torch.float64), (41, 60, 0, 9)
    doc = torch.arange(60).expand(4, 60) // 25
    rubbish, ids = x.clone(), doc.clone()
    for row, end in enumerate(ends):
        rubbish[row, end:], ids[row, end:] = torch.nan, -7
    found = module.diagnose(rubbish, lengths=torch.tensor(ends), **({"doc": ids} if segments else {}))
    counts = {name: torch.zeros(2, dtype=torch.float64) for name in ("support", "saturated", "turnover")}
    whole = {name: torch.zeros(2, dtype=torch.float64) for name in counts}
    squares = torch.zeros(2, dtype=torch.float64)
    for row, end in enumerate(ends):
        if not end:
            continue
        u = module.scorer(x[row : row + 1, :end]).detach()
        given = doc[row : row + 1, :end] if segments else torch.zeros(1, end)
        for name, (part, of) in counted(u, 3, 5, given).items():
            counts[name] += part
            whole[name] += of
        squares += module.scorer.content(x[row : row + 1, :end]).detach().var(-1, correction=0)[0]
    for name, part in counts.items():
        assert torch.equal(getattr(found, name), (part / whole[name].clamp(min=1)).float()), name
    torch.testing.assert_close(found.spread, (squares / 3).sqrt().float(), rtol=1e-6, atol=0)


def test_lengths_of_nothing_and_wrong_ones() -> None:
    module = SparseKAttention(8, 2, k=2, window=2, backend="chunked")
    found = module.diagnose(torch.full((2, 6, 8), torch.nan), lengths=torch.zeros(2, dtype=torch.long))
    assert [getattr(found, name).tolist() for name in FIELDS] == [[0.0, 0.0]] * 4 + [[True, True]]
    with pytest.raises(ShapeError, match=r"^lengths: got shape \(3,\), expected a tensor \[2\]"):
        module.diagnose(torch.zeros(2, 6, 8), lengths=torch.ones(3, dtype=torch.long))
    with pytest.raises(ShapeError, match=r"^lengths: got lengths from 1 to 7, expected lengths from 0 to .* 6\.$"):
        module.diagnose(torch.zeros(2, 6, 8), lengths=torch.tensor([1, 7]))


def test_a_tensor_of_the_patterns_named_lengths_is_not_padding() -> None:
    module = SparseKAttention(8, 2, k=2, window=2, pattern="padding", backend="chunked")
    x = torch.randn(2, 30, 8)
    assert str(module.diagnose(x, lengths=torch.tensor([4, 30]))) == str(module.diagnose(x))


def test_no_candidate_gives_zeros() -> None:
    found = SparseKAttention(16, 2, k=3, window=50, backend="chunked").diagnose(torch.randn(1, 20, 16))
    assert found.support.tolist() == found.saturated.tolist() == found.turnover.tolist() == [0.0, 0.0]


def test_memory_is_linear_in_the_length() -> None:
    """At 65,536 tokens a boolean for each pair would take 4 GiB; this takes seconds and some MB."""
    u = Scorer(4, 1, 0.01)(torch.randn(1, 1 << 16, 4)).detach()
    found = diagnose(u, u, SelectionNode(64, 128), None)
    assert 64 < float(found.support) < 1 << 16


def test_mistakes_are_named() -> None:
    module = SparseKAttention(8, 2, k=2, window=2, segments="doc", backend="chunked")
    with pytest.raises(
        CapturedError, match=r"^doc: got nothing, expected segment ids\. Pass doc=\.\.\. to the call\.$"
    ):
        module.diagnose(torch.zeros(1, 6, 8))
    with pytest.raises(NonFiniteScoresError):
        module.diagnose(torch.full((1, 6, 8), torch.nan), doc=torch.zeros(6, dtype=torch.long))
