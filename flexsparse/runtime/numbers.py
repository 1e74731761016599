"""Numbers of a call: which were given, and how functions take them."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
from torch import Tensor

from flexsparse.errors import CapturedError, did_you_mean
from flexsparse.ir.nodes import Scalar
from flexsparse.ir.program import Numbers
from flexsparse.ir.scalars import numbers_at


def split_numbers(
    scalars: Mapping[str, Scalar], given: Mapping[str, object]
) -> tuple[Numbers, dict[str, Tensor | None]]:
    """The number of every scalar, and what else was given: tensors.

    Raises PatternArgumentError for a number of another kind, CapturedError for one that the pattern does not take.
    """
    if not scalars and not any(isinstance(value, int | float) for value in given.values()):
        return (), dict(given)  # type: ignore[arg-type]
    for name, value in given.items():
        if name not in scalars and isinstance(value, int | float):
            raise CapturedError(
                name,
                got=f"the number {value!r}",
                expected=f"numbers by the names {', '.join(scalars)}" if scalars else "no numbers",
                mend=did_you_mean(name, scalars) or f"Pass a tensor, or write scalar({name!r}, ...) in the pattern.",
            )
    numbers = {name: value for name, value in given.items() if name in scalars and value is not None}
    tensors = {name: value for name, value in given.items() if name not in scalars}
    return numbers_at(scalars, numbers), tensors  # type: ignore[return-value]


def as_it_is(number: bool | int | float) -> bool | int | float:
    """A number of the call for functions that PyTorch runs one operation after another."""
    return number


def as_argument(number: bool | int | float, real: torch.dtype, device: torch.device) -> Tensor:
    """A number of the call as compiled functions take it: a tensor without dimensions, so that it is in no kernel."""
    # What a CUDA graph makes is filled when it is replayed, and must not be kept for other calls.
    captured = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    made = _number_tensor.__wrapped__ if captured else _number_tensor
    if isinstance(number, bool):
        return made(number, torch.bool, device)
    if isinstance(number, int):
        # Indices have 32 bits, and kernels are quicker with as many.
        return made(number, torch.int32 if -(2**31) <= number < 2**31 else torch.int64, device)
    return made(number, real, device)


@functools.lru_cache(maxsize=256)
def _number_tensor(number: bool | int | float, dtype: torch.dtype, device: torch.device) -> Tensor:
    # What is kept serves training as well, so it must not be made of inference tensors. A fill waits for no GPU.
    with torch.inference_mode(False):
        return torch.full((), number, dtype=dtype, device=device)
