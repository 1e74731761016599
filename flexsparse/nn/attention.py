"""``SparseKAttention``: learned sparse attention as a layer to drop into a model."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from flexsparse.compiler import CompiledAttention
from flexsparse.compiler import compile as compile_attention
from flexsparse.errors import (
    CapturedError,
    DeviceError,
    DtypeError,
    ExpressionError,
    SettingError,
    ShapeError,
    nearest,
)
from flexsparse.expression import Index, Pattern
from flexsparse.ir.nodes import GATES, SelectionNode
from flexsparse.ir.scalars import scalars_of
from flexsparse.nn.diagnostics import SelectionDiagnostics, diagnose
from flexsparse.nn.rotary import rotate, turns
from flexsparse.nn.scorer import Scorer
from flexsparse.parser import parse
from flexsparse.patterns.sparsek_window import sparsek_window
from flexsparse.row_lengths import LENGTHS, check_lengths, names_lengths, padding_of
from flexsparse.runtime.numbers import split_numbers

Composer = Callable[[Pattern], Pattern]


class SparseKAttention(nn.Module):
    """Causal self-attention in which each query sees a sliding window and the k best-scored keys before it.

    It maps x [B, S, embed_dim] to [B, S, embed_dim] under ``sparsek_window(k, window, gate, segments=segments)``.
    ``heads`` query heads share ``kv_heads`` (default: as many) heads of keys, values and scores; ``head_dim``
    defaults to ``embed_dim / heads``. ``pattern`` composes further: a pattern or its text is intersected
    (``"document"``), a function takes the pattern and returns the whole (``lambda p: (p | sinks(4)) + alibi()``).
    The tensors it captures are given to ``forward`` by keyword, as is the number of a ``window=scalar("window", 512)``,
    which may change from step to step: ``layer(x, window=256)``. ``segments`` names a tensor of ids at which the
    selection restarts, ``pattern="document"`` keeps the attention inside: packed documents want both.

    ``position_slope`` is what a position adds to a score (see ``Scorer``); None takes ``1 / (2 k)``, the steepest at
    which equal contents leave no gate saturated: the newest candidate has gate 1, the k-th 1/2, the 2k-th 0.
    ``learnable_slope`` learns one for each KV head from there. ``rope=True`` turns query and key by their absolute
    positions, in float32 and in the half-split (GPT-NeoX) convention. ``scale`` defaults to ``1 / sqrt(head_dim)``;
    ``gate``, ``backend`` and ``validate`` are those of ``topk``, ``compile`` and a compiled pattern's call.
    Scores are float32 (float64 for float64) under autocast too, and the attention keeps its own precision there.
    Projections are initialised as ``nn.Linear``, the scorer as ``Scorer`` says; ``dropout`` must be 0.

    **State dict**, in the module's dtype and in this order; nothing else is in it, so the settings are the caller's:

    | name | shape |
    |---|---|
    | ``q_proj.weight`` | [heads * head_dim, embed_dim] |
    | ``k_proj.weight``, ``v_proj.weight`` | [kv_heads * head_dim, embed_dim] |
    | ``o_proj.weight`` | [embed_dim, heads * head_dim] |
    | ``{q,k,v,o}_proj.bias``, with ``bias=True`` | [rows of the weight] |
    | ``scorer.weight`` | [kv_heads, embed_dim] |
    | ``scorer.log_slope``, with ``learnable_slope=True`` | [kv_heads] |

    Raises SettingError, ParseError, ExpressionError, PatternArgumentError or CapturedError.
    """

    def __init__(
        self,
        embed_dim: int,
        heads: int,
        kv_heads: int | None = None,
        *,
        k: int,
        window: int | Index,
        head_dim: int | None = None,
        gate: str = "kv",
        pattern: Composer | Pattern | str | None = None,
        segments: str | None = None,
        position_slope: float | None = None,
        learnable_slope: bool = False,
        rope: bool = True,
        rope_base: float = 10000.0,
        scale: float | None = None,
        bias: bool = False,
        dropout: float = 0.0,
        backend: str = "auto",
        validate: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, number in (("embed_dim", embed_dim), ("heads", heads), ("k", k), ("window", window)):
            if name != "window" or not isinstance(window, Index):
                _at_least_one(name, number)
        kv_heads = heads if kv_heads is None else kv_heads
        _check_heads(heads, kv_heads)
        head_dim = _head_dim(embed_dim, heads, head_dim, rope)
        _refuse_dropout(dropout)
        if gate not in GATES:
            expected = f"one of {', '.join(map(repr, GATES))}"
            raise SettingError("gate", got=repr(gate), expected=expected, mend=nearest(str(gate), GATES))
        slope = 1 / (2 * k) if position_slope is None else position_slope
        _check_number("position_slope", slope, zero=not learnable_slope)
        _check_number("rope_base", rope_base, zero=False)
        if scale is not None:
            _check_number("scale", scale, zero=True)
        self.embed_dim, self.heads, self.kv_heads, self.head_dim = embed_dim, heads, kv_heads, head_dim
        self.rope, self.rope_base, self.scale = rope, float(rope_base), scale
        self.backend, self.validate = backend, validate
        self.pattern = _composed(sparsek_window(k, window, gate=gate, segments=segments), pattern)
        self._compile()
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.q_proj = nn.Linear(embed_dim, heads * head_dim, bias, **made)
        self.k_proj = nn.Linear(embed_dim, kv_heads * head_dim, bias, **made)
        self.v_proj = nn.Linear(embed_dim, kv_heads * head_dim, bias, **made)
        self.o_proj = nn.Linear(heads * head_dim, embed_dim, bias, **made)
        self.scorer = Scorer(embed_dim, kv_heads, float(slope), learnable_slope=learnable_slope, **made)

    def reset_parameters(self) -> None:
        """Draw every parameter anew, as a new module would."""
        for part in (self.q_proj, self.k_proj, self.v_proj, self.o_proj, self.scorer):
            part.reset_parameters()

    def forward(
        self,
        x: Tensor,
        *,
        positions: Tensor | None = None,
        lengths: Tensor | None = None,
        **captured: Tensor | int | float,
    ) -> Tensor:
        """Attention of x [B, S, embed_dim], in the dtype of the projections.

        ``positions`` ([S] or [B, S], default 0 to S - 1) are those of the rotary embedding, and have no effect with
        ``rope=False``; the scores go by the index in the row, so that packed documents may restart their positions.
        ``lengths`` [B] are how many positions each row of x has: what stands behind them, NaN too, is not read, and
        gives ``o_proj``'s bias or 0. Numbers are those of the pattern's scalars.
        Raises ShapeError, DtypeError, DeviceError, CapturedError, and what a compiled pattern's call raises.
        """
        self._check_input(x)
        if "scores" in captured:
            raise CapturedError("scores", got="a tensor", expected="none, as the module's scorer makes them")
        if lengths is not None and not names_lengths(self.pattern.node):
            # Weights, too, multiply whatever stands there.
            size = x.shape[1]
            ends = check_lengths(lengths, len(x), size, x.device, validate=self.validate)
            x = x.masked_fill(padding_of(ends, size, size).keys.unsqueeze(-1), 0.0)
        query = self._by_head(self.q_proj(x))
        key, value = self._by_head(self.k_proj(x)), self._by_head(self.v_proj(x))
        scores = self.scorer(x)
        # The operands have the dtype they should have; autocast would lower sums that the attention keeps in float32.
        with torch.autocast(x.device.type, enabled=False):
            if self.rope:
                exact = torch.promote_types(query.dtype, torch.float32)
                cos, sin = turns(_positions(positions, x), self.head_dim, self.rope_base, exact)
                query, key = rotate(query, cos, sin), rotate(key, cos, sin)
            given = {"scores": scores, **captured}
            options: dict[str, Any] = {"scale": self.scale, "lengths": lengths, "validate": self.validate}
            out = self.attention(query, key, value, **options, **given)
        return self.o_proj(out.transpose(1, 2).flatten(2))

    def set_k(self, k: int) -> None:
        """Let the module's selections choose k keys from now on; parameters and the position slope stay as they are.

        On a GPU nothing is compiled for it. Raises PatternArgumentError for k < 1.
        """
        self.pattern = self.pattern.with_k(k, "scores")
        self._compile()

    @torch.no_grad()
    def diagnose(
        self,
        x: Tensor,
        *,
        positions: Tensor | None = None,
        lengths: Tensor | None = None,
        **captured: Tensor | int | float,
    ) -> SelectionDiagnostics:
        """What the selection does on x, without running the attention: see ``SelectionDiagnostics``.

        Takes what ``forward`` takes, and reads of it x, the lengths and the selection's segments: what stands behind a
        row's length, NaN too, is not read and counts nowhere. A pattern with several selections by the module's scores
        is described by the first. Raises ShapeError, DtypeError, DeviceError, CapturedError without the segments, and
        what ``flexsparse.ops.causal_select`` raises.
        """
        self._check_input(x)
        ends: Tensor | None = None
        if lengths is not None and names_lengths(self.pattern.node):
            captured[LENGTHS] = lengths
        elif lengths is not None:
            ends = check_lengths(lengths, len(x), x.shape[1], x.device, validate=self.validate)
            padding = padding_of(ends, x.shape[1], x.shape[1])
            x, captured = x.masked_fill(padding.keys.unsqueeze(-1), 0.0), padding.given(captured, self.pattern.node)
        numbers, tensors = split_numbers(scalars_of(self.pattern.node), captured)
        selection = _own_selection(self.attention.with_values(**dict(numbers))) if numbers else self.selection
        name = selection.segments
        if name is not None and name not in tensors:
            raise CapturedError(name, got="nothing", expected="segment ids", mend=f"Pass {name}=... to the call.")
        segments = None if name is None else tensors[name]
        return diagnose(self.scorer(x), self.scorer.content(x), selection, segments, ends)

    def extra_repr(self) -> str:
        rope = f"rope_base={self.rope_base:g}" if self.rope else "rope=False"
        scale = "" if self.scale is None else f", scale={self.scale:g}"
        sizes = f"{self.embed_dim}, heads={self.heads}, kv_heads={self.kv_heads}, head_dim={self.head_dim}"
        return f"{sizes}, {rope}{scale}, pattern={str(self.pattern)!r}, backend={self.backend!r}"

    def __getstate__(self) -> dict[str, Any]:
        # Generated functions do not pickle, and are made again from the pattern.
        return {name: value for name, value in self.__dict__.items() if name not in ("attention", "selection")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._compile()

    def _compile(self) -> None:
        self.attention = compile_attention(self.pattern, backend=self.backend)
        self.selection = _own_selection(self.attention)
        for spec in self.attention.ir.tensors:
            if spec.name in ("x", "positions"):
                expected = "captured tensors of other names than the arguments of forward, x and positions"
                raise CapturedError(spec.name, got="a captured tensor", expected=expected, mend="Rename it.")

    def _by_head(self, projected: Tensor) -> Tensor:
        return projected.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def _check_input(self, x: Tensor) -> None:
        wanted = f"[B, S, {self.embed_dim}] with B and S of at least 1"
        if not isinstance(x, Tensor):
            raise ShapeError("x", got=type(x).__name__, expected=f"a tensor {wanted}")
        if x.dim() != 3 or x.shape[2] != self.embed_dim or 0 in x.shape:
            mend = "Add the batch dimension: x[None]." if x.dim() == 2 else ""
            raise ShapeError("x", got=f"shape {tuple(x.shape)}", expected=wanted, mend=mend)
        weight = self.q_proj.weight
        if x.device != weight.device:
            raise DeviceError("x", got=str(x.device), expected=f"the module's device, {weight.device}")
        # Autocast brings floating point to one dtype, and leaves float64 alone.
        cast = torch.is_autocast_enabled(x.device.type) and torch.float64 not in (x.dtype, weight.dtype)
        if x.dtype is not weight.dtype and not (cast and x.is_floating_point()):
            mend = "Convert it with x.to(...), or run under torch.autocast." if x.is_floating_point() else ""
            raise DtypeError("x", got=str(x.dtype), expected=f"the module's dtype, {weight.dtype}", mend=mend)


def _own_selection(attention: CompiledAttention) -> SelectionNode:
    """The first selection by the module's scores."""
    mine = [s for s in attention.ir.selections if s.scores == "scores"]
    if not mine:
        expected = "a pattern with a selection by the module's scores"
        raise ExpressionError("pattern", got=str(attention.pattern), expected=expected, mend="Compose what is given.")
    return mine[0]


def _at_least_one(name: str, number: object) -> None:
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        raise SettingError(name, got=repr(number), expected="an integer of at least 1")


def _check_number(name: str, number: object, *, zero: bool) -> None:
    real = isinstance(number, int | float) and not isinstance(number, bool) and math.isfinite(number)
    if not real or number < 0 or (number == 0 and not zero):  # type: ignore[operator]
        raise SettingError(name, got=repr(number), expected=f"a finite number {'of at least' if zero else 'above'} 0")


def _check_heads(heads: int, kv_heads: object) -> None:
    _at_least_one("kv_heads", kv_heads)
    divisors = [n for n in range(1, heads + 1) if heads % n == 0]
    if kv_heads not in divisors:
        raise SettingError(
            "kv_heads", got=str(kv_heads), expected=f"a divisor of heads={heads}", mend=f"Use one of {divisors}."
        )


def _head_dim(embed_dim: int, heads: int, head_dim: int | None, rope: bool) -> int:
    if head_dim is None:
        if embed_dim % heads:
            raise SettingError(
                "embed_dim",
                got=str(embed_dim),
                expected=f"a multiple of heads={heads}",
                mend="Or say how wide a head is with head_dim=...",
            )
        head_dim = embed_dim // heads
    _at_least_one("head_dim", head_dim)
    if rope and head_dim % 2:
        expected = "an even number, as rotary embedding turns pairs"
        raise SettingError("head_dim", got=str(head_dim), expected=expected, mend="Or pass rope=False.")
    return head_dim


def _refuse_dropout(dropout: object) -> None:
    if dropout != 0:
        raise SettingError(
            "dropout",
            got=repr(dropout),
            expected="0: a dropped key would still hold its slot, and the fused kernels have no dropout",
            mend="Drop out what the layer returns instead.",
        )


def _composed(base: Pattern, further: Composer | Pattern | str | None) -> Pattern:
    if further is None:
        return base
    if isinstance(further, str):
        further = parse(further)  # type: ignore[assignment]
    made = base & further if isinstance(further, Pattern) else further(base) if callable(further) else further
    if not isinstance(made, Pattern):
        expected = "a pattern, its text, or a function from pattern to pattern"
        raise ExpressionError("pattern", got=type(made).__name__, expected=expected)
    return made


def _positions(positions: Tensor | None, x: Tensor) -> Tensor:
    batch, size = x.shape[:2]
    if positions is None:
        return torch.arange(size, device=x.device)
    if not isinstance(positions, Tensor) or positions.shape not in ((size,), (batch, size)):
        got = f"shape {tuple(positions.shape)}" if isinstance(positions, Tensor) else type(positions).__name__
        raise ShapeError("positions", got=got, expected=f"[{size}] or [{batch}, {size}]")
    if positions.dtype is torch.bool or positions.is_complex():
        raise DtypeError("positions", got=str(positions.dtype), expected="integers or real numbers")
    if positions.device != x.device:
        raise DeviceError("positions", got=str(positions.device), expected=f"x's device, {x.device}")
    return positions
