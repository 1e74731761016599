"""``flexsparse code``: the text of one stage of the compiler."""

from __future__ import annotations

import sys
from typing import Any

import click

from flexsparse.cli import options as shared
from flexsparse.cli.group import whole_or_not


@click.command("code", short_help="Print a stage: IR, generated functions, plan.")
@shared.expression_argument
@click.option(
    "--stage",
    default="source",
    show_default=True,
    help="expr, ir, source, mask_mod, score_mod, rows, kernels or plan.",
)
@shared.shape_options
@shared.backend_option
@shared.json_option
def command(expression: str, stage: str, backend: str, as_json: bool, **given: Any) -> None:
    """Print one stage: the expression, its IR, the generated FlexAttention functions, our Triton kernels, or the plan.

    "rows" are the functions of --backend gather_flex, over keys and copies of selected ones.

    In a pipe the output is the text of the stage and nothing else. The shapes matter to --stage plan only.

    \b
    Examples:
      flexsparse code "causal() & sliding_window(512)"
      flexsparse code "sparsek(64)" --stage ir
      flexsparse code "full() + alibi()" --stage score_mod > score_mod.py
    """
    import flexsparse

    attention = flexsparse.compile(expression, backend=backend)
    if stage == "plan":
        shared.bind_from(attention, given)
    text = attention.code(stage)
    if as_json:
        shared.print_json({"pattern": expression, "stage": stage, "code": text})
    elif stage != "plan" and sys.stdout.isatty():
        from flexsparse.cli import render

        console = render.stdout()
        console.print(render.code(text, console))
    else:
        with whole_or_not():
            click.echo(text, nl=not text.endswith("\n"))
