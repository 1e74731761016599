"""Launching Triton kernels with little work for the host: what was compiled for the same arguments is started directly.

Triton finds a kernel anew at every launch, from the type, divisibility and value of each argument, which takes longer
than a short kernel runs. Here the numbers themselves, the types and the alignment of all pointers together are the key.
"""

from __future__ import annotations

import functools
import operator
from typing import Any

import triton
from torch import Tensor

# A compiled kernel is started with all of its arguments, constants too, since 3.3; read in 3.6 and 3.9, run with 3.6.
_DIRECT = tuple(int(x) for x in triton.__version__.split(".")[:2]) >= (3, 6)
# Compiled kernels that one kernel keeps; lengths come and go.
_KEPT = 256
_compiled: dict[Any, dict[Any, Any]] = {}


def launch(
    kernel: Any, grid: tuple[int, ...], pointers: tuple[Tensor, ...], numbers: tuple[int | float, ...], **constants: Any
) -> None:
    """Run ``kernel``, whose parameters are pointers, then numbers, then constants in the order given here.

    ``constants`` also takes Triton's options, such as ``num_warps``, behind them. The pointers must be on the current
    CUDA device.
    """
    if not _DIRECT or not isinstance(kernel, triton.runtime.JITFunction):
        kernel[grid](*pointers, *numbers, **constants)
        return
    addresses = [x.data_ptr() for x in pointers]
    if functools.reduce(operator.or_, addresses, 0) & 15:
        kernel[grid](*pointers, *numbers, **constants)
        return
    known = _compiled.setdefault(kernel.fn, {})
    types = tuple([x.dtype for x in pointers])
    key = (pointers[0].get_device(), types, numbers, tuple(constants.values()))
    found = known.get(key)
    if found is None:
        if len(known) >= _KEPT:
            known.clear()
        compiled = kernel[grid](*pointers, *numbers, **constants)
        if compiled is not None:
            names = kernel.arg_names[len(pointers) + len(numbers) :]
            known[key] = compiled, tuple(constants[name] for name in names)
        return
    compiled, values = found
    compiled[(*grid, 1, 1)[:3]](*addresses, *numbers, *values)
