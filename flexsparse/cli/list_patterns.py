"""``flexsparse list``: the catalogue, with a picture of each pattern."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from flexsparse.cli import options as shared

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from flexsparse.expression import Expression, Pattern
    from flexsparse.pictures.mask import Drawable

# Pictures are of this many queries and keys, cut down to so many rows and columns of characters.
_LENGTH, _CELLS = 192, (6, 12)


@click.command("list", short_help="List the catalogue with pictures.")
@click.argument("names", nargs=-1, metavar="[NAME]...")
@shared.seed_option
@shared.json_option
def command(names: tuple[str, ...], seed: int, as_json: bool) -> None:
    """List the patterns of the catalogue, or those that are named: picture, parameters, summary.

    A picture has queries down and keys right, for the example that stands under the summary. A score, which is
    added to a pattern or replaces its score, is drawn as a curve.

    \b
    Examples:
      flexsparse list
      flexsparse list sliding_window alibi
      flexsparse list --json
    """
    chosen = _chosen(names)
    if as_json:
        shared.print_json([_as_dict(function) for function in chosen])
        return
    from rich.table import Table
    from rich.text import Text

    from flexsparse.cli import render

    console = render.stdout()
    table = Table.grid(padding=(0, 3, 1, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    with render.progress("Drawing", len(chosen)) as advance:
        for function in chosen:
            example = function(**function.examples[-1])
            drawn, shown_as = _drawing(example, seed, console)
            name = Text(function.name, "bold cyan").append(function.parameters, "default")
            table.add_row(
                drawn, Text("\n").join([name, Text(function.summary.replace("``", "")), Text(shown_as, "bright_black")])
            )
            advance(f"Drawing {function.name}")
    console.print(table)
    console.print('Any expression in these is drawn by: flexsparse show "causal() & sinks(4)"')


def _chosen(names: tuple[str, ...]) -> list[Any]:
    from flexsparse.errors import SettingError, did_you_mean
    from flexsparse.patterns import catalogue

    for name in names:
        if name not in catalogue():
            hint = did_you_mean(name, catalogue())
            raise SettingError("NAME", got=repr(name), expected="a pattern of the catalogue", mend=hint)
    return [catalogue()[name] for name in names or catalogue()]


def _as_dict(function: Any) -> dict[str, Any]:
    example = function(**function.examples[-1])
    return {
        "name": function.name,
        "parameters": function.parameters,
        "summary": function.summary,
        "documentation": function.__doc__,
        "gives": type(example).__name__.lower(),
        "examples": [repr(function(**arguments)) for arguments in function.examples],
    }


def _drawing(example: Expression, seed: int, console: Console) -> tuple[RenderableType, str]:
    """A small picture and what it shows."""
    from flexsparse.cli import render
    from flexsparse.expression import Pattern, Value
    from flexsparse.ir.nodes import mentions
    from flexsparse.language import everything

    if isinstance(example, Pattern):
        picture = _drawable(example, seed).pairs(0, range(_LENGTH), range(_LENGTH), _CELLS)
        return render.thumbnail(picture, console), f"{example!r}, {_LENGTH} queries and keys"
    assert isinstance(example, Value)
    drawn = _drawable(everything.score(example) if mentions(example.node, "score") else everything + example, seed)
    if mentions(example.node, "q", "kv"):
        against = "head 0, against q - kv from -24 to 24"
        return render.sparkline(_scores(drawn, by_distance=True), console), f"{example!r}, {against}"
    against = "against the score from -60 to 60"
    return render.sparkline(_scores(drawn, by_distance=False), console), f"{example!r}, {against}"


def _drawable(pattern: Pattern, seed: int) -> Drawable:
    import flexsparse
    from flexsparse.example_inputs import example_captured, fitting_heads
    from flexsparse.pictures.mask import drawable, square_shapes

    attention = flexsparse.compile(pattern, backend="chunked")
    shapes = square_shapes(_LENGTH, fitting_heads(pattern.node, 4))
    return drawable(attention, shapes, example_captured(attention.ir, shapes, seed), seed=seed)


def _scores(drawn: Drawable, *, by_distance: bool) -> list[float]:
    """The final score of a key, by its distance at a running score of 1, or by the running score at distance 0."""
    import torch

    assert drawn.score is not None
    steps = torch.linspace(-1, 1, _CELLS[1])
    zero, middle = torch.zeros_like(steps, dtype=torch.int64), _LENGTH // 2
    distance = (24 * steps).round().long() if by_distance else zero
    running = torch.ones_like(steps) if by_distance else 60 * steps
    values: list[float] = drawn.score(running, zero, zero, middle + distance, zero + middle).tolist()
    return values
