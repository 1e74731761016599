"""What ``flexsparse bench`` shows while it measures: a table that grows on a terminal, plain lines in a pipe."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.spinner import Spinner
from rich.text import Text

from flexsparse.cli import render

if TYPE_CHECKING:
    from flexsparse.cli.bench import Row
    from flexsparse.timing import Timing

_HEADS = ("tokens", "by", "computes", "forward, ms", "forward + backward")
# 79 columns together, for pipes.
_WIDTHS = (9, 17, 15, 17, 17)


class Shown:
    """Takes rows as they come; ``next`` says what is measured now. This one shows nothing but that."""

    def __init__(self, says: Callable[[str], object] = str) -> None:
        self.rows: list[Row] = []
        self.next = says

    def row(self, row: Row) -> None:
        """What was measured."""
        self.rows.append(row)


class _Lines(Shown):
    """One line for each row with a time, as soon as it is known."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console
        console.print(_line(_HEADS))

    def row(self, row: Row) -> None:
        super().row(row)
        if row.forward is not None:
            self.console.print(_line(_cells(row)))


class _Growing(Shown):
    """A table by length that grows row by row above a line about what is running."""

    def __init__(self, live: Live) -> None:
        super().__init__(self.running)
        self.live = live

    def running(self, says: str) -> None:
        self.live.update(self.drawn(Spinner("dots", Text(f"Measuring {says}", "bright_black"))), refresh=True)

    def drawn(self, below: RenderableType = "") -> RenderableType:
        table = render.columns(*_HEADS[1:], right=(2, 3))
        length = None
        for row in self.rows:
            if row.forward is None:
                continue
            if row.length != length:
                length = row.length
                table.add_section()
                table.add_row(Text(f"{length:,} tokens", "bold"), "", "", "")
            table.add_row(*(Text(cell, "bold cyan" if row.backend is not None else "") for cell in _cells(row)[1:]))
        return Group(table, below)


@contextmanager
def shown(data: Mapping[str, Any], *, quiet: bool) -> Iterator[Shown]:
    """Somewhere to show rows: a live table on a terminal, lines elsewhere, and progress alone where ``quiet``."""
    if quiet:
        with render.progress("Measuring", None) as advance:
            yield Shown(advance)
        return
    console = render.stdout()
    console.print(_facts(data))
    console.print()
    shows: Shown
    if console.is_terminal:
        with Live(console=console) as live:
            shows = growing = _Growing(live)
            yield growing
            live.update(growing.drawn())
    else:
        shows = _Lines(console)
        yield shows
    console.print(_notes(shows.rows))


def _facts(data: Mapping[str, Any]) -> RenderableType:
    shapes, versions = data["shapes"], data["versions"]
    sizes = (
        f"batch {shapes['batch']}, {shapes['heads']} query heads, {shapes['kv_heads']} KV heads of "
        f"{shapes['head_dim']}, {shapes['dtype']}"
    )
    known = ", ".join(f"{name} {versions[name]}" for name in ("flexsparse", "torch", "triton"))
    rows: list[tuple[str, str | Text]]
    rows = [("pattern", Text(data["pattern"], "bold")), ("device", f"{data['device']}; {known}"), ("shapes", sizes)]
    rows += [("times", data["method"])] + ([("note", data["note"])] if data["note"] else [])
    return render.facts(*rows)


def _notes(rows: list[Row]) -> RenderableType:
    """Why a time is missing, once for each contender and reason."""
    reasons: dict[tuple[str, str], list[int]] = {}
    for row in rows:
        if row.reason:
            reasons.setdefault((row.by, row.reason), []).append(row.length)
    lengths = {row.length for row in rows}
    facts = []
    for (by, reason), at in reasons.items():
        where = "" if set(at) == lengths else f" (at {', '.join(f'{n:,}' for n in at)})"
        facts.append((by, f"{reason}{where}"))
    backends = ", ".join(dict.fromkeys(row.backend for row in rows if row.backend is not None))
    return Group("", render.facts(("flexsparse", f"backend {backends}"), *facts))


def _cells(row: Row) -> tuple[str, ...]:
    return f"{row.length:,}", row.by, row.computes, _time(row.forward), _time(row.forward_backward)


def _time(timing: Timing | None) -> str:
    """The median, then the quartiles."""
    if timing is None:
        return "-"
    return f"{_number(timing.median)} {_number(timing.low)}-{_number(timing.high)}"


def _number(milliseconds: float) -> str:
    for limit, digits in ((1, 3), (10, 2), (100, 1)):
        if milliseconds < limit:
            return f"{milliseconds:.{digits}f}"
    return f"{milliseconds:.0f}"


def _line(cells: tuple[str, ...]) -> str:
    sides = (">", "<", "<", ">", ">")
    return " ".join(f"{c:{side}{width}}" for c, side, width in zip(cells, sides, _WIDTHS, strict=True)).rstrip()
