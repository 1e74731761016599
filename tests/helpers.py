"""What many tests share: inputs by name, running with gradients, and comparison with a derived tolerance."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import flexsparse as fs
from flexsparse.expression import Expression, Pattern
from flexsparse.ir.nodes import Load, SelectionNode, walk
from flexsparse.pipeline import Bound, bind_call, compile_pattern
from flexsparse.runtime.inputs import Shapes
from flexsparse.settings import Settings

Attend = Callable[..., Any]


def torchs_own_warnings(test: Any) -> Any:
    """Lets through what torch says about itself while it runs or traces flex_attention."""
    for message in (
        # Said on every eager call; being dense is what backend="flex_eager" is for.
        "flex_attention called without torch.compile",
        # Dynamo asks every captured tensor for its gradient.
        "The .grad attribute of a Tensor that is not a leaf",
    ):
        test = pytest.mark.filterwarnings(f"ignore:{message}:UserWarning")(test)
    return test


DIFFERENTIABLE = ("scores", "u", "other", "bias", "rates", "slope", "sink_logits")


@dataclass(frozen=True)
class Inputs:
    """The arguments of one call."""

    query: Tensor
    key: Tensor
    value: Tensor
    captured: Mapping[str, Any]

    def leaves(self) -> dict[str, Tensor]:
        """Everything that asks for a gradient, by name."""
        named = {"query": self.query, "key": self.key, "value": self.value, **self.captured}
        return {name: tensor for name, tensor in named.items() if tensor.requires_grad}

    def to(self, dtype: torch.dtype, scores: torch.dtype | None = None) -> Inputs:
        """Fresh leaves with the same values rounded to ``dtype``; selection scores to ``scores`` where given."""

        def cast(name: str, x: Tensor) -> Tensor:
            if not x.is_floating_point():
                return x
            wanted = scores if scores is not None and name in ("scores", "u", "other") else dtype
            return x.detach().to(wanted).requires_grad_(x.requires_grad)

        captured = {name: cast(name, x) for name, x in self.captured.items()}
        return Inputs(cast("query", self.query), cast("key", self.key), cast("value", self.value), captured)


@dataclass(frozen=True)
class Result:
    """What one call gave: out, lse and the gradients of every leaf."""

    out: Tensor
    lse: Tensor
    gradients: Mapping[str, Tensor | None]


def tensors_of(pattern: Expression) -> list[str]:
    """The names of the tensors that a pattern reads, found on its own tree."""
    names: dict[str, None] = {}
    for node in walk(pattern.node):
        if isinstance(node, Load):
            names[node.tensor.name] = None
        if isinstance(node, SelectionNode):
            names |= {name: None for name in (node.scores, node.segments) if name is not None}
    return list(names)


def make_captured(
    names: Iterable[str], *, batch: int, heads: int, size: int, score_heads: int, generator: torch.Generator
) -> dict[str, Any]:
    """Tensors by the names that the tests use; ids have about four documents, some of one token."""

    def ids(*shape: int) -> Tensor:
        steps = torch.rand(*shape, generator=generator) < 4 / size
        return steps.long().cumsum(-1)

    makers: dict[str, Callable[[], Tensor]] = {
        **dict.fromkeys(
            ("scores", "u", "other"),
            lambda: torch.randn(batch, score_heads, size, generator=generator, dtype=torch.float64),
        ),
        "doc": lambda: ids(batch, size),
        "segments": lambda: ids(size),
        "lengths": lambda: torch.randint(0, size + 1, (batch,), generator=generator),
        "cu_seqlens": lambda: torch.tensor(sorted({0, size // 3, size // 2, size})),
        "bias": lambda: torch.randn(heads, 33, generator=generator, dtype=torch.float64),
        "slope": lambda: torch.rand(heads, generator=generator, dtype=torch.float64),
        "sink_logits": lambda: torch.randn(heads, generator=generator, dtype=torch.float64),
        "parents": lambda: torch.tensor([n - 1 - n % 3 if n else -1 for n in range(size)]).clamp(min=-1),
        "in_prefix": lambda: torch.rand(batch, size, generator=generator) < 0.3,
        "image": lambda: ids(batch, size) % 3 - 1,
        **{name: lambda: torch.rand(heads, size, generator=generator) < 0.2 for name in ("vertical", "slash")},
        "layout": lambda: torch.rand(heads, -(-size // 32), -(-size // 32), generator=generator) < 0.4,
        "rates": lambda: torch.rand(heads, 2, generator=generator, dtype=torch.float64) + 0.1,
        "keep": lambda: torch.rand(batch, size, generator=generator) < 0.7,
    }
    made = {}
    for name in names:
        tensor = makers[name]()
        made[name] = tensor.requires_grad_(name in DIFFERENTIABLE)
    return made


def make_inputs(
    names: Iterable[str] = (),
    *,
    size: int = 17,
    batch: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 8,
    value_dim: int | None = None,
    q_len: int | None = None,
    score_heads: int | None = None,
    seed: int = 0,
) -> Inputs:
    """float64 leaves with gradients, drawn from ``seed``."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    query = draw(batch, heads, size if q_len is None else q_len, head_dim)
    key = draw(batch, kv_heads, size, head_dim)
    value = draw(batch, kv_heads, size, value_dim or head_dim)
    score_heads = kv_heads if score_heads is None else score_heads
    captured = make_captured(names, batch=batch, heads=heads, size=size, score_heads=score_heads, generator=generator)
    return Inputs(query, key, value, captured)


def run(attend: Attend, inputs: Inputs, **options: Any) -> Result:
    """Forward and backward, with a cotangent for out and for lse that a seed fixes."""
    out, lse = attend(inputs.query, inputs.key, inputs.value, return_lse=True, **inputs.captured, **options)
    generator = torch.Generator().manual_seed(99)
    towards_out = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out)
    towards_lse = torch.randn(lse.shape, generator=generator, dtype=torch.float64).to(lse)
    leaves = inputs.leaves()
    outputs = [(x, g) for x, g in ((out, towards_out), (lse, towards_lse)) if x.requires_grad]
    found: Iterable[Tensor | None] = [None] * len(leaves)
    if outputs:
        ends, cotangents = zip(*outputs, strict=True)
        found = torch.autograd.grad(ends, list(leaves.values()), cotangents, allow_unused=True)
    return Result(out.detach(), lse.detach(), dict(zip(leaves, found, strict=True)))


def oracle(pattern: Pattern | str) -> Attend:
    """``reference`` as a callable of the same form as a compiled pattern."""
    return lambda query, key, value, **rest: fs.reference(pattern, query, key, value, **rest)


def rounding_bound(wanted: Tensor, roundings: int = 4096) -> float:
    """The error of that many float64 roundings of the largest number: a sum over a few hundred keys, and its chain."""
    finite = wanted[torch.isfinite(wanted)]
    largest = float(finite.abs().max()) if finite.numel() else 0.0
    return roundings * 2.0**-53 * max(1.0, largest)


def assert_close(name: str, got: Tensor, wanted: Tensor, roundings: int = 4096) -> None:
    """Equal up to float64 rounding; infinities in the same places, and no NaN."""
    assert got.shape == wanted.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(wanted.shape)}"
    assert not torch.isnan(wanted).any(), f"{name}: the oracle gave NaN"
    assert not torch.isnan(got).any(), f"{name}: NaN"
    infinite = torch.isinf(wanted)
    assert torch.equal(torch.isinf(got), infinite), f"{name}: infinities in other places"
    assert torch.equal(got[infinite], wanted[infinite]), f"{name}: infinities of another sign"
    error = float((got[~infinite].double() - wanted[~infinite].double()).abs().max()) if (~infinite).any() else 0.0
    allowed = rounding_bound(wanted, roundings)
    assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def assert_same_result(got: Result, wanted: Result, roundings: int = 4096) -> None:
    """out, lse and every gradient; a gradient that is None counts as zeros."""
    assert_close("out", got.out, wanted.out, roundings)
    assert_close("lse", got.lse, wanted.lse, roundings)
    assert got.gradients.keys() == wanted.gradients.keys()
    for name, expected in wanted.gradients.items():
        mine = got.gradients[name]
        zeros = torch.zeros(())
        if mine is None or expected is None:
            some = mine if mine is not None else expected
            zeros = zeros if some is None else torch.zeros_like(some)
        assert_close(
            f"gradient of {name}", zeros if mine is None else mine, zeros if expected is None else expected, roundings
        )


def plain_shapes(
    inputs_size: int, *, batch: int = 1, heads: int = 1, kv_heads: int = 1, q_offset: int = 0, q_len: int | None = None
) -> Shapes:
    """Shapes of a float64 call on CPU, where only the lengths and head counts matter."""
    rows = inputs_size if q_len is None else q_len
    return Shapes(batch, heads, kv_heads, rows, inputs_size, 8, 8, torch.float64, torch.device("cpu"), q_offset)


def bound_and_functions(
    pattern: Pattern,
    shapes: Shapes,
    captured: Mapping[str, Tensor],
    block: int = 16,
    operands: tuple[Tensor, Tensor] | None = None,
) -> tuple[Bound, dict[str, Any]]:
    """The bound call and the generated functions, as every backend gets them."""
    compiled = compile_pattern(pattern.node, shapes.q_offset != 0)
    settings = Settings(backend="chunked", block_size=block)
    # Simplification may drop a tensor that a generated pattern mentions.
    needed = {spec.name for spec in compiled.program.tensors} | {s.scores for s in compiled.program.selections}
    detached = {name: tensor.detach() for name, tensor in captured.items() if name in needed}
    bound = bind_call(compiled, shapes, detached, settings, operands=operands, validate=True)
    values = {name: bound.buffers[name] for name in compiled.generated.arguments}
    return bound, compiled.generated.build(**values)


def generated_mask(functions: Mapping[str, Any], shapes: Shapes) -> Tensor:
    """The generated mask_mod called once on broadcast indices: [B, H, S_q, S_kv]."""
    index = [
        torch.arange(count).reshape([-1 if d == n else 1 for d in range(4)])
        for n, count in enumerate((shapes.batch, shapes.heads, shapes.q_len, shapes.kv_len))
    ]
    mask: Tensor = functions["mask_mod"](*index)
    return mask.expand(shapes.batch, shapes.heads, shapes.q_len, shapes.kv_len)


def assert_tiles_sound(kinds: Tensor, block: int, mask: Tensor) -> None:
    """EMPTY tiles have no pair, FULL tiles all pairs of a whole tile; ``kinds`` broadcast over rows and heads."""
    rows, heads, q_len, kv_len = mask.shape
    kinds = kinds.expand(rows, heads, *kinds.shape[2:])
    seen = torch.zeros(rows, heads, kinds.shape[2] * block, kinds.shape[3] * block, dtype=torch.bool)
    seen[:, :, :q_len, :kv_len] = mask
    tiled = seen.unflatten(2, (-1, block)).unflatten(4, (-1, block))
    some, every = tiled.any(5).any(3), tiled.all(5).all(3)
    assert not (some & (kinds == 0)).any(), "an EMPTY tile holds a pair"
    # A ragged tile hangs over the end, where nothing is seen, so it counts as incomplete here.
    assert not (~every & (kinds == 2)).any(), "a FULL tile misses a pair"
