"""``SparseKAttention`` against its formula in float64, written without the module and judged by the dense oracle."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import flexsparse as fs
from flexsparse.errors import PatternArgumentError, SettingError
from flexsparse.ir.nodes import GATES
from flexsparse.language import Pattern
from flexsparse.nn import Scorer, SparseKAttention
from flexsparse.nn.rotary import rotate, turns
from flexsparse.patterns.alibi import alibi
from flexsparse.patterns.sinks import sinks
from tests.helpers import assert_close, oracle

BATCH, DIM, HEADS = 2, 16, 4


def module_of(dtype: torch.dtype = torch.float64, **change: Any) -> SparseKAttention:
    settings: dict[str, Any] = {"kv_heads": 2, "k": 4, "window": 6, "backend": "chunked", **change}
    module = SparseKAttention(DIM, HEADS, dtype=dtype, **settings)
    # Scores that spread over some gates, so that saturated, partial and evicted keys all occur.
    torch.nn.init.normal_(module.scorer.weight, std=0.3)
    return module


def turned(x: Tensor, positions: Tensor, base: float) -> Tensor:
    """Rotary embedding by complex numbers: component n is the real part, component n + D / 2 the imaginary one."""
    half = x.shape[-1] // 2
    angle = positions[..., None].double() * torch.tensor(
        [base ** (-n / half) for n in range(half)], dtype=torch.float64
    )
    angle = angle if positions.dim() == 1 else angle[:, None]
    pairs = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((pairs.real, pairs.imag), -1)


def formula(
    p: dict[str, Tensor],
    x: Tensor,
    pattern: Pattern | str,
    *,
    head_dim: int,
    slope: Tensor,
    base: float | None = 10000.0,
    positions: Tensor | None = None,
    scale: float | None = None,
    **captured: Tensor,
) -> Tensor:
    """The layer from its parameters by name; ``slope`` [H_kv]."""

    def projected(name: str) -> Tensor:
        made = torch.einsum("bse,oe->bso", x, p[f"{name}.weight"]) + p.get(f"{name}.bias", torch.zeros(()))
        return made.reshape(*x.shape[:2], -1, head_dim).permute(0, 2, 1, 3)

    query, key, value = (projected(name) for name in ("q_proj", "k_proj", "v_proj"))
    index = torch.arange(x.shape[1])
    if base is not None:
        at = index if positions is None else positions
        query, key = turned(query, at, base), turned(key, at, base)
    scores = torch.einsum("bse,he->bhs", x, p["scorer.weight"]) + slope[:, None] * index
    out = oracle(pattern)(query, key, value, scale=scale, scores=scores, **captured)
    flat: Tensor = out.permute(0, 2, 1, 3).reshape(*x.shape[:2], -1)
    return torch.einsum("bso,eo->bse", flat, p["o_proj.weight"]) + p.get("o_proj.bias", torch.zeros(()))


def compare(module: SparseKAttention, size: int, pattern: Pattern | str, given: Any = None, **rest: Any) -> None:
    """Output and the gradients of x and of every parameter."""
    x = torch.randn(BATCH, size, DIM, dtype=torch.float64, requires_grad=True)
    leaves = {"x": x, **dict(module.named_parameters())}
    given = given or {}
    slope = module.scorer.slope
    out = module(x, **given)
    wanted = formula(leaves, x, pattern, head_dim=module.head_dim, slope=slope, **given, **rest)
    flow = torch.randn_like(out)
    assert_close("out", out.detach(), wanted.detach())
    mine = torch.autograd.grad(out, list(leaves.values()), flow, allow_unused=True, retain_graph=True)
    other = torch.autograd.grad(wanted, list(leaves.values()), flow, allow_unused=True)
    for name, got, expected in zip(leaves, mine, other, strict=True):
        zeros = torch.zeros_like(leaves[name])
        assert_close(name, zeros if got is None else got, zeros if expected is None else expected)


def written(gate: str = "kv", k: int = 4, window: int = 6, extra: str = "") -> str:
    """The layer's pattern, spelled out."""
    return f"((kv <= q) & (q - kv < {window})) | sparsek({k}, after={window}, gate='{gate}'{extra})"


@pytest.mark.parametrize("size", [1, 5, 17, 129])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_lengths_and_head_counts(size: int, kv_heads: int) -> None:
    compare(module_of(kv_heads=kv_heads), size, written())


@pytest.mark.parametrize("gate", GATES)
def test_gates(gate: str) -> None:
    compare(module_of(gate=gate), 40, written(gate))


OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "bias": ({"bias": True}, {}),
    "head_dim": ({"head_dim": 6}, {}),
    "odd head_dim": ({"head_dim": 5, "rope": False}, {"base": None}),
    "rope_base": ({"rope_base": 100.0}, {"base": 100.0}),
    "scale": ({"scale": 0.7}, {"scale": 0.7}),
    "slope": ({"position_slope": 0.3}, {}),
    "no slope": ({"position_slope": 0}, {}),
    "learnable slope": ({"learnable_slope": True, "position_slope": 0.2}, {}),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options(name: str) -> None:
    settings, rest = OPTIONS[name]
    module = module_of(**settings)
    if settings.get("bias"):
        assert module.q_proj.bias is not None
    compare(module, 40, written(), **rest)


def test_heads_default_to_as_many_kv_heads() -> None:
    assert SparseKAttention(DIM, HEADS, k=2, window=2, backend="chunked").kv_heads == HEADS


def test_kv_heads_select_by_themselves() -> None:
    module = module_of()
    x = torch.randn(1, 60, DIM, dtype=torch.float64)
    found = fs.ops.causal_topk(module.scorer(x), 4, 6)
    assert not torch.equal(found.death[:, 0], found.death[:, 1])


@pytest.mark.parametrize("rank", [1, 2])
def test_packed_documents(rank: int) -> None:
    """Ids, restarted positions and a selection that restarts: each document is as if it were alone."""
    module = module_of(segments="doc", pattern="document")
    lengths = (30, 1, 22)
    doc = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])
    positions = torch.cat([torch.arange(n) for n in lengths])
    given = {"doc": doc, "positions": positions}
    if rank == 2:
        given = {name: x.expand(BATCH, -1) for name, x in given.items()}
    compare(module, sum(lengths), f"({written(extra=', segments=' + repr('doc'))}) & document", given)
    x = torch.randn(BATCH, sum(lengths), DIM, dtype=torch.float64)
    parts = [
        module(part, doc=torch.zeros(n, dtype=torch.long), positions=torch.arange(n))
        for part, n in zip(x.split(lengths, 1), lengths, strict=True)
    ]
    # Scores of a later document are larger by a constant, which costs digits and changes no gate.
    assert_close("documents", module(x, **given).detach(), torch.cat(parts, 1).detach())


def test_each_row_has_its_own_positions() -> None:
    positions = torch.stack((torch.arange(20), torch.arange(20) * 3 + 5))
    compare(module_of(), 20, written(), {"positions": positions})


def test_a_function_composes_the_pattern() -> None:
    module = module_of(pattern=lambda p: (p | sinks(2)) + alibi())
    compare(module, 40, f"({written()} | sinks(2)) + alibi")


def test_a_pattern_is_intersected() -> None:
    module = module_of(pattern=sinks(2))
    assert str(module.pattern) == "sparsek_window(4, 6) & sinks(2)"
    compare(module, 40, f"({written()}) & sinks(2)")


def test_rotation_depends_on_distance_alone() -> None:
    query, key = torch.randn(2, 1, 1, 50, 8, dtype=torch.float64)
    products = []
    for offset in (0, 1_000_000):
        cos, sin = turns(torch.arange(50) + offset, 8, 10000.0, torch.float64)
        products.append(rotate(query, cos, sin) @ rotate(key, cos, sin).mT)
    assert_close("products", products[1], products[0], roundings=1 << 24)


def test_rotation_is_exact_to_float32_at_a_million() -> None:
    x = torch.randn(1, 2, 10, 8)
    positions = torch.arange(10) + 1_000_000
    got = rotate(x, *turns(positions, 8, 10000.0, torch.float32))
    assert got.dtype is torch.float32
    error = (got.double() - turned(x.double(), positions, 10000.0)).abs().max()
    assert float(error) <= 4 * 2.0**-24 * float(x.abs().max())


def test_autocast_lowers_the_projections_alone() -> None:
    module = module_of(torch.float32)
    seen: list[Tensor] = []
    module.scorer.register_forward_hook(lambda _m, _i, out: seen.append(out))
    x = torch.randn(BATCH, 70, DIM)
    module(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(x)
    assert out.dtype is torch.bfloat16
    assert seen[1].dtype is torch.float32
    assert torch.equal(seen[0], seen[1])
    # The same steps by hand: projections in bfloat16, the rotation and the attention as they are without autocast.
    low = {name: p.detach().bfloat16() for name, p in module.named_parameters()}
    heads = {
        name: torch.nn.functional.linear(x.bfloat16(), low[f"{name}.weight"]).unflatten(-1, (-1, 4)).transpose(1, 2)
        for name in ("q_proj", "k_proj", "v_proj")
    }
    cos, sin = turns(torch.arange(70), 4, 10000.0, torch.float32)
    query, key = rotate(heads["q_proj"], cos, sin), rotate(heads["k_proj"], cos, sin)
    wanted = module.attention(query, key, heads["v_proj"], scores=seen[0])
    wanted = torch.nn.functional.linear(wanted.transpose(1, 2).flatten(2), low["o_proj.weight"])
    assert torch.equal(out, wanted)


def test_autocast_trains() -> None:
    module = module_of(torch.float32, learnable_slope=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(torch.randn(BATCH, 70, DIM))
    out.float().square().mean().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.dtype is torch.float32
        assert 0 < float(parameter.grad.abs().max()) < torch.inf


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_low_precision_module_scores_in_float32(dtype: torch.dtype) -> None:
    module = module_of(dtype)
    x = torch.randn(BATCH, 40, DIM, dtype=dtype)
    assert module.scorer(x).dtype is torch.float32
    assert module(x).dtype is dtype


def test_order_by_position_survives_length() -> None:
    """A slope of 0.01 over 200,000 tokens, weights in bfloat16 and autocast on: every score is above the last."""
    scorer = Scorer(4, 1, 0.01, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        u = scorer(torch.zeros(1, 200_000, 4, dtype=torch.bfloat16))
    assert bool((u.diff() > 0).all())


def test_checkpointing_changes_no_gradient() -> None:
    module = module_of(torch.float32, learnable_slope=True)
    x = torch.randn(BATCH, 50, DIM, requires_grad=True)
    leaves = (x, *module.parameters())
    plain = torch.autograd.grad(module(x).square().sum(), leaves)
    again = torch.autograd.grad(checkpoint(module, x, use_reentrant=False).square().sum(), leaves)
    for one, other in zip(plain, again, strict=True):
        assert torch.equal(one, other)


STATE = {
    "q_proj.weight": (24, 16),
    "q_proj.bias": (24,),
    "k_proj.weight": (12, 16),
    "k_proj.bias": (12,),
    "v_proj.weight": (12, 16),
    "v_proj.bias": (12,),
    "o_proj.weight": (16, 24),
    "o_proj.bias": (16,),
    "scorer.weight": (2, 16),
    "scorer.log_slope": (2,),
}


@pytest.mark.parametrize("learnable", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_state_dict_is_what_is_documented(bias: bool, learnable: bool, dtype: torch.dtype) -> None:
    module = module_of(dtype, bias=bias, learnable_slope=learnable, head_dim=6)
    wanted = {
        name: shape
        for name, shape in STATE.items()
        if (bias or not name.endswith("bias")) and (learnable or "slope" not in name)
    }
    state = module.state_dict()
    assert {name: tuple(x.shape) for name, x in state.items()} == wanted
    assert list(state) == list(wanted)
    assert {x.dtype for x in state.values()} == {dtype}
    other = module_of(dtype, bias=bias, learnable_slope=learnable, head_dim=6)
    x = torch.randn(1, 30, DIM, dtype=dtype)
    assert not torch.equal(module(x), other(x))
    other.load_state_dict(state)
    assert torch.equal(module(x), other(x))


def test_reset_draws_what_a_new_module_draws() -> None:
    settings: dict[str, Any] = {"k": 4, "window": 6, "bias": True, "learnable_slope": True, "backend": "chunked"}
    torch.manual_seed(3)
    fresh = SparseKAttention(DIM, HEADS, **settings)
    empty = SparseKAttention(DIM, HEADS, device="meta", **settings).to_empty(device="cpu")
    torch.manual_seed(3)
    empty.reset_parameters()
    for name, tensor in fresh.state_dict().items():
        assert torch.equal(empty.state_dict()[name], tensor), name


def test_the_initial_scores_differ_by_a_tenth_of_a_gate() -> None:
    content = Scorer(256, 4, 0.01).content(torch.randn(1, 4000, 256))
    assert ((content.std(-1) - 0.1).abs() < 0.02).all()
    slope = Scorer(8, 4, 0.25, learnable_slope=True).slope
    torch.testing.assert_close(slope, torch.full((4,), 0.25))
    assert slope.requires_grad


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_copies_compute_the_same(duplicate: Any) -> None:
    module = module_of(pattern=lambda p: p | sinks(2))
    x = torch.randn(1, 30, DIM, dtype=torch.float64)
    other = duplicate(module)
    assert torch.equal(other(x), module(x))
    assert str(other) == str(module)
    assert other.selection == module.selection


def test_it_prints_its_settings() -> None:
    shown = str(module_of(rope=False, scale=0.5, learnable_slope=True))
    assert "16, heads=4, kv_heads=2, head_dim=4, rope=False, scale=0.5" in shown
    assert "pattern='sparsek_window(4, 6)', backend='chunked'" in shown
    assert "(scorer): Scorer(16, kv_heads=2, slope=learnable, from 0.125)" in shown
    assert "rope_base=10000," in str(module_of())


def test_the_scorer_learns_to_keep_what_is_asked_for() -> None:
    """One marked token among zeros: past the window its value comes through the selection or not at all."""
    module = SparseKAttention(8, 1, k=2, window=2, rope=False, backend="chunked")
    x = torch.zeros(1, 24, 8)
    x[:, 3, 0] = 1.0
    assert fs.ops.causal_topk(module.scorer(x), 2, 2).death[0, 0, 3] < 10
    optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
    for _ in range(100):
        loss = (module(x)[:, 5:, 1] - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.01
    assert fs.ops.causal_topk(module.scorer(x), 2, 2).death[0, 0, 3] == 24


def test_k_may_change_while_training() -> None:
    torch.manual_seed(0)
    layer = fs.nn.SparseKAttention(16, heads=2, k=3, window=4, backend="chunked")
    other = fs.nn.SparseKAttention(16, heads=2, k=6, window=4, backend="chunked", position_slope=1 / 6)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(1, 40, 16)
    assert not torch.equal(layer(x), other(x))
    layer.set_k(6)
    assert layer.selection.k == 6
    assert torch.equal(layer(x), other(x))


def test_a_window_of_the_call() -> None:
    """A layer whose window is a number of the call is, at each number, the layer that is written with it."""
    layer = SparseKAttention(32, 4, 2, k=4, window=fs.scalar("window", 8), backend="chunked")
    x = torch.randn(2, 30, 32)
    for window in (3, 8, 20):
        written = SparseKAttention(32, 4, 2, k=4, window=window, backend="chunked")
        written.load_state_dict(layer.state_dict())
        assert torch.equal(layer(x, window=window), written(x))
        assert str(layer.diagnose(x, window=window)) == str(written.diagnose(x))
    assert torch.equal(layer(x), layer(x, window=8))
    with pytest.raises(PatternArgumentError, match=r"sparsek_window\(window\): got 0"):
        layer(x, window=0)
    real: Any = fs.scalar("window", 8.0)
    with pytest.raises(SettingError, match=r"window: got scalar\('window', 8\.0\), expected an integer"):
        SparseKAttention(32, 4, 2, k=4, window=real)
