"""How the explorer's texts are shown: in colour, the pattern's lines set off, in a pager, as a diff."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.syntax import Syntax
from rich.text import Text

from flexsparse.cli import render
from flexsparse.cli.group import whole_or_not

if TYPE_CHECKING:
    from flexsparse.explorer.marks import MarkedText

_MARKED = {"mask": "bold cyan", "score": "bold magenta", "gate": "bold green", "score and gate": "bold magenta"}
_DIFFERENCE = {"+": "green", "-": "red", "@": "cyan"}


def show(text: Text, *, paged: bool) -> None:
    """Print on the terminal, through the user's pager where it is longer than the screen and ``paged`` allows."""
    console = render.stdout()
    lines = text.plain.count("\n") + 1
    if not paged or lines <= console.height or not sys.stdin.isatty():
        console.print(text, soft_wrap=True)
        return
    with console.capture() as captured:
        console.print(text, soft_wrap=True)
    with whole_or_not():
        click.echo_via_pager(captured.get())


def marked(text: MarkedText, language: str, console: Console) -> Text:
    """The text in the colours of its language, with the marks of the pattern's lines in theirs."""
    code = "\n".join(line for line, _ in text.lines)
    coloured = Text(code) if _colourless(console) else Syntax(code, language, theme="ansi_dark").highlight(code)
    # Highlighting ends a text with a line break.
    coloured.rstrip()
    parts = coloured.split("\n", allow_blank=True)
    for part, (_, mark) in zip(parts, text.lines, strict=False):
        if mark is not None:
            part.append("  ").append(str(mark), "" if _colourless(console) else _MARKED[mark.kind])
    return Text("\n").join(parts)


def difference(text: str, console: Console) -> Text:
    """A unified diff, in colour where the console has it."""
    styled = [Text(line, "" if _colourless(console) else _DIFFERENCE.get(line[:1], "")) for line in text.splitlines()]
    return Text("\n").join(styled)


def _colourless(console: Console) -> bool:
    return console.no_color or not console.is_terminal
