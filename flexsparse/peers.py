"""What else computes attention, on the work nearest to a pattern's: PyTorch's own, and other libraries where installed.

Nothing here is equal to a pattern that selects keys; each contender says what it computes instead.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import itertools
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from flexsparse.analysis.proofs import is_causal
from flexsparse.block_masks import block_mask
from flexsparse.compiler import CompiledAttention
from flexsparse.dense import dense_mask
from flexsparse.errors import ExpressionError
from flexsparse.expression import Pattern
from flexsparse.ir.nodes import Constant
from flexsparse.tolerance import Call

GROUPS = ("sdpa", "flex", "others")
_SDPA = {
    "SDPA math": SDPBackend.MATH,
    "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
}
# The mask as a tensor is built from dense index tensors; beyond this it would not be built by anyone.
_LONGEST_MASK = 4096
THIS = "this pattern"
# Other libraries: what is imported of each, and the package that brings it.
_OTHERS = {
    "fla.ops.nsa": "flash-linear-attention",
    "adasplash": "adasplash",
    "flash_sparse_attn": "flash-sparse-attn",
    "attn_gym.masks": "attn-gym",
}
_BUILDS = itertools.count()


class CannotRun(Exception):  # noqa: N818
    """Why a contender is not measured, in words for the table."""


@dataclass(frozen=True)
class Contender:
    """Something to be timed: ``prepare()`` gives the call, whose output gradients flow from, or raises CannotRun."""

    name: str
    computes: str
    prepare: Callable[[], Callable[[], Tensor]]
    has_backward: bool = True


@dataclass(frozen=True)
class Setting:
    """A pattern with operands that require gradients where they are wanted; ``causal``: no query sees a later key."""

    attention: CompiledAttention
    call: Call
    causal: bool

    @property
    def leaves(self) -> list[Tensor]:
        """What receives gradients in a call of the pattern."""
        return [*self.call.operands.values(), *(self.call.captured[n] for n in self.call.learned)]

    @property
    def captured(self) -> dict[str, Any]:
        """The captured tensors, by the keywords that a call takes them by."""
        return dict(self.call.captured)

    @property
    def dense(self) -> str:
        """What dense attention over the same tensors computes."""
        return "dense causal" if self.causal else "dense"

    @property
    def heads_shared(self) -> bool:
        return self.call.query.shape[1] != self.call.key.shape[1]


def make_setting(attention: CompiledAttention, call: Call, *, needs_grad: bool) -> Setting:
    """``call`` with gradients asked for in place; its tensors are what every contender is given."""
    setting = Setting(attention, call, bool(is_causal(attention.pattern)))
    for leaf in setting.leaves:
        leaf.requires_grad_(needs_grad)
    return setting


def contenders(setting: Setting, groups: tuple[str, ...] = GROUPS) -> Iterator[Contender]:
    """The pattern itself, then the peers of ``groups`` in a fixed order, those that are not installed included."""
    causal, trains = setting.causal, setting.call.query.is_cuda
    yield Contender("flexsparse", THIS, lambda: _ours(setting))
    if "sdpa" in groups:
        for name, backend in _SDPA.items():
            yield Contender(name, setting.dense, lambda backend=backend: _sdpa(setting, backend))  # type: ignore[misc]
        yield Contender("SDPA, mask given", _masked_work(setting), lambda: _sdpa_masked(setting))
    if "flex" in groups:
        yield Contender("FlexAttention", _flex_work(setting), lambda: _flex(setting), has_backward=trains)
    if "others" in groups:
        yield Contender("fla NSA", "16 blocks of 64, which it chooses", lambda: _fla(setting, chooses=True))
        yield Contender("fla NSA, selected", "16 blocks of 64, given", lambda: _fla(setting, chooses=False))
        yield Contender("adasplash", "causal entmax" if causal else "entmax", lambda: _adasplash(setting))
        yield Contender("flash-sparse-attn", "pruned causal" if causal else "pruned", lambda: _flash_sparse(setting))
        yield Contender("attn-gym", "its causal mask", lambda: _attn_gym(setting), has_backward=trains)


def _ours(setting: Setting) -> Callable[[], Tensor]:
    call = setting.call
    # Once with every check; those that read values are left out of what is timed.
    with torch.no_grad():
        setting.attention(*call.operands.values(), **setting.captured)
    return lambda: setting.attention(*call.operands.values(), validate=False, **setting.captured)


def _sdpa(setting: Setting, backend: SDPBackend) -> Callable[[], Tensor]:
    if backend is SDPBackend.MATH:
        _refuse_large(setting)
    if backend in (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION) and not setting.call.query.is_cuda:
        raise CannotRun("its kernels need a GPU")
    query, key, value = setting.call.operands.values()

    def run() -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(
                query, key, value, is_causal=setting.causal, enable_gqa=setting.heads_shared
            )

    _try_out(run)
    return run


def _try_out(run: Callable[[], Tensor]) -> None:
    """Run once; PyTorch gives its reasons against a back end as warnings and then raises without them."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            run()
        except RuntimeError as error:
            reasons = [str(w.message).split(" (Triggered")[0] for w in said]
            # The first line is a headline, such as "Flash attention kernel not used because:".
            told = [reason for reason in reasons if not reason.endswith("because:")]
            raise CannotRun(told[0] if told else str(error).splitlines()[0]) from error


def _refuse_large(setting: Setting) -> None:
    """Raise CannotRun where every score of the call would fill most of the memory."""
    query, kv_len = setting.call.query, setting.call.key.shape[2]
    # Scores and weights, and as much again for their gradients.
    needed = 4 * query.shape[0] * query.shape[1] * query.shape[2] * kv_len * query.element_size()
    if needed > _memory(query.device) / 2:
        raise CannotRun(f"its scores would take {needed / 2**30:,.0f} GiB")


def _memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 8 << 30


def _masked_work(setting: Setting) -> str:
    program = setting.attention.ir
    if program.selections or program.chosen:
        return "mask of the call"
    ungated = all(g == Constant(1.0) for g in (program.gate_k, program.gate_v, program.gate_logit))
    return "same mask" if ungated and not program.has_score and not program.has_sink else "mask, no scores"


def _sdpa_masked(setting: Setting) -> Callable[[], Tensor]:
    program, (query, key, value) = setting.attention.ir, setting.call.operands.values()
    if program.selections or program.chosen:
        raise CannotRun("which keys are seen is known at the call only")
    if key.shape[2] > _LONGEST_MASK:
        raise CannotRun(f"a mask of every pair, at most {_LONGEST_MASK:,} long here")
    _refuse_large(setting)
    sizes: dict[str, Any] = {"batch": query.shape[0], "heads": query.shape[1], "device": query.device}
    mask = dense_mask(setting.attention.pattern, query.shape[2], key.shape[2], **sizes, **setting.captured)

    def run() -> Tensor:
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=setting.heads_shared)

    _try_out(run)
    return run


def _flex_functions(setting: Setting) -> tuple[Any, Any] | None:
    """The pattern as FlexAttention's functions, None where they cannot express it."""
    (_, heads, length, _), program = setting.call.query.shape, setting.attention.ir
    if program.gate_v != Constant(1.0):
        return None
    try:
        return setting.attention.pattern.to_flex(heads=heads, q_len=length, **setting.captured)
    except ExpressionError:
        return None


def _flex_work(setting: Setting) -> str:
    return setting.dense if _flex_functions(setting) is None else THIS


def _flex(setting: Setting) -> Callable[[], Tensor]:
    functions = _flex_functions(setting)
    if functions is None:
        return _flex_under(setting, _block_mask(setting, "causal" if setting.causal else "full", {}), None)
    return _flex_under(setting, _block_mask(setting, setting.attention.pattern, setting.captured), functions[1])


def _block_mask(setting: Setting, pattern: Pattern | str, captured: dict[str, Any]) -> Any:
    """The block mask of a pattern for these operands; it is made beforehand and not timed."""
    (batch, heads, length, _), device = setting.call.query.shape, setting.call.query.device
    return block_mask(pattern, length, batch=batch, heads=heads, device=device, **captured)


def _flex_under(setting: Setting, mask: Any, score_mod: Any) -> Callable[[], Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    query, key, value = setting.call.operands.values()

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out: Tensor = flex_attention(query, key, value, score_mod, mask, enable_gqa=setting.heads_shared)
        return out

    # Builds are kept and counted by code object, and after eight of one torch goes on without compiling, in silence.
    attend.__code__ = attend.__code__.replace(co_name=f"attend_{next(_BUILDS)}")
    compiled = torch.compile(attend, dynamic=False)
    if not query.is_cuda:
        # It refuses operands that ask for gradients there.
        query, key, value = (x.detach() for x in (query, key, value))
    return lambda: compiled(query, key, value)


def _module(name: str, setting: Setting, *, gpu: bool = True) -> Any:
    """A module of ``_OTHERS``. Raises CannotRun where it is not installed, or cannot be imported, or wants a GPU."""
    if importlib.util.find_spec(name.split(".")[0]) is None:
        raise CannotRun(f"not installed (pip install {_OTHERS[name]})")
    if gpu and not setting.call.query.is_cuda:
        raise CannotRun("its kernels need a GPU")
    try:
        return importlib.import_module(name)
    except Exception as error:
        said = str(error).splitlines() or [type(error).__name__]
        raise CannotRun(f"its import failed: {said[0]}") from error


def versions_of_others() -> dict[str, str]:
    """The versions of the other libraries, of those that are installed."""
    found = {}
    for package in _OTHERS.values():
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def _fla(setting: Setting, *, chooses: bool) -> Callable[[], Tensor]:
    return nsa(_module("fla.ops.nsa", setting), *setting.call.operands.values(), chooses=chooses)


def nsa(module: Any, query: Tensor, key: Tensor, value: Tensor, *, chooses: bool) -> Callable[[], Tensor]:
    """NSA by ``module``, fla.ops.nsa, with 16 blocks of 64 keys for each query, on operands [B, H, S, D].

    ``chooses``: with its compressed branch, by which it finds the blocks; otherwise the selected branch alone, on
    random blocks, the query's own among them. Its sliding window, flash-attn's, is left out. Raises CannotRun for a
    number of query heads a KV head that it does not take.
    """
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    (batch, length, heads, _), kv_heads = query.shape, key.shape[2]
    group = heads // kv_heads
    if group < 16 or group & (group - 1):
        raise CannotRun(f"it wants 16, 32, ... query heads a KV head, not {group}")
    gate = torch.ones(batch, length, heads, device=query.device, dtype=query.dtype)
    given: dict[str, Tensor] = {"g_cmp": gate}
    if not chooses:
        own = (torch.arange(length, device=query.device) // 64).view(1, length, 1, 1).expand(batch, -1, kv_heads, 16)
        drawn = (torch.rand(own.shape, device=query.device) * (own + 1)).long()
        # The first is the query's own; blocks that are drawn twice only make the work smaller, as they do in NSA.
        given = {"block_indices": torch.cat((own[..., :1], drawn[..., 1:]), -1).sort(-1).values}

    def run() -> Tensor:
        out = module.parallel_nsa(query, key, value, g_slc=gate, block_counts=16, block_size=64, **given)
        first: Tensor = out[0] if isinstance(out, tuple) else out
        return first

    return run


def _adasplash(setting: Setting) -> Callable[[], Tensor]:
    module = _module("adasplash", setting)
    query, key, value = setting.call.operands.values()
    group = query.shape[1] // key.shape[1]

    def run() -> Tensor:
        # Its first version takes as many KV heads as query heads.
        wide = (key, value) if setting.causal else (x.repeat_interleave(group, 1) for x in (key, value))
        out: Tensor = module.adasplash(query, *wide, is_causal=setting.causal)
        return out

    return run


def _flash_sparse(setting: Setting) -> Callable[[], Tensor]:
    """Attention that leaves out keys whose weight is below its threshold, the default one."""
    module = _module("flash_sparse_attn", setting)
    function = getattr(module, "flash_sparse_attn_func", None)
    if function is None:
        raise CannotRun("this version has no flash_sparse_attn_func")
    query, key, value = (x.transpose(1, 2) for x in setting.call.operands.values())

    def run() -> Tensor:
        out: Tensor = function(query=query, key=key, value=value, is_causal=setting.causal)
        return out

    return run


def _attn_gym(setting: Setting) -> Callable[[], Tensor]:
    """FlexAttention under the library's causal mask, as its own examples build it."""
    from torch.nn.attention.flex_attention import create_block_mask

    module = _module("attn_gym.masks", setting, gpu=False)
    query, kv_len = setting.call.query, setting.call.key.shape[2]
    mask = create_block_mask(module.causal_mask, None, None, query.shape[2], kv_len, device=str(query.device))
    return _flex_under(setting, mask, None)
