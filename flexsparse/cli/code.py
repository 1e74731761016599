"""``flexsparse code``: the text of one stage of the compiler, and what differs between two."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from flexsparse.cli import options as shared
from flexsparse.cli.against import read_against
from flexsparse.cli.group import whole_or_not

if TYPE_CHECKING:
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
    from flexsparse.cli import codeview, render

    shared.check_folder("--out", out)
    view = _View(expression, stage, target, given)
    sides = [view, read_against(view, other, against)] if other is not None or against else [view]
    with render.working(f"Making {stage}"):
        made = [side.made() for side in sides]
    console = render.stdout()
    on_terminal = sys.stdout.isatty() and out is None and not as_json
    texts = [text for _, text in made]
    if len(texts) == 2:
        from flexsparse.explorer.difference import difference

        found = difference(texts[0], texts[1], (view.name, sides[1].name_beside(view)))
        data: dict[str, Any] = {"pattern": expression, "other": sides[1].expression, "stage": stage, "diff": found}
        shown = codeview.difference(found, console)
    else:
        text = texts[0].folded() if full is False or (on_terminal and full is None) else texts[0]
        found = str(text)
        data = _data(view, made[0][0], text, as_json)
        shown = codeview.marked(text, _LANGUAGES.get(stage, "python"), console)
    if out is not None:
        shared.write_file("--out", out, found if found.endswith("\n") else found + "\n")
    if as_json:
        shared.print_json(data)
    elif out is not None:
        click.echo(f"note: {'the diff of ' if len(texts) == 2 else ''}{stage} is in {out}", err=True)
    elif not found:
        click.echo(f"note: no line of {stage} differs", err=True)
    elif on_terminal:
        codeview.show(shown, paged=not no_pager)
    else:
        with whole_or_not():
            click.echo(found, nl=not found.endswith("\n"))


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


def _data(view: _View, attention: CompiledAttention, text: MarkedText, wanted: bool) -> dict[str, Any]:
    """What ``--json`` prints; empty where it is not wanted, as resources take the compiler's time."""
    from dataclasses import asdict

    from flexsparse.explorer.stages import KERNEL_STAGES, SOURCES

    if not wanted:
        return {}
    data: dict[str, Any] = {"pattern": view.expression, "stage": view.stage, "code": str(text)}
    if view.stage in KERNEL_STAGES and view.stage != "cpp":
        data["target"] = view.target
    if view.stage in (*SOURCES, "kernels"):
        data["marks"] = [{"line": n, **asdict(m)} for n, (_, m) in enumerate(text.lines, 1) if m is not None]
    if view.stage == "resources":
        data["kernels"] = [asdict(one) for one in attention.resources(view.target)]
        under = attention.roofline(view.target)
        data["roofline"] = None if under is None else under.as_dict()
    return data
