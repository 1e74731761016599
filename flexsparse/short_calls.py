"""Short calls without gradients, started again as a whole: their kernels take less time than what the host does.

What a call does on the device is decided by its shapes and numbers where no tile depends on a tensor. The first call is
like any other; the second is recorded, from scores to output, and later ones start what was recorded: one CUDA graph
where addresses come back.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flexsparse._torch import is_plain
from flexsparse.pipeline import Compiled, reads_tensors
from flexsparse.runtime.inputs import Shapes
from flexsparse.settings import Settings

_DEVICE = "cuda"
# Queries of all heads up to which a call is short: all that its steps need in between is there at once.
_SHORT = 1 << 18
# Kinds of calls that an attention knows; lengths come and go.
_KEPT = 256


class ShortCall(NamedTuple):
    """What decides all that a call does, and the tensors that it reads: query, key, value, others by their names."""

    key: Hashable
    tensors: list[Tensor]


class ShortCalls:
    """Those of one compiled pattern: what each kind was bound to when it first ran."""

    def __init__(self) -> None:
        self._bound: dict[Hashable, Any] = {}

    def find(self, key: Hashable) -> Any:
        """What the first call of this kind was bound to; None before that has run."""
        return self._bound.get(key)

    def keep(self, key: Hashable, bound: Any) -> None:
        if len(self._bound) >= _KEPT:
            self._bound.clear()
        self._bound[key] = bound


def short_call(
    compiled: Compiled,
    shapes: Shapes,
    settings: Settings,
    operands: tuple[Tensor, ...],
    given: Mapping[str, Tensor],
    *numbers: Hashable,
) -> ShortCall | None:
    """A call of these tensors, ``given`` by name, and numbers; None for one that is not repeated as a whole."""
    if shapes.device.type != _DEVICE or shapes.batch * shapes.heads * shapes.q_len > _SHORT:
        return None
    if compiled.backend(shapes, settings) != "gather" or reads_tensors(compiled.near.mask):
        return None
    if compiled.program.has_sink or compiled.program.learnable:
        # PyTorch completes what the kernels give.
        return None
    names = sorted(given)
    tensors = [*operands, *[given[name] for name in names]]
    if not all(is_plain(x) and x.device == shapes.device for x in tensors):
        return None
    from flexsparse.runtime.gathered_sizes import sizes_of

    kinds = [(name, given[name].requires_grad, given[name].dtype, given[name].shape) for name in names]
    return ShortCall((shapes, sizes_of("forward", shapes), *kinds, *numbers), tensors)


def attend_again(
    call: ShortCall, shapes: Shapes, attend: Callable[[tuple[Tensor, Tensor]], Any]
) -> tuple[Tensor, Tensor]:
    """out and lse, which ``attend`` writes where it is told, or what was recorded of it."""
    from flexsparse.codegen.kernels.recording import repeated
    from flexsparse.runtime.gathered import rooms_for

    made = rooms_for(call.tensors[0], shapes)
    with torch.no_grad():
        repeated(("attention", call.key), call.tensors, made, lambda: attend(made))
    return made
