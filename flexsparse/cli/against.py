"""``--diff`` and ``--against``: the other side of a comparison, from the side that the options describe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

from flexsparse.errors import SettingError, nearest

V = TypeVar("V", bound=Any)


def _number(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def _truth(text: str) -> bool:
    return {"yes": True, "no": False}[text]


# How each setting is read, and what it wants to be.
_OF_SHAPES: dict[str, tuple[Callable[[str], Any], str]] = {
    **dict.fromkeys(("length", "batch", "heads", "kv-heads", "head-dim"), (_number, "a number of at least 1")),
    **dict.fromkeys(("dtype", "device", "backend"), (str, "a name")),
    "grad": (_truth, "yes or no"),
}
_OF_VIEW = ("stage", "target")


def read_against(view: V, other: str | None, against: tuple[str, ...]) -> V:
    """The view with another expression and the settings in ``against``, each NAME=VALUE. Raises SettingError."""
    changed: dict[str, Any] = {} if other is None else {"expression": other}
    given = dict(view.given)
    for setting in against:
        name, equals, value = setting.partition("=")
        known = (*_OF_SHAPES, *_OF_VIEW)
        if not equals or name not in known:
            raise SettingError(
                "--against", got=repr(setting), expected=f"NAME=VALUE, NAME one of {', '.join(known)}",
                mend=nearest(name, known) if name not in known else "",
            )  # fmt: skip
        if name in _OF_VIEW:
            changed[name] = value
            continue
        read, wanted = _OF_SHAPES[name]
        try:
            given[name.replace("-", "_")] = read(value)
        except (ValueError, KeyError):
            raise SettingError("--against", got=repr(setting), expected=f"{wanted} as {name}") from None
    return replace(view, **changed, given=given)
