"""What changes between two texts of the explorer; marks are shown, but alone they are no change."""

from __future__ import annotations

import difflib
from collections.abc import Iterator

from flexsparse.explorer.marks import MarkedText, shown

# Lines of context around a change.
_AROUND = 3


def difference(before: MarkedText, after: MarkedText, names: tuple[str, str]) -> str:
    """A unified diff from ``before`` to ``after``, which are called ``names``; empty where their lines are the same."""
    return "".join(f"{line}\n" for line in _lines(before, after, names))


def _lines(before: MarkedText, after: MarkedText, names: tuple[str, str]) -> Iterator[str]:
    old, new = ([line for line, _ in text.lines] for text in (before, after))
    matcher = difflib.SequenceMatcher(None, old, new, autojunk=False)
    for number, group in enumerate(matcher.get_grouped_opcodes(_AROUND)):
        if number == 0:
            yield f"--- {names[0]}"
            yield f"+++ {names[1]}"
        first, last = group[0], group[-1]
        yield f"@@ -{first[1] + 1},{last[2] - first[1]} +{first[3] + 1},{last[4] - first[3]} @@"
        for tag, i, j, k, m in group:
            if tag == "equal":
                yield from (f" {shown(*line)}" for line in before.lines[i:j])
                continue
            yield from (f"-{shown(*line)}" for line in before.lines[i:j])
            yield from (f"+{shown(*line)}" for line in after.lines[k:m])
