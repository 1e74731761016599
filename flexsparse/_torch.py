"""The importer of torch names that are private or differ between versions (2.5 to 2.14).

Those of torch.compile are in ``_dynamo``: they take a second to import, which a block mask need not wait for.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import flex_attention as _module
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

from flexsparse.errors import GradientError

VERSION = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])

# return_aux replaced return_lse in 2.9; both give the natural logarithm.
_HAS_AUX = VERSION >= (2, 9)
# Gradients of captured tensors came in 2.6; head_dim had to be a power of two until 2.7.
HAS_CAPTURED_GRADIENTS = VERSION >= (2, 6)
ANY_HEAD_DIM = VERSION >= (2, 8)


def attend(
    operands: tuple[Tensor, Tensor, Tensor],
    lists: tuple[Tensor, ...],
    mask_mod: Callable[..., Tensor],
    score_mod: Callable[..., Tensor] | None,
    block: int,
    scale: float,
    enable_gqa: bool,
    with_lse: bool,
    kernel_options: dict[str, Any] | None,
) -> tuple[Tensor, Tensor | None]:
    """flex_attention with its keywords as this torch names them; the frame that is compiled.

    The block mask is put together inside, so that its lengths are the operands' and not constants of the graph.
    """
    query, key, value = operands
    mask = block_mask(lists, block, mask_mod, query.shape[2], key.shape[2])
    options: dict[str, Any] = {"scale": scale, "enable_gqa": enable_gqa, "kernel_options": kernel_options}
    if not with_lse:
        return flex_attention(query, key, value, score_mod, mask, **options), None
    if _HAS_AUX:
        wanted = _module.AuxRequest(lse=True)
        out, aux = flex_attention(query, key, value, score_mod, mask, return_aux=wanted, **options)
        return out, aux.lse
    out, lse = flex_attention(query, key, value, score_mod, mask, return_lse=True, **options)
    return out, lse


def block_mask(
    lists: tuple[Tensor, ...], block: int, mask_mod: Callable[..., Tensor], q_len: int, kv_len: int
) -> BlockMask:
    """A BlockMask from its lists in both directions; ``seq_lengths`` came in 2.6.

    BlockMask.from_kv_blocks would transpose the lists through a dense grid.
    """
    partial_num, partial, full_num, full, partial_q_num, partial_q, full_q_num, full_q = lists
    lengths: dict[str, Any] = {"seq_lengths": (q_len, kv_len)} if VERSION >= (2, 6) else {}
    return BlockMask(
        kv_num_blocks=partial_num,
        kv_indices=partial,
        full_kv_num_blocks=full_num,
        full_kv_indices=full,
        q_num_blocks=partial_q_num,
        q_indices=partial_q,
        full_q_num_blocks=full_q_num,
        full_q_indices=full_q,
        BLOCK_SIZE=(block, block),
        mask_mod=mask_mod,
        **lengths,
    )


# How a custom operator says that no CUDA graph may hold it, because it keeps tensors between its calls: 2.8 and later.
OUTSIDE_GRAPHS: dict[str, Any] = (
    {"tags": (torch.Tag.cudagraph_unsafe,)} if hasattr(torch.Tag, "cudagraph_unsafe") else {}
)


# What PyTorch dispatches on outside of any operator.
_OUTSIDE = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()


def as_outside() -> contextlib.AbstractContextManager[None]:
    """Everything inside a custom operator as outside of it: autograd, and torch.func, by which FlexAttention runs."""
    guard: contextlib.AbstractContextManager[None] = torch._C._ForceDispatchKeyGuard(*_OUTSIDE)
    return guard


@contextlib.contextmanager
def autograd_inside() -> Iterator[None]:
    """Gradients inside a custom operator, where autograd is switched off."""
    keys = (torch._C.DispatchKey.AutogradFunctionality, torch._C.DispatchKey.ADInplaceOrView)
    with contextlib.ExitStack() as stack:
        for key in keys:
            stack.enter_context(torch._C._SetExcludeDispatchKeyGuard(key, False))
        stack.enter_context(torch.enable_grad())
        yield


def first_derivatives(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A ``backward`` that autograd cannot differentiate, and that says so where it is asked to.

    torch's ``once_differentiable`` says so to ``backward()`` alone: ``torch.autograd.grad`` would leave out what is
    missing, as its results do not hang together with the inputs.
    """

    @functools.wraps(backward)
    def checked(ctx: Any, *gradients: Any) -> Any:
        with torch.no_grad():
            found = backward(ctx, *gradients)
        if not torch.is_grad_enabled():
            return found
        inputs = [x for x in (*gradients, *ctx.saved_tensors) if isinstance(x, Tensor) and x.requires_grad]
        return _Second.apply(len(found), *found, *inputs)

    return checked


def refuse_second_derivative(ctx: Any, *_: Any) -> tuple[Any, ...]:
    """The ``backward`` of what is a gradient of attention itself. Raises GradientError."""
    raise GradientError(
        "attention",
        got="a second derivative",
        expected="first derivatives only",
        mend="Use create_graph=False, or flexsparse.reference, which autograd differentiates.",
    )


class _Second(torch.autograd.Function):
    """The first ``count`` tensors as they are, with a gradient that is refused."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Any) -> tuple[Any, ...]:
        return tuple(x.view_as(x) if isinstance(x, Tensor) else x for x in tensors[:count])

    backward = staticmethod(refuse_second_derivative)


def has_tangent(tensor: Tensor) -> bool:
    """Whether a derivative in forward mode goes with the tensor."""
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None


class SeesOperations(TorchDispatchMode):
    """Calls ``see`` with schema and result of every operation inside ``with``, which goes on as without it."""

    def __init__(self, see: Callable[[Any, Any], None]) -> None:
        super().__init__()
        self._see = see

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        self._see(func._schema, found)
        return found


def is_plain(tensor: Tensor) -> bool:
    """Whether nothing but autograd and we watch what is done with it: no compiler, torch.func, mode, subclass.

    Then a custom operator may be passed by, whose calls take the host longer than short kernels run.
    """
    return (
        not torch.compiler.is_compiling()
        and type(tensor) in (Tensor, torch.nn.Parameter)
        and all(isinstance(mode, SeesOperations) for mode in _get_current_dispatch_mode_stack())
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def version_of(tensor: Tensor) -> int:
    """A number that grows with every change in place of the tensor or of what it views."""
    return tensor._version
