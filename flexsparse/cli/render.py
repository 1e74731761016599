"""Everything that is drawn with rich: consoles, progress, pictures of masks, tables, code."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.rule import Rule
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from flexsparse.cli.group import discard_output

if TYPE_CHECKING:
    from flexsparse.explanation import Explanation
    from flexsparse.hardware import Hardware
    from flexsparse.pictures.mask import Picture

# By kind: EMPTY, PARTIAL, FULL. A partial cell is shaded by its share of pairs where that is known.
_UNICODE = ("·", "░▒▓", "█")
_ASCII = (".", "-+*", "#")
_STYLES = ("bright_black", "yellow", "bright_cyan")
_BARS = "▁▂▃▄▅▆▇█"
_ASCII_BARS = "_.-=+*%#"
WIDEST = 32


class _Console(Console):
    """A console whose reader may leave: the rest is dropped, and the command goes on to its exit code."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        discard_output()


def stdout(*, record: bool = False) -> Console:
    """The console of results: no colour in a pipe or under NO_COLOR, 80 columns where there is no terminal."""
    width = 80 if record else None
    return _Console(highlight=False, record=record, width=width, emoji=False, markup=False)


def stderr() -> Console:
    """The console of progress and notes."""
    return Console(stderr=True, highlight=False, emoji=False, markup=False)


def cells(wanted: int | None = None) -> tuple[int, int]:
    """How many rows and columns of cells a picture has on the console of results, WIDEST unless asked for more."""
    rows = wanted or WIDEST
    return rows, max(8, min(rows, (stdout().width - 12) // 2))


@contextmanager
def working(what: str) -> Iterator[None]:
    """A spinner on standard error while something runs that may take more than a second."""
    console = stderr()
    if not console.is_terminal:
        yield
        return
    with console.status(what):
        yield


@contextmanager
def progress(what: str, total: int | None) -> Iterator[Callable[[str], None]]:
    """A bar on standard error; the function that it gives advances by one and says what comes next.

    Where nobody knows the ``total``, None, the bar only moves.
    """
    console = stderr()
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=total)
        yield lambda text: bar.update(task, advance=1, description=text)


def heading(text: str) -> RenderableType:
    """A line across the screen that opens a section."""
    return Group("", Rule(Text(text, style="bold"), align="left", style="bright_black"))


def facts(*rows: tuple[str, str | Text]) -> RenderableType:
    """Names and what is to be said about each, in two columns."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    return table


def code(text: str, console: Console, language: str = "python") -> RenderableType:
    """Source, in colour where the console has it; ``language`` as Pygments names it."""
    if console.no_color or not (console.is_terminal or console.record):
        return Text(text.rstrip("\n"))
    return Syntax(text.rstrip("\n"), language, theme="ansi_dark", background_color="default", word_wrap=True)


def mask(picture: Picture, console: Console) -> RenderableType:
    """The cells of a picture, two columns each, with the queries down the side and the keys along the top."""
    glyphs = _ASCII if is_plain(console) else _UNICODE
    side = len(str(picture.queries.stop - 1))
    first, last = str(picture.keys.start), str(picture.keys.stop - 1)
    wide = 2 * len(picture.kinds[0])
    gap = wide - len(f"keys {first}") - len(last)
    top = f"keys {first}{' ' * gap}{last}" if gap > 0 else f"keys {first} to {last}"
    lines = [Text(" " * (side + 2) + top, style="bright_black")]
    for number, kinds in enumerate(picture.kinds):
        start = picture.queries.start + number * picture.cell[0]
        label = str(start) if number % 4 == 0 else ""
        line = Text(f"{label:>{side}}  ", style="bright_black")
        for column, kind in enumerate(kinds):
            line.append(2 * _glyph(glyphs, kind, _share(picture, number, column)), style=_STYLES[kind])
        lines.append(line)
    return Text("\n").join(lines)


def legend(picture: Picture, unit: str, console: Console, *, counted: bool = True) -> Text:
    """What the characters mean, ``counted`` with the tiles or pairs of each kind. ``unit`` is "tiles" or "pairs"."""
    glyphs = _ASCII if is_plain(console) else _UNICODE
    counts = [f" {count:,}" if counted else "" for count in picture.counts]
    words = ("empty", "partial", "full") if unit == "tiles" else ("hidden", "partly seen", "seen")
    entries = [Text(2 * glyphs[2], _STYLES[2]).append(f" {words[2]}{counts[2]}", "default")]
    if unit == "tiles" or picture.cell != (1, 1):
        by = "pairs" if picture.shares is not None else "tiles computed" if picture.computed_shares is not None else ""
        shades = Text(" ".join(2 * g for g in (glyphs[1] if by else glyphs[1][1])), _STYLES[1])
        shades.append(f" {words[1]}{counts[1] if unit == 'tiles' else ''}", "default")
        entries.append(shades.append(f", by share of {by}" if by else "", "default"))
    entries.append(Text(2 * glyphs[0], _STYLES[0]).append(f" {words[0]}{counts[0]}", "default"))
    whole = Text("   ").join(entries)
    return whole if whole.cell_len <= console.width else Text("\n").join(entries)


def thumbnail(picture: Picture, console: Console, wide: int = 1) -> Text:
    """The cells of a picture, ``wide`` columns each."""
    glyphs = _ASCII if is_plain(console) else _UNICODE
    lines = []
    for number, kinds in enumerate(picture.kinds):
        line = Text()
        for column, kind in enumerate(kinds):
            line.append(wide * _glyph(glyphs, kind, _share(picture, number, column)), style=_STYLES[kind])
        lines.append(line)
    return Text("\n").join(lines)


def sparkline(values: Sequence[float], console: Console) -> Text:
    """Numbers as a row of bars, from the least to the greatest."""
    bars = _ASCII_BARS if is_plain(console) else _BARS
    finite = [v for v in values if math.isfinite(v)] or [0.0]
    low, high = min(finite), max(finite)
    spread = (high - low) or 1.0
    heights = [(min(max(v, low), high) - low) / spread for v in values]
    return Text("".join(bars[round(height * (len(bars) - 1))] for height in heights), style=_STYLES[2])


def explanation(found: Explanation, tiles: str) -> RenderableType:
    """The plan: shapes, the candidates with their reasons, tiles, work and notes."""
    plan, shapes = found.plan, found.plan.shapes
    dtype = str(shapes.dtype).removeprefix("torch.")
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name in ("backend", "can run", "why"):
        table.add_column(name)
    for candidate in plan.candidates:
        chosen = candidate.backend == plan.backend
        mark = "> " if chosen else "  "
        verdict = Text("yes", style="green") if candidate.verdict.holds else Text("no", style="red")
        table.add_row(Text(mark + candidate.backend, "bold cyan" if chosen else ""), verdict, candidate.reason)
    operands = (
        f"query [{shapes.batch}, {shapes.heads}, {shapes.q_len}, {shapes.head_dim}]\n"
        f"key   [{shapes.batch}, {shapes.kv_heads}, {shapes.kv_len}, {shapes.head_dim}]\n"
        f"{dtype} on {shapes.device}, {'with' if shapes.needs_grad else 'without'} gradients"
    )
    work = "depends on the call" if plan.flops is None else f"{plan.flops:.3g} operations forward, in whole tiles"
    mask_text = f"{plan.mask_rows} row(s) x {plan.mask_heads} head(s) of tiles are kept{plan.heads_alike}"
    rows: list[tuple[str, str | Text]] = [("pattern", Text(found.pattern, "bold")), ("shapes", operands)]
    gathered = f"{plan.gathered:,} selected keys a query, besides those tiles" if plan.gathered else ""
    after: list[tuple[str, str | Text]] = [("tiles", tiles), ("keys", gathered), ("work", work), ("mask", mask_text)]
    after = [fact for fact in after if fact[1]]
    if found.cost is not None:
        after.append(("cost", str(found.cost)))
    after += [("note", note) for note in plan.notes]
    return Group(facts(*rows), "", table, "", facts(*after))


def verdict(holds: bool, text: str) -> Text:
    """The last line of a check."""
    word = Text("HOLDS" if holds else "FAILS", "bold green" if holds else "bold red")
    return Text("  ").join([word, Text(text)])


def share(value: float, holds: bool, console: Console) -> Text:
    """A bar from 0 to the whole of what is allowed, with the number."""
    full, rest = ("#", ".") if is_plain(console) else ("█", "·")
    filled = min(10, round(10 * value)) if holds else 10
    text = Text(full * filled, "green" if holds else "red").append(rest * (10 - filled), "bright_black")
    return text.append(f" {value:.2f}" if holds else f" {value:.3g} FAILS", "default" if holds else "bold red")


def columns(*heads: str, right: Sequence[int] = ()) -> Table:
    """An open table; the columns numbered in ``right`` are numbers."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for number, name in enumerate(heads):
        table.add_column(name, justify="right" if number in right else "left")
    return table


def svg(console: Console, title: str) -> str:
    """What a recording console has shown, as a picture that loads nothing from the network."""
    return re.sub(r"@font-face\s*\{[^}]*\}\s*", "", console.export_svg(title=title))


def _glyph(glyphs: tuple[str, str, str], kind: int, share: float | None) -> str:
    if kind != 1:
        return glyphs[kind]
    return glyphs[1][1 if share is None else min(2, int(3 * share))]


def _share(picture: Picture, row: int, column: int) -> float | None:
    """How dark a partial cell is: by its pairs, or by its tiles where the pairs are too many to count."""
    shares = picture.shares or picture.computed_shares
    return None if shares is None else shares[row][column]


def is_plain(console: Console) -> bool:
    """Whether the output cannot carry more than ASCII."""
    return console.options.ascii_only or not (sys.stdout.encoding or "utf-8").lower().startswith("utf")


def tuned(found: Sequence[Mapping[str, Any]]) -> RenderableType:
    """The sizes that a search found for each head_dim, and what they gained."""
    parts: list[RenderableType] = []
    for one in found:
        place = one["place"]
        about = f"{place['gpu']}, {place['bits']} bits, head_dim {place['head_dim']}, triton {place['triton']}"
        table = columns("kernel", "queries", "keys", "warps", "stages", "ms", "before", right=(1, 2, 3, 4, 5, 6))
        for kernel, sizes in one["kernels"].items():
            numbers = (str(sizes[n]) for n in ("queries", "keys", "warps", "stages"))
            table.add_row(kernel, *numbers, f"{sizes['ms']:.3f}", f"{sizes['ms_before']:.3f}")
        parts += [heading(about), table, Text(f"kept in {one['kept'] or 'no file'}", "bright_black")]
    return Group(*parts, "", Text("ms are of the whole pass, forward or backward, that a kernel is part of."))


def devices(known: Sequence[Hardware]) -> RenderableType:
    """What the cost model assumes of each device."""
    table = columns("device", "TFLOP/s", "GB/s", "processors", "full", "partial", right=(1, 2, 3, 4, 5))
    for device in known:
        table.add_row(
            device.name,
            f"{device.matrix_tflops:g}",
            f"{device.bandwidth_gbs:g}",
            str(device.multiprocessors),
            f"{device.full_share:.0%}",
            f"{device.partial_share:.0%}",
        )
    sources = {device.source: None for device in known}
    return Group(table, "", *(Text(f"source  {source}", "bright_black") for source in sources))
