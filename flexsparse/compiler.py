"""``compile``: from a pattern to an object that computes attention and shows how."""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, overload

import torch
from torch import Tensor

from flexsparse.backends import BY_FLEX
from flexsparse.dense import reference
from flexsparse.errors import BackendError, BackendNotice, ExpressionError, SettingError
from flexsparse.execution import Runner, launchers_of
from flexsparse.expression import Expression, Pattern
from flexsparse.inspection import BoundAttention, InspectedPattern
from flexsparse.ir.scalars import scalars_of
from flexsparse.parser import parse
from flexsparse.pipeline import bind_call, compile_pattern
from flexsparse.plan import Plan
from flexsparse.row_lengths import LENGTHS, Padding, check_lengths, names_lengths, padding_of, within_lengths
from flexsparse.runtime.chunked import mass_of_keys
from flexsparse.runtime.inputs import Shapes, check_scale, completed_by, shapes_of, tensors_of
from flexsparse.runtime.numbers import split_numbers
from flexsparse.settings import Settings
from flexsparse.short_calls import ShortCalls, attend_again, short_call
from flexsparse.traced import attend_traced, attention_within, key_of, outside_graphs, remember


def compile(
    pattern: Pattern | str,
    *,
    backend: str = "auto",
    fallback: str | None = None,
    deterministic: bool | None = None,
    block_size: int = 128,
    kernel_options: Mapping[str, Any] | None = None,
    dynamic: bool = True,
    recompile_budget: int = 8,
) -> CompiledAttention:
    """Compile an attention pattern, given as an expression or as text. Touches no device and no shape.

    ``backend``: "auto" takes, on CUDA, what is predicted to take the least time of what can run: our kernels where keys
    are selected ("gather": linear in length, gradients in a fixed order), FlexAttention over copies of selected keys
    ("gather_flex": linear too), over positions reordered by residue class ("residue_flex": dilated and strided masks),
    or as it is ("flex"); on CPU the chunked path ("chunked"). One of these by name, "flex_eager", "gather_flex_eager"
    and "residue_flex_eager" (uncompiled and dense, for debugging) or "reference". Nothing else is ever used in place of
    it, unless ``fallback="reference"`` allows the dense oracle where the backend cannot run; that is reported as a
    warning.
    ``deterministic``: how captured tensors and scores get gradients through FlexAttention. True recomputes all of them
    in a fixed order; False leaves all to FlexAttention, which adds with atomics; None recomputes those of learnable
    tensors and leaves those of selection scores. ``block_size`` is the tile size of the block mask, in tokens.
    ``kernel_options`` go to flex_attention. ``dynamic=False`` builds a kernel for each length instead of one for
    many. ``recompile_budget`` bounds the builds of a pattern; past it a call raises, and never runs eagerly.
    Raises ParseError, ExpressionError, CapturedError or SettingError.
    """
    expression = parse(pattern) if isinstance(pattern, str) else pattern
    if not isinstance(expression, Expression):
        raise ExpressionError("pattern", got=type(pattern).__name__, expected="a pattern or its text")
    if not isinstance(kernel_options, Mapping | None):
        raise SettingError("kernel_options", got=repr(kernel_options), expected="a dictionary of options, or None")
    options = tuple(sorted((kernel_options or {}).items()))
    settings = Settings(backend, fallback, deterministic, block_size, options, dynamic, recompile_budget)
    return CompiledAttention(expression, settings)


class CompiledAttention(InspectedPattern):
    """Attention under a pattern. Call it like ``scaled_dot_product_attention``, with captured tensors by keyword."""

    def __init__(self, expression: Expression, settings: Settings) -> None:
        super().__init__(expression, settings)
        self._scalars = scalars_of(expression.node)
        self._own_lengths = names_lengths(expression.node)
        self.runner = Runner(self._node, self._compiled.program.printed, settings)
        # The name of this attention in graphs of torch.compile.
        self.key = key_of(expression, settings)
        self._short_calls = ShortCalls()
        remember(self.key, self)

    @property
    def builds(self) -> int:
        """How many FlexAttention kernels this pattern was compiled to so far, under these settings."""
        variants = list(itertools.product((False, True), BY_FLEX))
        nodes = [self._node, *([self.within_lengths._node] if "within_lengths" in self.__dict__ else [])]
        return sum(launchers_of(n, self._settings, *v).builds for v in variants for n in nodes)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as what it was compiled from; generated functions are made again."""
        return CompiledAttention, (self._expression, self._settings)

    def with_k(self, k: int, scores: str | None = None) -> CompiledAttention:
        """The same under another budget; what was built serves both. Arguments and errors as in ``Pattern.with_k``."""
        return CompiledAttention(self.pattern.with_k(k, scores), self._settings)

    def __repr__(self) -> str:
        return f"flexsparse.compile({str(self._expression)!r}, backend={self._settings.backend!r})"

    @overload
    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float | None = ...,
        return_lse: Literal[False] = ...,
        q_offset: int = ...,
        lengths: Tensor | None = ...,
        validate: bool = ...,
        **captured: Tensor | int | float | None,
    ) -> Tensor: ...
    @overload
    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float | None = ...,
        return_lse: Literal[True],
        q_offset: int = ...,
        lengths: Tensor | None = ...,
        validate: bool = ...,
        **captured: Tensor | int | float | None,
    ) -> tuple[Tensor, Tensor]: ...
    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float | None = None,
        return_lse: bool = False,
        q_offset: int = 0,
        lengths: Tensor | None = None,
        validate: bool = True,
        **captured: Tensor | int | float | None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """out [B, H, S_q, D_v] in query's dtype, and lse [B, H, S_q] (natural log, float32) with ``return_lse``.

        query [B, H, S_q, D]; key [B, H_kv, S_kv, D], value [B, H_kv, S_kv, D_v], H_kv dividing H; one dtype and
        device. ``scale`` defaults to 1 / sqrt(D). Scores of a selection are [B, 1 or H_kv or H, S_kv], float32 at
        best; captured tensors as the pattern declares them, and numbers in place of its scalars' defaults, for which
        nothing is built. ``q_offset`` is the position of query 0.
        Views are read where they are, by the kernels that gather: x.transpose(1, 2) of x [B, S, H, D], or a part of one
        packed projection; an operand is copied where its last dimension is not contiguous.
        ``lengths`` [B], integers on query's device or the CPU, are how many positions each row has: what stands behind
        them, NaN too, is not seen, and out is 0 there, lse -inf, and every gradient 0. Each row gets what it would get
        alone, but for patterns that ask for ``kv_len`` or ``q_len``, which stay those of the tensors. Query, key and
        value are copied with zeros in place of padding. Where the pattern has a tensor of that name, as ``padding()``
        does, it is given that, and nothing else happens.
        ``validate=False`` skips the checks that read values (NaN, sorted segments, index ranges), each of which
        synchronises a GPU; a short call without gradients is then started again as a whole where one like it has run,
        which spares most of the host's work. Gradients flow to query, key, value, scores and learnable tensors. A row
        that sees no key gives out 0, lse -inf (the sink's logit where there is one) and gradients 0.
        Inside ``torch.compile`` the backends "gather" and "chunked" are one custom operator, also with
        ``fullgraph=True``, and NaN and unsorted segments are not looked for. Other backends break the graph, and build
        graphs of their own as they always do; under ``fullgraph=True`` they are that operator too, which then computes
        a call once more in its backward pass.
        Raises ShapeError, DtypeError, DeviceError, CapturedError, SegmentError, NonFiniteScoresError, BackendError, and
        PatternArgumentError for a number that the pattern does not take.
        """
        if lengths is not None and self._own_lengths:
            captured[LENGTHS] = lengths
        elif lengths is not None:
            options: Any = {"scale": scale, "q_offset": q_offset, "validate": validate}
            return self._within(lengths, (query, key, value), captured, return_lse, options)
        numbers, tensors = split_numbers(self._scalars, captured)
        if torch.compiler.is_compiling():
            traced = attend_traced(self, (query, key, value), tensors, numbers, scale, q_offset, validate)
            if traced is None:
                return outside_graphs(
                    self, query, key, value, scale=scale, return_lse=return_lse, q_offset=q_offset, validate=validate,
                    **captured,
                )  # fmt: skip
            return traced if return_lse else traced[0]
        shapes = shapes_of(query, key, value, q_offset)
        given = completed_by(self._carried, tensors)
        inputs = [query, key, value, *(t for t in given.values() if isinstance(t, Tensor))]
        needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
        shapes = replace(shapes, needs_grad=needs_grad)
        factor = check_scale(scale, shapes.head_dim)
        compiled = compile_pattern(self._node, q_offset != 0).numbered(numbers)
        operands, short = (query, key, value), None
        bind = functools.partial(
            bind_call, compiled, shapes, given, self._settings, operands=(query, key), validate=validate
        )

        def attend(into: tuple[Tensor, Tensor]) -> None:
            out, _ = self.runner.run(bind(), factor, operands, True, into=into)
            assert out is into[0]

        try:
            if not (needs_grad or validate):
                short = short_call(compiled, shapes, self._settings, operands, given, self.key, numbers, factor)
            if short is not None and (known := self._short_calls.find(short.key)) is not None:
                self._bound = known
                out, lse = attend_again(short, shapes, attend)
                return (out, lse) if return_lse else out
            bound = bind()
            self._bound = BoundAttention(self, bound.plan, bound.program)
            self._announce(bound.plan)
            if bound.plan.backend != "reference":
                out, lse = self.runner.run(bound, factor, operands, return_lse)
                if short is not None:
                    self._short_calls.keep(short.key, self._bound)
                return (out, lse) if return_lse else out
        except BackendError as error:
            if self._settings.fallback is None:
                raise
            warnings.warn(f"Running the dense reference instead: {error}", BackendNotice, stacklevel=2)
        return reference(
            self.pattern, query, key, value, scale=factor, return_lse=return_lse, q_offset=q_offset, **given,
            **dict(numbers),
        )  # fmt: skip

    @functools.cached_property
    def _carried(self) -> dict[str, Tensor]:
        """The tensors that came with the pattern."""
        return tensors_of(self._node)

    @functools.cached_property
    def within_lengths(self) -> CompiledAttention:
        """What a call with ``lengths`` computes: the pattern of the queries and keys within their row's length."""
        return CompiledAttention(within_lengths(self.pattern), self._settings)

    def _within(
        self,
        lengths: Tensor,
        operands: tuple[Tensor, Tensor, Tensor],
        captured: dict[str, Any],
        return_lse: bool,
        options: dict[str, Any],
    ) -> Any:
        tracing = torch.compiler.is_compiling()
        attention: Any = attention_within(self) if tracing else self.within_lengths
        padding, ends = self._padding(lengths, shapes_of(*operands, options["q_offset"]), options["validate"])
        given = {LENGTHS: ends, **padding.given(captured, self._node), **options}
        found = attention(*padding.operands(*operands), return_lse=return_lse, **given)
        if not tracing:
            self._bound = attention._bound
        if not return_lse:
            return padding.of_queries(found)
        return padding.of_queries(found[0]), padding.of_queries(found[1], -torch.inf)

    def _padding(self, lengths: Tensor, shapes: Shapes, validate: bool) -> tuple[Padding, Tensor]:
        """The padding of a call, and the lengths where the call is."""
        ends = check_lengths(lengths, shapes.batch, shapes.kv_len, shapes.device, validate=validate)
        return padding_of(ends, shapes.q_len, shapes.kv_len, shapes.q_offset), ends

    @torch.no_grad()
    def mass(
        self,
        query: Tensor,
        key: Tensor,
        *,
        scale: float | None = None,
        q_offset: int = 0,
        lengths: Tensor | None = None,
        validate: bool = True,
        **captured: Tensor | int | float | None,
    ) -> Tensor:
        """What each key receives of the attention, summed over queries: [B, H, S_kv], float32 (float64 for float64).

        query [B, H, S_q, D], key [B, H_kv, S_kv, D]; the rest as in a call. A query that sees a key adds 1 over all
        keys, less what a sink takes; it is the softmax that is summed, before a gate on V. Whatever the backend, the
        chunked path computes it, exactly and without S x S memory, in a pass of its own; no gradient. With ``lengths``
        padded queries count for nothing and padded keys receive nothing. Raises what a call raises.
        """
        shapes = shapes_of(query, key, key, q_offset)
        if lengths is not None and self._own_lengths:
            captured[LENGTHS] = lengths
        elif lengths is not None:
            padding, ends = self._padding(lengths, shapes, validate)
            query, key, _ = padding.operands(query, key, key)
            given = padding.given(captured, self._node)
            options: Any = {LENGTHS: ends, "scale": scale, "q_offset": q_offset, "validate": validate}
            return self.within_lengths.mass(query, key, **given, **options)
        numbers, tensors = split_numbers(self._scalars, captured)
        given = completed_by(self._carried, tensors)
        compiled = compile_pattern(self._node, q_offset != 0).numbered(numbers)
        settings = replace(self._settings, backend="chunked")
        bound = bind_call(compiled, shapes, given, settings, operands=(query, key), validate=validate)
        work, read = self.runner.work_of(bound, check_scale(scale, shapes.head_dim))
        return mass_of_keys(work, query, key, read)

    def with_values(self, **numbers: int | float) -> CompiledAttention:
        """The same with other defaults of its scalars; what was built serves both. Raises as ``Pattern.with_values``"""
        return CompiledAttention(self.pattern.with_values(**numbers), self._settings)

    def warmup(
        self,
        lengths: Sequence[int],
        *,
        head_dim: int,
        batch: int = 1,
        heads: int = 1,
        kv_heads: int | None = None,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cuda",
        needs_grad: bool = False,
        progress: bool = True,
        captured: Callable[[int], Mapping[str, Tensor]] | None = None,
    ) -> int:
        """Build ahead what calls of these lengths will need, with a progress bar; the number of builds it took.

        Each length is run once on random operands, forward and, with ``needs_grad``, backward. Scores are random;
        ``captured(length)`` gives the pattern's other tensors, on ``device``.
        Raises the errors of a call, and SettingError for an empty list or a length below 1.
        """
        if not lengths or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in lengths):
            raise SettingError("lengths", got=repr(lengths), expected="lengths of at least 1, such as [1024, 4096]")
        before = self.builds
        for length in _watched(lengths, "Building", progress):
            given: dict[str, Any] = dict(captured(length)) if captured is not None else {}
            for name in {s.scores for s in self.ir.selections} - set(given):
                given[name] = torch.randn(batch, 1, length, device=device)
            query, key, value = (
                torch.randn(batch, n, length, head_dim, dtype=dtype, device=device, requires_grad=needs_grad)
                for n in (heads, kv_heads or heads, kv_heads or heads)
            )
            out = self(query, key, value, **given)
            if needs_grad:
                torch.autograd.grad(out.sum(), (query, key, value))
        return self.builds - before

    def _announce(self, plan: Plan) -> None:
        if self._settings.backend == "auto" and plan.backend == "chunked":
            _say_once(
                "flexsparse runs its exact chunked path on CPU, where FlexAttention cannot train. "
                "Pass backend='chunked' to choose it without this notice."
            )


def _watched(lengths: Sequence[int], what: str, progress: bool) -> Iterator[int]:
    """The lengths one by one, with a bar on standard error."""
    if not progress:
        yield from lengths
        return
    from rich.console import Console
    from rich.progress import track

    yield from track(lengths, description=what, console=Console(stderr=True))


@functools.cache
def _say_once(message: str) -> None:
    warnings.warn(message, BackendNotice, stacklevel=4)
