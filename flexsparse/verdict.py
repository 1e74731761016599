"""What an analysis says: a fact, the absence of one, or that it could not tell; always with a reason."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Verdict:
    """``holds`` is True, False, or None where the answer is unknown.

    ``counterexample`` gives b, h, q and kv where one was found. ``bool()`` of an unknown verdict is False.
    """

    holds: bool | None
    reason: str
    counterexample: Mapping[str, int] | None = field(default=None)

    def __bool__(self) -> bool:
        return self.holds is True
