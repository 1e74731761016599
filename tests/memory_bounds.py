"""In Triton's interpreter: every load and store of a kernel stays inside the tensors that it was given."""

from __future__ import annotations

import traceback
from typing import Any

import numpy as np
import pytest
import torch


def check_accesses(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on an access outside the arguments' memory raises an AssertionError that names the line."""
    from triton.runtime import interpreter

    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    run, load, store = executor.__call__, builder.create_masked_load, builder.create_masked_store
    inside = np.zeros((0, 2), dtype=np.int64)

    def call(self: Any, *args: Any, **named: Any) -> Any:
        nonlocal inside
        tensors = [x for x in (*args, *named.values()) if isinstance(x, torch.Tensor)]
        ends = {(x.data_ptr(), x.data_ptr() + _span(x)) for x in tensors}
        inside = np.array(sorted(ends), dtype=np.int64).reshape(-1, 2)
        return run(self, *args, **named)

    def check(pointers: Any, mask: Any) -> None:
        size = np.dtype(interpreter._get_np_dtype(pointers.get_element_ty())).itemsize
        at, chosen = np.broadcast_arrays(pointers.data, mask.data)
        first = at[chosen].astype(np.int64)
        within = ((first[:, None] >= inside[:, 0]) & (first[:, None] + size <= inside[:, 1])).any(1)
        if not within.all():
            frames = [f for f in traceback.extract_stack() if f.filename != __file__ and "tl." in (f.line or "")]
            where = f"{frames[-1].name}, line {frames[-1].lineno}: {frames[-1].line}" if frames else "a kernel"
            raise AssertionError(f"{int((~within).sum())} accesses outside the kernel's tensors in {where}")

    def checked_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        check(pointers, mask)
        return load(self, pointers, mask, *rest)

    def checked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        check(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    monkeypatch.setattr(executor, "__call__", call)
    monkeypatch.setattr(builder, "create_masked_load", checked_load)
    monkeypatch.setattr(builder, "create_masked_store", checked_store)


def _span(x: torch.Tensor) -> int:
    """Bytes from a tensor's first element to the end of its last."""
    last = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True)) if x.numel() else -1
    return (last + 1) * x.element_size()
