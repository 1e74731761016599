"""flex_attention compiled once for a pattern: lengths are dynamic, builds are counted, nothing runs eagerly."""

from __future__ import annotations

import contextlib
import types
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flexsparse import _dynamo, _torch
from flexsparse.codegen.block_mask import BlockLists
from flexsparse.errors import BackendError, BackendNotice, RecompileBudgetError
from flexsparse.failures import cause_in_words
from flexsparse.runtime.inputs import Shapes
from flexsparse.settings import Settings

# What to try, in order, where a kernel needs more shared memory than the GPU has.
_SMALLER: tuple[dict[str, Any], ...] = (
    {"num_stages": 2},
    {"num_stages": 1},
    {"num_stages": 1, "BLOCK_M": 64, "BLOCK_N": 64},
    {"num_stages": 1, "BLOCK_M": 32, "BLOCK_N": 32},
)
_KERNEL_BLOCKS = ("BLOCK_M", "BLOCK_N", "BLOCK_M1", "BLOCK_N1", "BLOCK_M2", "BLOCK_N2")
_TOO_LARGE = ("out of resource", "No valid triton configs", "OutOfResources")

# FlexAttention decodes fewer queries than this with a kernel of its own.
_DECODED = 128


class Launcher:
    """flex_attention for one pattern and one score function, in a frame of its own.

    Dynamo counts recompilations by code object; a copy of the code keeps patterns from using up each other's
    budget, and fullgraph keeps a failure from turning into eager execution. Sequence dimensions are marked
    dynamic, so that one build serves many lengths (on a GPU, one for the multiples of 128 and one for the others).
    Where a kernel does not fit the GPU's shared memory, smaller options are tried and the choice is announced.
    """

    def __init__(self, name: str, settings: Settings, backend: str) -> None:
        attend = _torch.attend
        # Dynamo remembers what changed by a frame's name, so the copy has a name of its own.
        own = types.FunctionType(attend.__code__.replace(co_name=name), attend.__globals__, name)
        self.builds: list[str] = []
        self.settings = settings
        self.backend = backend
        self.compiled = not backend.endswith("eager")
        self.run: Callable[..., Any] = own
        if self.compiled:
            self.run = torch.compile(
                own, fullgraph=True, backend=self._build, dynamic=None if settings.dynamic else False
            )
        self.options = [dict(settings.kernel_options)]
        if not settings.kernel_options:
            self.options = [{**option, **_fitting(settings.block_size, option)} for option in ({}, *_SMALLER)]
        self._call = ""

    def __call__(
        self,
        shapes: Shapes,
        scale: float,
        operands: tuple[Tensor, ...],
        functions: tuple[Any, Any],
        lists: BlockLists,
        with_lse: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """``functions`` are mask_mod and score_mod, ``lists`` the block mask's tensors."""
        arguments = (*functions, self.settings.block_size, scale, shapes.heads != shapes.kv_heads, with_lse)
        if not self.compiled:
            try:
                with _dynamo.eager(), _without_autocast(shapes.device):
                    return self.run(operands, lists, *arguments, None)
            except _dynamo.FAILURES as error:
                raise _cannot_build(shapes, self.backend, error) from error
        if self.settings.dynamic:
            operands = tuple(_dynamic(x, 2) for x in operands)
            lists = tuple(_dynamic(x, *range(2, x.dim())) for x in lists)
        self._call = _describe(shapes, lists, with_lse)
        told = _divides(shapes) | self._without_decoding(shapes)
        while True:
            try:
                with _dynamo.recompile_limit(self.settings.recompile_budget), _without_autocast(shapes.device):
                    return self.run(operands, lists, *arguments, {**told, **self.options[0]} or None)
            except _dynamo.RECOMPILE_LIMIT_HIT as error:
                raise self._spent() from error
            except _dynamo.FAILURES as error:
                if not any(sign in str(error) for sign in _TOO_LARGE) or len(self.options) == 1:
                    raise _cannot_build(shapes, self.backend, error) from error
            del self.options[0]
            warnings.warn(
                f"FlexAttention's kernel does not fit the shared memory of {shapes.device}; "
                f"building it with kernel_options={self.options[0]}.",
                BackendNotice,
                stacklevel=2,
            )

    def _without_decoding(self, shapes: Shapes) -> dict[str, Any]:
        """The kernel for short queries stacks the heads of a KV head, and has no form for more rows than a tile has.

        FlexAttention takes it below 128 queries without asking; read in torch 2.11 and 2.13, met on 2.11.
        """
        rows = shapes.q_len * (shapes.heads // shapes.kv_heads)
        stacked = shapes.device.type == "cuda" and shapes.q_len < _DECODED and rows > self.settings.block_size
        return {"FORCE_USE_FLEX_ATTENTION": True} if stacked and "BACKEND" not in self.options[0] else {}

    def _build(self, graph: Any, inputs: Any) -> Any:
        self.builds.append(self._call)
        return _dynamo.inductor(graph, inputs)

    def _spent(self) -> RecompileBudgetError:
        listed = "; ".join(f"{n}: {what}" for n, what in enumerate(self.builds, 1))
        return RecompileBudgetError(
            "recompile_budget",
            got=f"a call that needs build {len(self.builds) + 1}: {self._call}",
            expected=f"at most {self.settings.recompile_budget} builds of one pattern. So far, {listed}",
            mend="Lengths alone need no build while dynamic=True; keep dtype, head counts and head_dim fixed, or "
            "raise recompile_budget.",
        )


def _without_autocast(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Operands keep their dtype, as on every other backend."""
    if not torch.is_autocast_enabled(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def _fitting(block_size: int, option: dict[str, Any]) -> dict[str, Any]:
    """Kernel blocks that divide a tile smaller than FlexAttention's usual 128; nothing for multiples of 128."""
    if block_size % 128 == 0:
        return {}
    # The largest power of two in the tile size.
    largest = min(block_size & -block_size, 64)
    return {name: min(largest, option.get(name, largest)) for name in _KERNEL_BLOCKS}


def _divides(shapes: Shapes) -> dict[str, Any]:
    """Told that lengths are multiples of 128, the kernels on a GPU check no bounds.

    FlexAttention finds that out by itself for static lengths only, and dynamic ones then cost a quarter of a
    training step. Each of the two cases is a build.
    """
    whole = shapes.device.type == "cuda" and shapes.q_len % 128 == 0 and shapes.kv_len % 128 == 0
    return {"IS_DIVISIBLE": True} if whole else {}


def _dynamic(tensor: Tensor, *dims: int) -> Tensor:
    """The tensor under a new name whose dimensions may change without a build; the caller's keeps no mark."""
    alias = tensor.view_as(tensor)
    for dim in dims:
        _dynamo.mark_dynamic(alias, dim)
    return alias


def mark_dynamic(tensor: Tensor, dims: tuple[int, ...], settings: Settings) -> Tensor:
    """A captured tensor whose sequence dimensions may change without a build."""
    return _dynamic(tensor, *dims) if settings.dynamic and dims else tensor


def _describe(shapes: Shapes, lists: BlockLists, with_lse: bool) -> str:
    parts = [
        f"query [{shapes.batch}, {shapes.heads}, {shapes.q_len}, {shapes.head_dim}]",
        f"{shapes.kv_heads} KV heads, {shapes.kv_len} keys, value_dim {shapes.value_dim}",
        f"{str(shapes.dtype).removeprefix('torch.')} on {shapes.device}",
        f"block mask {list(lists[0].shape)}",
    ]
    parts += ["with gradients"] * shapes.needs_grad + ["with lse"] * with_lse
    return ", ".join(parts)


def _cannot_build(shapes: Shapes, backend: str, error: BaseException) -> BackendError:
    functions = "attn.code('rows')" if backend.startswith("gather") else "attn.source"
    return BackendError(
        f"backend={backend!r}",
        got=cause_in_words(error),
        expected=f"flex_attention to run here (torch {torch.__version__}, {shapes.device})",
        mend="Use backend='chunked', which is exact and slower, or pass fallback='reference' to allow the dense "
        f"oracle; {functions} shows the generated functions.",
    )
