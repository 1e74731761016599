"""Launching Triton kernels with little work for the host: what was compiled for the same arguments is started directly.

Triton finds a kernel anew at every launch, from the type, divisibility and value of each argument, which takes longer
than a short kernel runs. Here the numbers themselves, the types and the alignment of all pointers together are the key.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from flexsparse.codegen.kernels.recording import recorder

# A compiled kernel is started with all of its arguments, constants too, since 3.3; read in 3.6 and 3.9, run with 3.6.
_DIRECT = tuple(int(x) for x in triton.__version__.split(".")[:2]) >= (3, 6)
# Compiled kernels that one kernel keeps; lengths come and go.
_KEPT = 256
_OPTIONS = ("num_warps", "num_stages", "maxnreg")
_compiled: dict[Any, dict[Any, Any]] = {}


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    pointers: tuple[Tensor, ...] = (),
    numbers: tuple[int | float, ...] = (),
    /,
    **named: Any,
) -> None:
    """Run ``kernel`` with its first parameters in order, pointers before numbers, and the others by name.

    ``named`` takes Triton's options too, such as ``num_warps``. It runs on the pointers' device, current or not.
    """
    device = _device(pointers, named)
    if device >= 0 and device != torch.cuda.current_device():
        with torch.cuda.device(device):
            launch(kernel, grid, pointers, numbers, **named)
        return
    active = recorder()
    if not _DIRECT or not isinstance(kernel, triton.runtime.JITFunction):
        kernel[grid](*pointers, *numbers, **named)
        if active is not None:
            active.complete = False
        return
    rest = kernel.arg_names[len(pointers) + len(numbers) :]
    given = (*pointers, *numbers, *[named[name] for name in rest])
    values, kinds, together = [], [], 0
    for value in given:
        if isinstance(value, Tensor):
            kinds.append(value.dtype)
            value = value.data_ptr()
            together |= value
        else:
            kinds.append(value)
        values.append(value)
    known = _compiled.setdefault(kernel.fn, {})
    key = (device, *[named.get(option) for option in _OPTIONS], *kinds)
    whole = (*grid, 1, 1)[:3]
    compiled = known.get(key) if together & 15 == 0 else None
    if compiled is not None:
        compiled[whole](*values)
    else:
        compiled = kernel[grid](*pointers, *numbers, **named)
        if together & 15 == 0 and compiled is not None:
            if len(known) >= _KEPT:
                known.clear()
            known[key] = compiled
    if active is not None and together & 15 == 0 and compiled is not None:
        active.kernel(compiled[whole], given)
    elif active is not None:
        active.complete = False


def _device(pointers: tuple[Tensor, ...], named: dict[str, Any]) -> int:
    tensor = pointers[0] if pointers else next(x for x in named.values() if isinstance(x, Tensor))
    return tensor.get_device()
