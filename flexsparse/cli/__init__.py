"""The command line: one file a command; nothing here imports torch before a command needs it."""

from flexsparse.cli import (
    bench,
    cache,
    check,
    code,
    completion,
    demo,
    doctor,
    explain,
    hardware,
    list_patterns,
    show,
    tune,
)
from flexsparse.cli.group import CommandGroup

main = CommandGroup(
    name="flexsparse",
    help="""Attention patterns as expressions: look at them, compile them, check them.

    \b
    Examples:
      flexsparse list
      flexsparse show "causal() & (sliding_window(256) | sinks(4))"
      flexsparse explain "causal() & sliding_window(512)" --device cuda
      flexsparse code "full() + alibi()" --stage score_mod
      flexsparse check "sparsek_window(16, 32)"
      flexsparse bench "causal() & sliding_window(512)"
      flexsparse demo

    \b
    Exit codes:
      0    done, and where something was checked, it held
      1    a check failed: a result differs from the oracle
      2    a mistake in the command: the message says which and how to mend it
      3    an error that flexsparse did not foresee, with its traceback
      130  interrupted with Ctrl-C

    Every command takes --json, which prints JSON and nothing else to standard output; notes and progress go to
    standard error. Colour is used on a terminal only, and never where NO_COLOR is set.
    Ctrl-C leaves no half of a file, and `flexsparse completion` makes the shell complete all of this.
    """,
    commands=[
        list_patterns.command,
        show.command,
        explain.command,
        code.command,
        check.command,
        bench.command,
        demo.command,
        hardware.command,
        tune.command,
        doctor.command,
        cache.command,
        completion.command,
    ],
)

completion.complete_values(main)

__all__ = ["main"]
