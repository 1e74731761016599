"""Which lines of the kernels that gather come from the pattern.

The kernels name what a pattern gives them alike everywhere: ``visible`` and ``seen`` are masks, ``score`` is a score,
``m_0`` the gate of selection 0. So the names in a line say what it is, and the loop that it stands in, which part of
the keys it is about and with that the very expression that was printed there.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable

from flexsparse.codegen.gathering.parts import parts_of
from flexsparse.explorer.marks import Mark, MarkedText
from flexsparse.explorer.origins import Origins
from flexsparse.ir.nodes import TRUE, Constant, Node
from flexsparse.ir.program import Program, Selected, program_text

# What opens the loop over a part's keys, or the kernel that sees no other part.
_LOOPS = (
    (re.compile(r"# Tiles whose every pair|.*tl\.load\(p_full_count"), lambda found: "full"),
    (re.compile(r"# Tiles of which some pairs|.*tl\.load\(p_near_count"), lambda found: "near"),
    (re.compile(r"# (?:Tiles|Chunks) inside which"), lambda found: "joined"),
    (re.compile(r"# Selection (\d+):|def slot_gradient_(\d+)\("), lambda found: f"selected {found[1] or found[2]}"),
    (re.compile(r"def "), lambda found: ""),
)
_NUMBER = r"_(\d+)\b"
# The first that fits counts. Selections are judged by their own number, expressions by the part.
_BY_NUMBER = (
    (re.compile(rf"selected{_NUMBER} = "), "mask"),
    (re.compile(rf"(?:gone|selected{_NUMBER}|slots|following) = .*\bp_(?:birth|death|slots){_NUMBER}"), "mask"),
    (re.compile(rf"(?:u|tau|known_tau|least|m|x|d_x|d_tau|d_u){_NUMBER} -?\+?= "), "gate"),
)
_BY_PART = (
    (re.compile(r"visible = |.*tl\.where\(visible, (?:score|p), "), "mask", "mask"),
    (re.compile(r"gate_k = |score = raw \* gate_k$|d_raw = d_raw \* gate_k$"), "gate", "gate_k"),
    (re.compile(r"score = score \+ tl\.log\("), "gate", "gate_logit"),
    (re.compile(rf"(?:p|d_score) = .*\bm{_NUMBER}"), "gate", "gate_v"),
    (re.compile(r"score = (?!raw$)|d_raw = d_score \* "), "score", "score"),
)


def mark_gathered(text: str, pattern: Node, program: Program) -> MarkedText:
    """The text of kernels that gather under ``program``, which ``pattern`` became, with its marks."""
    origins, parts = Origins(pattern, program), parts_of(program)
    part, lines = "", []
    for line in text.split("\n"):
        code = line.lstrip()
        for opening, name in _LOOPS:
            if found := opening.match(code):
                part = name(found)
                break
        mark = None
        # Parameters of kernels are no statements, and the part's own comments are no code.
        if line.startswith(" ") and not code.startswith("#"):
            mark = _by_number(code, program, origins)
            if mark is None and part:
                mark = _by_part(code, part, functools.partial(getattr, parts[part].forward()), origins)
        lines.append((line, mark))
    return MarkedText(tuple(lines))


def _by_number(code: str, program: Program, origins: Origins) -> Mark | None:
    for pattern, kind in _BY_NUMBER:
        if found := pattern.match(code):
            n = int(next(group for group in reversed(found.groups()) if group is not None))
            name = f"selected_{n}" if kind == "mask" else f"m_{n}"
            return Mark(kind, name, origins.of(Selected(n), "mask"))
    return None


def _by_part(code: str, part: str, expression: Callable[[str], Node], origins: Origins) -> Mark | None:
    number = int(part.split()[1]) if part.startswith("selected") else None
    if number is not None and re.match(r"seen = .*\bgone\b", code):
        return Mark("mask", f"selected_{number}", origins.of(Selected(number), "mask"))
    for pattern, kind, name in _BY_PART:
        if pattern.match(code):
            node = expression(name)
            sources = origins.of(node, "mask" if name == "mask" else "score")
            shown = program_text(node)
            if name == "mask" and number is not None:
                # What else must hold, on top of being selected.
                sources = tuple(dict.fromkeys((*origins.of(Selected(number), "mask"), *sources)))
                shown = f"selected_{number}" + (f" & ({shown})" if node != TRUE else "")
            elif isinstance(node, Constant):
                return None
            return Mark(kind, f"gradient of {shown}" if code.startswith("d_raw = d_score") else shown, sources)
    return None
