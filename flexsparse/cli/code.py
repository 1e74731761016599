"""``flexsparse code``: the text of one stage of the compiler, and what differs between two."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from flexsparse.cli import options as shared
from flexsparse.cli.against import read_against
from flexsparse.cli.group import whole_or_not
from flexsparse.errors import SettingError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from flexsparse.compiler import CompiledAttention
    from flexsparse.explorer.marks import MarkedText

# How each language is coloured; Python where nothing is said.
_LANGUAGES = {"ttir": "llvm", "ttgir": "llvm", "llvm": "llvm", "ptx": "ptx", "sass": "nasm", "amdgcn": "amdgpu"}
_LANGUAGES |= {"plan": "text", "resources": "text", "tiles": "text", "cpp": "cpp"}


@click.command("code", short_help="Print a stage, from the expression down to SASS.")
@shared.expression_argument
@click.option(
    "--stage",
    default="source",
    show_default=True,
    help="expr, canonical, ir, tiles, plan, source, mask_mod, score_mod, rows, kernels, graph, triton, "
    "triton-backward, ttir, ttgir, llvm, ptx, sass, amdgcn, resources or cpp.",
)
@click.option("--target", default="sm_90", show_default=True, help="sm_80, sm_90, sm_100 or gfx942; no GPU is needed.")
@click.option(
    "--full/--fold",
    default=None,
    help="Whole text, or of kernels the pattern's lines with their surroundings.  [default: fold on a terminal]",
)
@click.option("--diff", "other", metavar="EXPR", help="Print what changes from EXPR here to this other expression.")
@click.option(
    "--against",
    multiple=True,
    metavar="NAME=VALUE",
    help="What else changes there, such as length=8192, backend=flex or target=sm_80; may be repeated.",
)
@click.option("--out", metavar="FILE", help="Write the text there, whole or not at all.")
@click.option("--no-pager", is_flag=True, help="Print long texts on a terminal without $PAGER.")
@shared.shape_options
@shared.backend_option
@shared.json_option
def command(
    expression: str,
    stage: str,
    target: str,
    full: bool | None,
    other: str | None,
    against: tuple[str, ...],
    out: str | None,
    no_pager: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Print one stage: the expression, its IR, a plan, the generated functions, kernels, what a compiler makes of them.

    "canonical" is the IR in the form that equal masks share, "tiles" what is computed. "rows" are the functions of
    --backend gather_flex, over keys and copies of selected ones, and "kernels" our Triton module for any shapes. From
    "graph" on it is about the attention kernels that a call on --target would launch, ours or those of FlexAttention:
    the graph that is captured, their source, the texts of Triton's compiler, which --grad extends to the backward pass,
    and "resources": registers, spills, shared memory, occupancy, instructions and widths of loads, with the operations,
    bytes and least time of the forward pass. "cpp" is the C++ of FlexAttention for inference on this CPU. --device is
    for tiles and plan.

    In Triton source, a comment behind each line that comes from the pattern says from which part of it. On a terminal
    the other lines are folded, and long texts go through $PAGER. In a pipe the output is the text of the stage, all of
    it and nothing else.

    \b
    Examples:
      flexsparse code "causal() & sliding_window(512)"
      flexsparse code "sparsek(64)" --stage ir
      flexsparse code "full() + alibi()" --stage score_mod > score_mod.py
      flexsparse code "causal() & sliding_window(512)" --stage triton --fold
      flexsparse code "sparsek_window(512, 512)" --stage resources --grad
      flexsparse code "sparsek_window(512, 512)" --stage ptx --target sm_80 --head-dim 128 --out forward.ptx
      flexsparse code "sliding_window(512)" --stage triton --diff "sliding_window(512) + alibi()"
      flexsparse code "sparsek_window(512, 512)" --stage plan --device cuda --against backend=flex
    """
    shared.check_out("--out", out)
    _check_target(stage, target)
    view, output = _View(expression, stage, target, given), _Output(out, as_json, not no_pager)
    if other is None and not against:
        _show(view, full, output)
    else:
        _show_difference(view, read_against(view, other, against), output)


def _check_target(stage: str, target: str) -> None:
    """A GPU is asked for where the text is about one."""
    from click.core import ParameterSource

    from flexsparse.explorer.stages import GPU_STAGES
    from flexsparse.explorer.targets import find_target
    from flexsparse.stages import STAGES

    find_target(target)
    asked = click.get_current_context().get_parameter_source("target") is ParameterSource.COMMANDLINE
    if asked and stage in STAGES and stage not in GPU_STAGES:
        about = f"a stage that is about a GPU: {', '.join(GPU_STAGES)}"
        raise SettingError("--target", got=f"--stage {stage}", expected=about, mend="Leave it out.")


def _show(view: _View, full: bool | None, output: _Output) -> None:
    from flexsparse.cli import codeview, render
    from flexsparse.explorer.stages import SOURCES

    with render.working(f"Making {view.stage}"):
        attention, text = view.made()
    if view.stage in (*SOURCES, "kernels") and (output.on_terminal if full is None else not full):
        text = text.folded()
    output.put(
        str(text),
        view.stage,
        functools.partial(_data, view, attention, text),
        functools.partial(codeview.marked, text, _LANGUAGES.get(view.stage, "python")),
    )


def _show_difference(view: _View, other: _View, output: _Output) -> None:
    from flexsparse.cli import codeview, render
    from flexsparse.explorer.difference import difference

    with render.working(f"Making {view.stage}"):
        texts = [side.made()[1] for side in (view, other)]
    found = difference(texts[0], texts[1], (view.name, other.name_beside(view)))
    data = {"pattern": view.expression, "other": other.expression, "stage": view.stage, "diff": found}
    if not found:
        click.echo(f"note: no line of {view.stage} differs", err=True)
    output.put(found, f"what differs in {view.stage}", lambda: data, functools.partial(codeview.difference, found))


@dataclass(frozen=True)
class _Output:
    """Where a text goes: to a file, as JSON, to a terminal, or into a pipe."""

    out: str | None
    as_json: bool
    paged: bool

    @property
    def on_terminal(self) -> bool:
        return sys.stdout.isatty() and self.out is None and not self.as_json

    def put(self, text: str, about: str, data: Callable[[], dict[str, Any]], drawn: Callable[[Console], Text]) -> None:
        """``data`` and ``drawn`` are for those who see them: they take time."""
        from flexsparse.cli import codeview, render

        if self.out is not None:
            shared.write_out("--out", self.out, text + "\n" * (text != "" and not text.endswith("\n")))
        if self.as_json:
            shared.print_json(data())
        elif self.out is not None:
            click.echo(f"note: {about} is in {self.out}", err=True)
        elif self.on_terminal and text:
            codeview.show(drawn(render.stdout()), paged=self.paged)
        elif text:
            with whole_or_not():
                click.echo(text, nl=not text.endswith("\n"))


@dataclass(frozen=True)
class _View:
    """One stage of one pattern: what the options ask for."""

    expression: str
    stage: str
    target: str
    given: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.expression} ({self.stage})"

    def name_beside(self, other: _View) -> str:
        """The name with what else differs from ``other``."""
        mine, its = ({"target": v.target, **v.given} for v in (self, other))
        changed = [f"{name.replace('_', '-')}={value}" for name, value in mine.items() if value != its[name]]
        return f"{self.expression} ({', '.join([self.stage, *changed])})"

    def made(self) -> tuple[CompiledAttention, MarkedText]:
        """The compiled pattern, bound where the stage is about shapes, and the text. Raises what ``code`` raises."""
        import flexsparse
        from flexsparse.explorer.stages import KERNEL_STAGES

        attention = flexsparse.compile(self.expression, backend=self.given["backend"])
        if self.stage in ("plan", "tiles", *KERNEL_STAGES):
            place = {} if self.stage in ("plan", "tiles") else {"device": "cpu" if self.stage == "cpp" else "cuda"}
            given = self.given | place
            shared.bind_from(attention, given)
        return attention, attention.marked_code(self.stage, self.target)


def _data(view: _View, attention: CompiledAttention, text: MarkedText) -> dict[str, Any]:
    """What ``--json`` prints."""
    from dataclasses import asdict

    from flexsparse.explorer.stages import GPU_STAGES, SOURCES

    data: dict[str, Any] = {"pattern": view.expression, "stage": view.stage, "code": str(text)}
    if view.stage in GPU_STAGES:
        data["target"] = view.target
    if view.stage in (*SOURCES, "kernels"):
        data["marks"] = [{"line": n, **asdict(m)} for n, (_, m) in enumerate(text.lines, 1) if m is not None]
    if view.stage == "resources":
        data["kernels"] = [asdict(one) for one in attention.resources(view.target)]
        under = attention.roofline(view.target)
        data["roofline"] = None if under is None else under.as_dict()
    return data
