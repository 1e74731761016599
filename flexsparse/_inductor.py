"""What Inductor generates from a graph that was captured and differentiated on a CPU, for a CUDA device or that CPU.

The importer of the private names that this takes; all of them are of torch 2.11 and 2.13, and others may lack some.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import unittest.mock
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch._functorch.config
import torch._inductor.config
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.compile_fx import _recursive_joint_graph_passes, compile_fx_inner, partition_fn
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.nn.attention import flex_attention as _module
from torch.utils._pytree import tree_map

from flexsparse._fake_gpu import fake_gpu

# Its package has an operator of the same name, which hides the module from an import statement.
_flex_ops = importlib.import_module("torch._higher_order_ops.flex_attention")
_DEVICE = torch.device("cuda", 0)


class _GeneratedError(Exception):
    """Ends a compilation once its text is there."""


class Capture:
    """A backend for torch.compile that keeps texts and computes nothing: of each graph, and Inductor's for both passes.

    ``arch`` is the compute capability, 90 for 9.0, or AMD's name of it, or None for C++ that runs on this CPU;
    ``training`` says that the forward pass keeps what backward needs.
    """

    def __init__(self, arch: int | str | None, shared_block: int, training: bool) -> None:
        self.arch, self.shared_block, self.training = arch, shared_block, training
        self.graphs: list[str] = []
        self.forward: list[str] = []
        self.backward: list[str] = []

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.graphs.append(graph.print_readable(print_output=False))
        backend = aot_autograd(
            fw_compiler=self._compiler(self.forward, backward=False),
            bw_compiler=self._compiler(self.backward, backward=True),
            inference_compiler=self._inference,
            decompositions=select_decomp_table(),
            # It simplifies the graph of both passes before it parts them.
            partition_fn=partition_fn,
        )
        return backend(graph, inputs)

    def _inference(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        simplified = _recursive_joint_graph_passes(graph, input_device=torch.device("cpu"))
        return self._compiler(self.forward, backward=False)(simplified, inputs)

    def _compiler(self, into: list[str], *, backward: bool) -> Callable[[Any, Any], Any]:
        def generate(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
            def stop(lowering: Any) -> None:
                code = lowering.codegen()[0]
                into.append(getattr(code, "value", code))
                raise _GeneratedError

            before = len(into)
            stopped = unittest.mock.patch.object(GraphLowering, "_compile_to_module", stop)
            alone = torch._inductor.config.patch({"fx_graph_cache": False, "compile_threads": 1})
            with contextlib.ExitStack() as stack:
                moved, operands = graph, inputs
                if self.arch is not None:
                    stack.enter_context(fake_gpu(self.arch, self.shared_block))
                    moved, operands = _retargeted(graph, inputs, keeps_lse=self.training)
                stack.enter_context(stopped)
                stack.enter_context(alone)
                try:
                    compile_fx_inner(moved, operands, is_backward=backward)
                except Exception:
                    # Inductor wraps what stopped it in an error of its own.
                    if len(into) == before:
                        raise
            return _nothing_computed(graph)

        return generate


@contextlib.contextmanager
def cpu_for_gpu() -> Iterator[None]:
    """FlexAttention with gradients may be captured on CPU tensors, and goes through no cache of compiled graphs."""
    with contextlib.ExitStack() as stack:
        if hasattr(_module, "_validate_device"):
            stack.enter_context(unittest.mock.patch.object(_module, "_validate_device", _accept))
        stack.enter_context(unittest.mock.patch.object(_flex_ops, "_permute_strides", _permute_strides))
        stack.enter_context(torch._functorch.config.patch(enable_autograd_cache=False))
        yield


def _accept(*operands: Tensor) -> None:
    """Any device is fine. Dynamo can trace this, and no mock."""


_usual_permute = _flex_ops._permute_strides


def _permute_strides(out: Tensor, query_strides: Any) -> Tensor:
    """As torch's, without the copy on the device, which a CPU build of torch cannot even pretend."""
    if out.device.type != "cuda":
        return _usual_permute(out, query_strides)
    like = _usual_permute(torch.empty_strided(out.shape, out.stride(), dtype=out.dtype), query_strides)
    return torch.empty_strided(like.shape, like.stride(), dtype=out.dtype, device=out.device)


def _retargeted(
    graph: torch.fx.GraphModule, inputs: list[Any], *, keeps_lse: bool
) -> tuple[torch.fx.GraphModule, list[Any]]:
    """A copy of the graph and its inputs on the GPU."""
    # Numbers of the graph are tensors that cannot be copied while others are pretended; they stay where they are.
    held = [*graph.named_buffers(), *graph.named_parameters()]
    graph = copy.deepcopy(graph, {id(tensor): tensor for _, tensor in held})
    mode = next((i.fake_mode for i in inputs if isinstance(i, FakeTensor)), None)
    mode = mode or FakeTensorMode(allow_non_fake_inputs=True)

    def moved(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        with mode:
            return torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device=_DEVICE)

    for module in graph.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                _retarget_node(node, moved, keeps_lse)
            module.recompile()
    for name, tensor in held:
        owner, _, leaf = name.rpartition(".")
        if tensor.dim():
            setattr(graph.get_submodule(owner), leaf, moved(tensor))
    on_gpu = [moved(i) for i in inputs]
    with mode:
        FakeTensorProp(graph, mode=mode).propagate_dont_convert_inputs(*on_gpu)
    return graph, on_gpu


def _retarget_node(node: torch.fx.Node, moved: Callable[[Any], Any], keeps_lse: bool) -> None:
    for key in ("val", "example_value"):
        if key in node.meta:
            node.meta[key] = tree_map(moved, node.meta[key])
    if node.op != "call_function":
        return

    def on_gpu(x: Any) -> Any:
        if isinstance(x, torch.device):
            return _DEVICE if x.type == "cpu" else x
        # On a CPU FlexAttention drops the option that its kernels for a GPU have in training.
        if isinstance(x, dict) and "OUTPUT_LOGSUMEXP" in x:
            return {**x, "OUTPUT_LOGSUMEXP": x["OUTPUT_LOGSUMEXP"] or keeps_lse}
        return x

    node.args = tuple(on_gpu(a) for a in node.args)
    node.kwargs = {name: on_gpu(a) for name, a in node.kwargs.items()}


def _nothing_computed(graph: torch.fx.GraphModule) -> Callable[..., list[Any]]:
    """What stands for the compiled graph: outputs of the right shapes, all zeros, and sizes."""
    outputs = next(n for n in graph.graph.nodes if n.op == "output").args[0]
    values = [x.meta["val"] if isinstance(x, torch.fx.Node) else x for x in outputs]

    def zeros(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x.node.hint if isinstance(x, torch.SymInt) else x
        shape, strides = ([zeros(n) for n in of] for of in (x.shape, x.stride()))
        return torch.empty_strided(shape, strides, dtype=x.dtype).zero_()

    return lambda *args: [zeros(x) for x in values]
