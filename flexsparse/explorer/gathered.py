"""The kernels that gather, with the arguments of a call that is never made: its tensors have no memory."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flexsparse.codegen.gathered import GatheredSource
from flexsparse.example_inputs import example_captured
from flexsparse.explorer.kernel import Kernel
from flexsparse.explorer.targets import Target
from flexsparse.ir.program import Program
from flexsparse.plan import Plan
from flexsparse.runtime.buffers import make_buffers
from flexsparse.runtime.gathered import attend_gathered, call_sizes, tables_of
from flexsparse.runtime.gathered_arguments import GatheredCall
from flexsparse.runtime.gathered_sizes import KERNELS, sizes_of
from flexsparse.runtime.inputs import check_captured
from flexsparse.settings import CHUNK

_META = torch.device("meta")
_OPTIONS = ("num_warps", "num_stages", "maxnreg")
TYPES = {
    torch.bool: "*i1",
    torch.int8: "*i8",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
}


def gathered_kernels(program: Program, source: GatheredSource, plan: Plan, target: Target) -> tuple[Kernel, ...]:
    """Every kernel of forward and backward, once, with the sizes that ``target`` has room for.

    Lists of tiles are as long as they can be: how long they are in a call may depend on its tensors.
    """
    shapes = replace(plan.shapes, device=torch.device("cpu"))
    captured = check_captured(program, shapes, example_captured(program, shapes, 0), validate=False)
    shapes = replace(shapes, device=_META)
    values = make_buffers(program, shapes, {name: x.to(_META) for name, x in captured.items()})
    recorder = _Recorder(source.text, target)
    ks, afters = call_sizes(program.selections, shapes)
    sizes = {kernel: sizes_of(kernel, shapes, target.shared_block) for kernel in KERNELS}
    call = _RecordedCall(source, shapes, 1.0, values, tables_of(values, ks), _lists(plan), ks, afters, sizes, recorder)
    query, key, value = (
        torch.empty(shapes.batch, heads, length, dim, dtype=shapes.dtype, device=_META, requires_grad=True)
        for heads, length, dim in (
            (shapes.heads, shapes.q_len, shapes.head_dim),
            (shapes.kv_heads, shapes.kv_len, shapes.head_dim),
            (shapes.kv_heads, shapes.kv_len, shapes.value_dim),
        )
    )
    out, lse = attend_gathered(call, query, key, value)
    recorder.backward = True
    torch.autograd.backward((out, lse), (torch.empty_like(out), torch.empty_like(lse)))
    return tuple(recorder.kernels.values())


def _lists(plan: Plan) -> tuple[Tensor, ...]:
    """Block lists without memory, as long as they can be."""
    chunks = -(-plan.shapes.q_len // CHUNK)
    rows = (plan.mask_rows, plan.mask_heads, chunks)
    return tuple(
        torch.empty(*rows, *more, dtype=torch.int32, device=_META) for _ in range(4) for more in ((), (chunks,))
    )


@dataclass(frozen=True)
class _RecordedCall(GatheredCall):
    """A call whose kernels are recorded in place of being launched."""

    recorder: _Recorder

    @property
    def module(self) -> Any:
        return self.recorder


class _Recorder:
    """Stands for the module of kernels: ``module.kernel[grid](**arguments)`` is noted."""

    def __init__(self, text: str, target: Target) -> None:
        self.text, self.target = text, target
        self.backward = False
        self.kernels: dict[str, Kernel] = {}

    def __getattr__(self, name: str) -> _Launchable:
        return _Launchable(functools.partial(self._note, name))

    def _note(self, name: str, **arguments: Any) -> None:
        options = {name: arguments.pop(name) for name in _OPTIONS if name in arguments}
        if not self.target.is_nvidia:
            # What NVIDIA's backend alone knows.
            options.pop("maxnreg", None)
            arguments |= {"THREADS": 0} if "THREADS" in arguments else {}
        signature, constants, aligned = described(arguments, _constexprs(self.text)[name], _any_number(self.text))
        self.kernels.setdefault(name, Kernel(name, self.text, signature, constants, aligned, options, self.backward))


@dataclass(frozen=True)
class _Launchable:
    launch: Callable[..., None]

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self.launch


def described(
    arguments: Mapping[str, Any], constexprs: frozenset[str], any_number: frozenset[str] = frozenset()
) -> tuple[dict[str, str], dict[str, Any], tuple[str, ...]]:
    """The types, constants and multiples of 16 among arguments, as a launch would find them.

    For those in ``any_number`` it looks at no value.
    """
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    aligned = []
    for name, value in arguments.items():
        # A launch turns the number 1 into a constant as well.
        if name in constexprs or (isinstance(value, int) and value == 1 and name not in any_number):
            signature[name] = "constexpr"
            constants[name] = value
        elif isinstance(value, Tensor):
            signature[name] = TYPES[value.dtype]
            aligned.append(name)
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and name not in any_number:
                aligned.append(name)
    return signature, constants, tuple(aligned)


@functools.lru_cache(maxsize=32)
def _any_number(module: str) -> frozenset[str]:
    """The parameters for whose values Triton is told to build nothing."""
    found = re.search(r"do_not_specialize=(\[.*?\])", module)
    return frozenset(ast.literal_eval(found[1])) if found else frozenset()


@functools.lru_cache(maxsize=32)
def _constexprs(module: str) -> dict[str, frozenset[str]]:
    """For each function of a module, the parameters that it wants as constants."""
    return {
        node.name: frozenset(a.arg for a in node.args.args if a.annotation and "constexpr" in ast.unparse(a.annotation))
        for node in ast.parse(module).body
        if isinstance(node, ast.FunctionDef)
    }
