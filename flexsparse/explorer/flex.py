"""The kernels that Inductor generates for a pattern's FlexAttention calls on a GPU that need not be there."""

from __future__ import annotations

import ast
import functools
import json
import pathlib
import pickle
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from flexsparse.errors import BackendError
from flexsparse.explorer.cross import ended, worker_environment
from flexsparse.explorer.kernel import Kernel
from flexsparse.explorer.targets import Target
from flexsparse.ir.scalars import with_defaults
from flexsparse.ir.text import text
from flexsparse.pipeline import Compiled
from flexsparse.plan import Plan
from flexsparse.settings import Settings

_OPTIONS = ("num_warps", "num_stages")
# Those of AMD's backend, which stand elsewhere.
_AMD_OPTIONS = ("kpack", "matrix_instr_nonkdim", "waves_per_eu")


@dataclass(frozen=True)
class Order:
    """A pattern as text, the plan of a call on a GPU, and the GPU; None stands for this CPU."""

    pattern: str
    settings: Settings
    plan: Plan
    target: Target | None


def flex_kernels(compiled: Compiled, settings: Settings, plan: Plan, target: Target) -> tuple[Kernel, ...]:
    """Every kernel of forward and, where the plan wants gradients, backward. Raises BackendError."""
    texts = _texts(_order(compiled, settings, plan, target))
    found: dict[tuple[str, str], Kernel] = {}
    for way in ("forward", "backward"):
        for module in texts[way]:
            for kernel in kernels_in(module, way == "backward"):
                # The two calls of a gate on V share some.
                found.setdefault((kernel.name, kernel.module), kernel)
    return tuple(found.values())


def flex_graphs(compiled: Compiled, settings: Settings, plan: Plan, target: Target) -> list[str]:
    """The graph of each FlexAttention call as Dynamo captured it. Raises BackendError."""
    return _texts(_order(compiled, settings, plan, target))["graph"]


def cpp_kernels(compiled: Compiled, settings: Settings, plan: Plan) -> list[str]:
    """The C++ of the forward pass on this CPU, kernel by kernel, with their names. Raises BackendError."""
    return [cpp for text in _texts(_order(compiled, settings, plan, None))["forward"] for cpp in cpp_in(text)]


def cpp_in(text: str) -> Iterator[str]:
    """The C++ kernels of one of Inductor's modules, each below its name."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            made = node.value.func
            if isinstance(made, ast.Attribute) and made.attr in ("cpp", "cpp_pybinding"):
                source = next(
                    a.value for a in node.value.args if isinstance(a, ast.Constant) and isinstance(a.value, str)
                )
                yield f"// {ast.unparse(node.targets[0])}\n{source.strip()}\n"


def _order(compiled: Compiled, settings: Settings, plan: Plan, target: Target | None) -> Order:
    if compiled.program.opaque:
        raise refused(target, "functions that could not be traced", "a pattern whose text says all of it")
    # Another process reads the text, and wants the numbers.
    pattern = text(with_defaults(compiled.pattern, compiled.program.numbers))
    return Order(pattern, settings, plan, target)


@functools.lru_cache(maxsize=32)
def _texts(order: Order) -> dict[str, list[str]]:
    with tempfile.TemporaryDirectory(prefix="flexsparse-") as name:
        folder = pathlib.Path(name)
        (folder / "order.pickle").write_bytes(pickle.dumps(order))
        # A GPU that is there would have its own say in what is generated.
        hidden = {"CUDA_VISIBLE_DEVICES": "", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-m", "flexsparse.explorer.flex_worker", name],
            env={**worker_environment(), **hidden},
            capture_output=True,
            text=True,
            check=False,
        )
        path = folder / "texts.json"
        if not path.exists():
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            raise refused(order.target, f"{ended(done.returncode)}: {lines[-1][:300] if lines else 'no message'}")
        found: dict[str, list[str]] = json.loads(path.read_text())
    if "error" in found:
        raise refused(order.target, found["error"][0])
    return found


def refused(target: Target | None, got: str, expected: str = "", mend: str = "") -> BackendError:
    """The error for what this version of torch cannot generate, for a GPU or, with None, for this CPU."""
    place = "C++ for on this CPU" if target is None else "kernels for without a GPU"
    return BackendError(
        "stage='cpp'" if target is None else f"target={target.name!r}",
        got=got,
        expected=expected or f"a call that torch {torch.__version__} can generate {place}",
        mend=mend or "The stage 'source' shows the functions that FlexAttention takes.",
    )


def kernels_in(text: str, backward: bool) -> Iterator[Kernel]:
    """The Triton kernels of one of Inductor's modules, each as plain Triton with what it is launched with."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "triton":
            name, source = (ast.literal_eval(arg) for arg in node.args[:2])
            yield _plain(name, source, backward)


def _plain(name: str, source: str, backward: bool) -> Kernel:
    """A kernel without Inductor's decorator, which would choose among launches on a GPU, and without what that uses."""
    tree = ast.parse(source)
    function = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == name)
    heuristic = next(d for d in function.decorator_list if isinstance(d, ast.Call))
    given = {keyword.arg: keyword.value for keyword in heuristic.keywords}
    options = {option: ast.literal_eval(given[option]) for option in _OPTIONS if option in given}
    assert isinstance(given["triton_meta"], ast.Dict)
    meta = {
        key.value: value
        for key, value in zip(given["triton_meta"].keys, given["triton_meta"].values, strict=True)
        if isinstance(key, ast.Constant)
    }
    options |= {option: ast.literal_eval(meta[option]) for option in _AMD_OPTIONS if option in meta}
    signature, constants = ast.literal_eval(meta["signature"]), ast.literal_eval(meta["constants"])
    position = list(signature)
    aligned = tuple(
        position[n]
        for (n,), attributes in ast.literal_eval(meta["configs"])[0].items()
        if ["tt.divisibility", 16] in attributes
    )
    return Kernel(
        name=name,
        module=_without_heuristic(source, tree, heuristic),
        signature=signature,
        constants=constants,
        aligned=aligned,
        options=options,
        backward=backward,
        # Only templates know their block sizes by now; the others have them from a run on the GPU.
        fixed=isinstance(heuristic.func, ast.Attribute) and heuristic.func.attr == "template",
    )


def _without_heuristic(source: str, tree: ast.Module, heuristic: ast.Call) -> str:
    used = {
        n.id
        for statement in tree.body
        if isinstance(statement, ast.FunctionDef)
        for part in (*statement.body, *(d for d in statement.decorator_list if d is not heuristic))
        for n in ast.walk(part)
        if isinstance(n, ast.Name)
    }
    dropped: list[ast.stmt | ast.expr] = [heuristic]
    for statement in tree.body:
        imported = {a.asname or a.name for a in statement.names} if isinstance(statement, ast.ImportFrom) else used
        if not imported & used or (isinstance(statement, ast.Expr) and "set_driver" in ast.unparse(statement)):
            dropped.append(statement)
    lines = {n for node in dropped for n in range(node.lineno - 1, node.end_lineno or node.lineno)}
    kept = "\n".join(line for n, line in enumerate(source.splitlines()) if n not in lines)
    # What was between the lines that went.
    return re.sub(r"\n{4,}", "\n\n\n", kept).strip("\n") + "\n"
