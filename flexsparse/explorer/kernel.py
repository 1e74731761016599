"""A kernel as it would be launched: the module that it stands in, the types of its arguments, its constants."""

from __future__ import annotations

import ast
import textwrap
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

_COMMENT: dict[str, Any] = {
    "width": 118, "initial_indent": "# ", "subsequent_indent": "#   ", "break_long_words": False
}  # fmt: skip


@dataclass(frozen=True)
class Kernel:
    """One Triton kernel with all that its compiler is told.

    ``signature``: the type of each argument, such as "*bf16", "i32" or "constexpr"; ``constants``: the values of the
    last; ``aligned``: the arguments that are multiples of 16; ``options``: num_warps, num_stages and the like.
    ``fixed`` says that all this is known before the launch; Triton's compiler wants it.
    """

    name: str
    module: str
    signature: dict[str, str]
    constants: dict[str, Any]
    aligned: tuple[str, ...]
    options: dict[str, int]
    backward: bool = False
    fixed: bool = True

    @property
    def launch(self) -> str:
        """The options and constants of the launch, for a comment."""
        if not self.fixed:
            return "block sizes are chosen on the GPU"
        return ", ".join(f"{name}={value!r}" for name, value in (self.options | self.constants).items())


def only(module: str, names: Collection[str]) -> str:
    """The module with the functions of these names and whatever they use, comments kept."""
    tree, lines = ast.parse(module), module.splitlines()
    definitions = {n.name: n for n in tree.body if isinstance(n, ast.FunctionDef)}
    wanted, queue = set(names), list(names)
    while queue:
        used = {n.id for n in ast.walk(definitions[queue.pop()]) if isinstance(n, ast.Name)}
        queue += (new := used & set(definitions) - wanted)
        wanted |= new
    dropped: set[int] = set()
    for name, node in definitions.items():
        if name not in wanted:
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            last = node.end_lineno or first
            # The blank lines behind it go as well.
            while last < len(lines) and not lines[last].strip():
                last += 1
            dropped |= set(range(first - 1, last))
    kept = [line for number, line in enumerate(lines) if number not in dropped]
    return "\n".join(kept).rstrip("\n") + "\n"


def source_of(kernels: Collection[Kernel]) -> str:
    """The Triton source of kernels, module by module, with what each is launched with."""
    modules: dict[str, list[Kernel]] = {}
    for kernel in kernels:
        modules.setdefault(kernel.module, []).append(kernel)
    texts = []
    for module, own in modules.items():
        launches = [textwrap.fill(f"{k.name}: {k.launch}", **_COMMENT) for k in own]
        texts.append("\n".join(launches) + "\n\n" + only(module, {k.name for k in own}))
    return "\n\n".join(texts)
