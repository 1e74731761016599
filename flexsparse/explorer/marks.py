"""Text of which some lines come from the user's pattern, and say from which part of it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

LEGEND = (
    '# Lines behind which "# mask", "# score" or "# gate" stands come from the pattern: from the part that is named,',
    "# and computing what is said. A word alone says no more than that the line belongs to such a section.",
)
# Longer expressions are cut in a comment; a mark has them whole.
_WIDEST = 60
# Runs of fewer unmarked lines are not worth a fold.
_SHORTEST = 3
_KEPT = re.compile(r"#|def |for |.*\btl\.dot\(")


@dataclass(frozen=True)
class Mark:
    """What a line has from the pattern.

    ``kind`` is "mask", "score" or "gate", or "score and gate" where a section mixes them; ``origins`` are the named
    parts of the pattern that it comes from, and ``expression`` is what the line computes. Both are empty where no more
    is known than that the line is part of such a section.
    """

    kind: str
    expression: str = ""
    origins: tuple[str, ...] = ()

    def __str__(self) -> str:
        source = f" from {', '.join(self.origins)}" if self.origins else ""
        whole = self.expression if self.expression not in self.origins else ""
        cut = whole if len(whole) <= _WIDEST else f"{whole[: _WIDEST - 3]}..."
        return f"# {self.kind}{source}" + (f": {cut}" if cut else "")


@dataclass(frozen=True)
class MarkedText:
    """Lines, each with its mark or None; the last is empty where the text ends its last line."""

    lines: tuple[tuple[str, Mark | None], ...]

    @classmethod
    def plain(cls, text: str) -> MarkedText:
        """A text of which nothing is marked."""
        return cls(tuple((line, None) for line in text.split("\n")))

    def __str__(self) -> str:
        return "\n".join(shown(line, mark) for line, mark in self.lines)

    def folded(self) -> MarkedText:
        """Marked lines, heads of functions and loops, products and comments before the code; of other runs the length.

        The result is for reading and no program any more.
        """
        return MarkedText(tuple(self._folded()))

    def _folded(self) -> Iterator[tuple[str, Mark | None]]:
        run: list[str] = []
        inside = False
        for line, mark in self.lines:
            inside = inside or line.startswith(("def ", "import "))
            code = line.lstrip()
            if mark is None and (_KEPT.match(code) is None or (inside and code.startswith("#"))):
                run.append(line)
                continue
            about = len(run)
            while code.startswith("for ") and about and run[about - 1].lstrip().startswith("#"):
                about -= 1
            yield from _fold(run[:about])
            yield from ((comment, None) for comment in run[about:])
            run = []
            yield line, mark
        yield from _fold(run)


def shown(line: str, mark: Mark | None) -> str:
    """The line with its mark as a comment."""
    return line if mark is None else f"{line}  {mark}"


def _fold(run: list[str]) -> Iterator[tuple[str, Mark | None]]:
    written = [line for line in run if line.strip()]
    if len(written) < _SHORTEST:
        yield from ((line, None) for line in run)
        return
    indent = min(len(line) - len(line.lstrip()) for line in written)
    yield f"{' ' * indent}# ... {len(written)} lines", None
