"""The group of commands: turns every mistake into a message and an exit code."""

from __future__ import annotations

import errno
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, TextIO

import click

from flexsparse.errors import BackendNotice, FlexsparseError, did_you_mean

OK, MISMATCH, USAGE, DEFECT, INTERRUPTED = 0, 1, 2, 3, 130
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


class CommandGroup(click.Group):
    """A click group that lists commands in their order and never shows a traceback for a mistake of the user."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The commands as they were given, not sorted."""
        return list(self.commands)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does, with the nearest name for one that is unknown."""
        name = args[0]
        if name not in self.commands and not name.startswith("-"):
            raise click.UsageError(f"No such command {name!r}. {did_you_mean(name, self.commands)}", ctx)
        return super().resolve_command(ctx, args)

    def main(self, args: Any = None, prog_name: str | None = None, *rest: Any, **extra: Any) -> NoReturn:
        """Run a command and exit with its code; see ``flexsparse --help`` for what the codes mean."""
        try:
            with _notices_as_notes():
                result = super().main(args, prog_name, *rest, **{**extra, "standalone_mode": False})
            code = result if isinstance(result, int) else OK
        except FlexsparseError as error:
            click.echo(f"Error: {error}", err=True)
            code = USAGE
        except click.ClickException as error:
            error.show()
            if isinstance(error, click.MissingParameter) and error.param and error.param.name == "expression":
                click.echo('An expression is, for example, "causal() & sliding_window(512)".', err=True)
            code = USAGE
        except (click.Abort, KeyboardInterrupt):
            code = INTERRUPTED
        except Exception as error:  # noqa: BLE001
            code = _unexpected(error)
        with whole_or_not():
            sys.stdout.flush()
        sys.exit(code)


def _unexpected(error: Exception) -> int:
    """Say what nobody foresaw, with its traceback; its code is not that of a check that failed."""
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
        discard_output()
        click.echo(f"Error: {error.strerror}: not all of the output could be written.", err=True)
        return USAGE
    traceback.print_exception(error)
    return DEFECT


@contextmanager
def whole_or_not() -> Iterator[None]:
    """Writing to a reader that may leave, such as `head`: the rest is dropped, the command goes on to its exit code."""
    try:
        yield
    except BrokenPipeError:
        discard_output()


def discard_output() -> None:
    """Send standard output nowhere from now on, so that nothing fails to be flushed at the end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def _notices_as_notes() -> Iterator[None]:
    """flexsparse's notices become notes on standard error; other warnings stay as they are."""

    def shown(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if issubclass(category, BackendNotice):
            click.echo(f"note: {message}", err=True)
        else:
            usual(message, category, filename, lineno, file, line)

    with warnings.catch_warnings():
        usual = warnings.showwarning
        warnings.simplefilter("always", BackendNotice)
        warnings.showwarning = shown
        yield
