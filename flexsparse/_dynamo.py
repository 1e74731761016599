"""The importer of torch.compile's private names, and of those that differ between versions (2.5 to 2.14)."""

from __future__ import annotations

import contextlib
import unittest.mock
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch._dynamo
from torch import Tensor
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch.nn.attention import flex_attention as _module

# What a build that goes wrong raises.
FAILURES = (torch._dynamo.exc.TorchDynamoException, RuntimeError, ValueError, NotImplementedError)


def mark_dynamic(tensor: Tensor, dim: int) -> None:
    """A dimension may change without a build."""
    torch._dynamo.maybe_mark_dynamic(tensor, dim)


def is_whole_graph() -> bool:
    """Whether what Dynamo traces at this moment may not be left in between, as under ``fullgraph=True``."""
    root = InstructionTranslator.current_tx().output.root_tx
    return bool(getattr(root, "one_graph", True) or getattr(root, "error_on_graph_break", False))


def inductor(graph: Any, inputs: Any) -> Any:
    """torch.compile's default backend, to be wrapped by one that counts."""
    return lookup_backend("inductor")(graph, inputs)


# The limit was called cache_size_limit until 2.6; past it, fullgraph raises one of these.
_LIMIT = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"
RECOMPILE_LIMIT_HIT: tuple[type[BaseException], ...] = tuple(
    getattr(torch._dynamo.exc, name)
    for name in ("FailOnRecompileLimitHit", "RecompileLimitExceeded", "FailOnCacheLimitHit")
    if hasattr(torch._dynamo.exc, name)
)


def recompile_limit(limit: int) -> contextlib.AbstractContextManager[Any]:
    """How often one frame may be compiled, for as long as the context lasts."""
    # A Python number that a function closes over must stay one: flex_attention takes no symbolic floats.
    wanted = {_LIMIT: limit, "specialize_float": True}
    if all(getattr(torch._dynamo.config, name) == value for name, value in wanted.items()):
        return contextlib.nullcontext()
    return torch._dynamo.config.patch(wanted)


@contextlib.contextmanager
def eager() -> Iterator[None]:
    """For flex_attention that is not compiled on purpose: no warning about it, and gradients on CPU.

    From 2.11 on a device check refuses gradients on CPU that work underneath.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        if hasattr(_module, "_validate_device"):
            stack.enter_context(unittest.mock.patch.object(_module, "_validate_device", return_value=None))
        # A Python number that a function closes over must stay one: flex_attention takes no symbolic floats.
        stack.enter_context(torch._dynamo.config.patch(specialize_float=True))
        yield
