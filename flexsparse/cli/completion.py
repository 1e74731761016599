"""``flexsparse completion``, and what the shells complete: options by their values, expressions by their names."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Sequence

import click
from click.shell_completion import CompletionItem, ShellComplete, get_completion_class

from flexsparse.cli import options as shared

_SHELLS = ("bash", "zsh", "fish")
_FILES = ("png", "html", "out", "save", "svg", "path", "scores")
_INSTALL = {
    "bash": 'eval "$(flexsparse completion bash)"',
    "zsh": 'eval "$(flexsparse completion zsh)"',
    "fish": "flexsparse completion fish | source",
}
Complete = Callable[[click.Context, str], list[CompletionItem]]


@click.command("completion", short_help="Print the script that completes in your shell.")
@click.argument("shell", metavar="bash|zsh|fish")
@shared.json_option
def command(shell: str, as_json: bool) -> None:
    """Print a script after which the shell completes commands, options, their values, and names of patterns.

    Read it from the shell's start-up file, as below, or keep its output in a file there. bash from 4.4 on.

    \b
    Examples:
      eval "$(flexsparse completion bash)"     in ~/.bashrc
      eval "$(flexsparse completion zsh)"      in ~/.zshrc, behind compinit
      flexsparse completion fish | source      in ~/.config/fish/config.fish
    """
    from flexsparse.errors import SettingError, nearest

    kind = get_completion_class(shell) if shell in _SHELLS else None
    if kind is None:
        hint = nearest(shell, _SHELLS)
        raise SettingError("SHELL", got=repr(shell), expected="bash, zsh or fish", mend=hint)
    # The class's own source() starts bash for its version; the script is the same.
    script = ShellComplete.source(kind(click.Group(), {}, "flexsparse", "_FLEXSPARSE_COMPLETE"))
    if as_json:
        shared.print_json({"shell": shell, "install": _INSTALL[shell], "script": script})
    else:
        click.echo(script)


def complete_values(group: click.Group) -> click.Group:
    """The group, whose commands now complete the values of those options and arguments that have known ones."""
    for one in group.commands.values():
        if isinstance(one, click.Group):
            complete_values(one)
        for parameter in one.params:
            complete = _completion_of(parameter)
            if complete is not None:
                parameter.shell_complete = complete  # type: ignore[method-assign, assignment]
    return group


def _completion_of(parameter: click.Parameter) -> Complete | None:
    """How a parameter is completed: its name means the same in every command. None where click knows best."""
    name = parameter.name or ""
    if name in _FILES:
        return lambda context, incomplete: [CompletionItem(incomplete, type="file")]
    if name == "stage" and isinstance(parameter, click.Option):
        return functools.partial(_among, _listed(parameter.help or ""))
    known: dict[str, Complete] = {
        "expression": _expressions,
        "other": _expressions,
        "names": lambda context, incomplete: _among(_patterns(), context, incomplete),
        "shell": functools.partial(_among, _SHELLS),
        "device": functools.partial(_among, ("auto", "cpu", "cuda")),
        "dtype": lambda context, incomplete: _among(shared.DTYPES, context, incomplete),
        "backend": lambda context, incomplete: _among(_backends(), context, incomplete),
        "target": lambda context, incomplete: _among(_targets(), context, incomplete),
        "view": lambda context, incomplete: _among(_views(), context, incomplete),
        "device_name": lambda context, incomplete: _among(_devices(), context, incomplete),
        "peers": _peers,
    }
    return known.get(name)


def _among(names: Iterable[str], context: click.Context, incomplete: str) -> list[CompletionItem]:
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]


def _listed(text: str) -> tuple[str, ...]:
    """The names that a help text lists: "expr, ir or plan." -> expr, ir, plan."""
    return tuple(re.split(r",\s*(?:or\s+)?|\s+or\s+", text.split(".")[0].strip()))


def _expressions(context: click.Context, incomplete: str) -> list[CompletionItem]:
    """The name at the end of an expression: patterns with their summaries, then symbols and functions."""
    from flexsparse.parser import NAMES
    from flexsparse.patterns import catalogue

    start, name = re.fullmatch(r"(.*?)((?:[A-Za-z_]\w*)?)", incomplete, re.DOTALL).groups()  # type: ignore[union-attr]
    found = catalogue()
    items = [CompletionItem(start + n, help=found[n].summary) for n in found if n.startswith(name)]
    # One letter says little about which of them is meant.
    return items + [CompletionItem(start + n) for n in NAMES if name and n.startswith(name)]


def _peers(context: click.Context, incomplete: str) -> list[CompletionItem]:
    start, comma, last = incomplete.rpartition(",")
    chosen = start.split(",")
    names = [name for name in ("sdpa", "flex", "others", *(() if comma else ("none",))) if name not in chosen]
    return [CompletionItem(start + comma + name) for name in names if name.startswith(last)]


def _patterns() -> Sequence[str]:
    from flexsparse.patterns import catalogue

    return list(catalogue())


def _backends() -> Sequence[str]:
    from flexsparse.settings import BACKENDS

    return BACKENDS


def _targets() -> Iterable[str]:
    from flexsparse.explorer.targets import TARGETS

    return TARGETS


def _views() -> Sequence[str]:
    from flexsparse.cli.show_figure import VIEWS

    return VIEWS


def _devices() -> Iterable[str]:
    from flexsparse.hardware import DEVICES

    return DEVICES
