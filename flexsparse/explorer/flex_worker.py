"""Inductor's texts for an order, in a process of its own: ``python -m flexsparse.explorer.flex_worker FOLDER``."""

from __future__ import annotations

import json
import pathlib
import pickle
import sys
import unittest.mock
import warnings
from dataclasses import replace
from typing import Any

import torch

from flexsparse import _dynamo, _inductor
from flexsparse.compiler import compile
from flexsparse.errors import BackendError
from flexsparse.example_inputs import example_call
from flexsparse.explorer.flex import Order
from flexsparse.failures import cause_in_words, cause_of
from flexsparse.pipeline import bind_call, compile_pattern


def main(folder: pathlib.Path) -> None:
    """Write ``texts.json`` with "forward", "backward" and "graph" for the order in ``order.pickle``."""
    warnings.simplefilter("ignore")
    order: Order = pickle.loads((folder / "order.pickle").read_bytes())
    # Whatever goes wrong becomes the message of an error.
    try:
        capture = _captured(order)
        found = {"forward": capture.forward, "backward": capture.backward, "graph": capture.graphs}
    except Exception as error:  # noqa: BLE001
        cause = cause_of(error)
        # An error of our own says what it got, and is about this call.
        found = {"error": [cause.got if isinstance(cause, BackendError) else cause_in_words(cause)]}
    (folder / "texts.json").write_text(json.dumps(found))


def _captured(order: Order) -> _inductor.Capture:
    """Call the pattern on CPU tensors, with a backend that generates code for the target and computes nothing."""
    shapes, target = order.plan.shapes, order.target
    arch = None if target is None else target.arch
    attention = compile(
        order.pattern,
        backend=order.plan.backend,
        deterministic=order.settings.deterministic,
        block_size=order.settings.block_size,
        kernel_options=dict(order.settings.kernel_options),
        dynamic=order.settings.dynamic,
    )
    on_cpu = replace(shapes, device=torch.device("cpu"), needs_grad=False)
    call = example_call(attention, on_cpu, 0)
    captured = {n: x.requires_grad_(shapes.needs_grad and n in call.learned) for n, x in call.captured.items()}
    operands = (call.query, call.key, call.value)
    for operand in operands:
        operand.requires_grad_(shapes.needs_grad)
    eager = replace(order.settings, backend=f"{order.plan.backend}_eager")
    compiled = compile_pattern(attention.pattern.node, shapes.q_offset != 0)
    bound = bind_call(compiled, on_cpu, captured, eager, operands=operands[:2], validate=False)
    carried = False
    buffers: dict[str, Any] = dict(bound.buffers)
    for name, value in buffers.items():
        if (
            isinstance(value, torch.Tensor)
            and value.requires_grad
            and attention.runner.is_recomputed(name, shapes.dtype)
        ):
            # Its gradient comes through the chunked path, which needs the LSE and is not FlexAttention's.
            buffers[name], carried = value.detach(), True
    capture = _inductor.Capture(arch, 0 if target is None else target.shared_block, shapes.needs_grad)
    with (
        torch.set_grad_enabled(shapes.needs_grad),
        _inductor.cpu_for_gpu(),
        unittest.mock.patch.object(_dynamo, "inductor", capture),
    ):
        run = replace(bound, buffers=buffers, plan=order.plan)
        out, lse = attention.runner.run(run, shapes.head_dim**-0.5, operands, carried)
        if shapes.needs_grad:
            results = [out, lse] if carried else [out]
            torch.autograd.backward(results, [torch.zeros_like(x) for x in results])
    return capture


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
