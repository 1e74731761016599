"""``flexsparse code``: the text of one stage of the compiler."""

from __future__ import annotations

import os
import pathlib
import sys
import tempfile
from typing import TYPE_CHECKING, Any

import click

from flexsparse.cli import options as shared
from flexsparse.cli.group import whole_or_not
from flexsparse.errors import SettingError

if TYPE_CHECKING:
    from flexsparse.compiler import CompiledAttention

# How each language is coloured; Python where nothing is said.
_LANGUAGES = {"ttir": "llvm", "ttgir": "llvm", "llvm": "llvm", "ptx": "ptx", "sass": "nasm", "amdgcn": "amdgpu"}
_TABLES = ("plan", "resources")


@click.command("code", short_help="Print a stage, from the expression down to SASS.")
@shared.expression_argument
@click.option(
    "--stage",
    default="source",
    show_default=True,
    help="expr, ir, source, mask_mod, score_mod, rows, kernels, plan, graph, triton, triton-backward, ttir, ttgir, "
    "llvm, ptx, sass, amdgcn or resources.",
)
@click.option("--target", default="sm_90", show_default=True, help="sm_80, sm_90, sm_100 or gfx942; no GPU is needed.")
@click.option("--out", metavar="FILE", help="Write the text there, whole or not at all.")
@shared.shape_options
@shared.backend_option
@shared.json_option
def command(
    expression: str, stage: str, target: str, out: str | None, backend: str, as_json: bool, **given: Any
) -> None:
    """Print one stage: the expression, its IR, the generated functions, kernels, what a compiler makes of them, a plan.

    "rows" are the functions of --backend gather_flex, over keys and copies of selected ones, and "kernels" our Triton
    module for any shapes. From "graph" on it is about the attention kernels that a call on --target would launch, ours
    or those of FlexAttention: the graph that is captured, their source, the texts of Triton's compiler, which --grad
    extends to the backward pass, and "resources", a table of registers, spills, shared memory, occupancy and
    instructions. --device is for --stage plan.

    In a pipe the output is the text of the stage and nothing else.

    \b
    Examples:
      flexsparse code "causal() & sliding_window(512)"
      flexsparse code "sparsek(64)" --stage ir
      flexsparse code "full() + alibi()" --stage score_mod > score_mod.py
      flexsparse code "causal() & sliding_window(512)" --stage triton
      flexsparse code "sparsek_window(512, 512)" --stage resources --grad
      flexsparse code "sparsek_window(512, 512)" --stage ptx --target sm_80 --head-dim 128 --out forward.ptx
    """
    import flexsparse
    from flexsparse.explorer.stages import KERNEL_STAGES

    if out is not None and not pathlib.Path(out).resolve().parent.is_dir():
        raise SettingError("--out", got=repr(out), expected="a file in a directory that exists")
    attention = flexsparse.compile(expression, backend=backend)
    if stage in KERNEL_STAGES:
        given["device"] = "cuda"
    if stage == "plan" or stage in KERNEL_STAGES:
        shared.bind_from(attention, given)
    _show(attention, expression, stage, target, out, as_json)


def _show(
    attention: CompiledAttention, expression: str, stage: str, target: str, out: str | None, as_json: bool
) -> None:
    from flexsparse.cli import render
    from flexsparse.explorer.stages import KERNEL_STAGES

    with render.working(f"Making {stage}"):
        text = attention.code(stage, target)
        data: dict[str, Any] = {"pattern": expression, "stage": stage, "code": text}
        if stage in KERNEL_STAGES:
            data["target"] = target
        if stage == "resources" and as_json:
            from dataclasses import asdict

            data["kernels"] = [asdict(one) for one in attention.resources(target)]
    if out is not None:
        _write(pathlib.Path(out), text)
    if as_json:
        shared.print_json(data)
    elif out is not None:
        click.echo(f"note: {stage} is in {out}", err=True)
    elif stage not in _TABLES and sys.stdout.isatty():
        console = render.stdout()
        console.print(render.code(text, console, _LANGUAGES.get(stage, "python")))
    else:
        with whole_or_not():
            click.echo(text, nl=not text.endswith("\n"))


def _write(path: pathlib.Path, text: str) -> None:
    """The text into a file that is there whole or stays as it was. Raises SettingError."""
    try:
        with tempfile.NamedTemporaryFile("w", dir=path.resolve().parent, delete=False, encoding="utf-8") as file:
            file.write(text if text.endswith("\n") else text + "\n")
        # A temporary file is for its owner alone; this one has the rights that any new file gets.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(file.name, 0o666 & ~mask)
        os.replace(file.name, path)
    except OSError as error:
        raise SettingError("--out", got=f"{str(path)!r}: {error.strerror}", expected="a file to write") from None
