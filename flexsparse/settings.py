"""The options of ``compile``, checked once; every one of them that changes code is part of the cache key."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flexsparse.errors import SettingError, nearest

# Queries of a chunk, whose selected keys are gathered together: those in the slots as the chunk starts.
CHUNK = 64
BACKENDS = (
    "auto",
    "gather",
    "gather_flex",
    "gather_flex_eager",
    "residue_flex",
    "residue_flex_eager",
    "flex",
    "flex_eager",
    "chunked",
    "reference",
)


@dataclass(frozen=True)
class Settings:
    """See ``flexsparse.compile`` for what each one means."""

    backend: str = "auto"
    fallback: str | None = None
    deterministic: bool | None = None
    block_size: int = 128
    kernel_options: tuple[tuple[str, Any], ...] = ()
    dynamic: bool = True
    recompile_budget: int = 8

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            hint = nearest(str(self.backend), BACKENDS)
            raise SettingError(
                "backend", got=repr(self.backend), expected=f"one of {', '.join(map(repr, BACKENDS))}", mend=hint
            )
        if self.fallback not in (None, "reference"):
            raise SettingError("fallback", got=repr(self.fallback), expected="None or 'reference'")
        if self.deterministic not in (None, True, False):
            raise SettingError("deterministic", got=repr(self.deterministic), expected="None, True or False")
        if not isinstance(self.dynamic, bool):
            raise SettingError("dynamic", got=repr(self.dynamic), expected="True or False")
        budget = self.recompile_budget
        if isinstance(budget, bool) or not isinstance(budget, int) or budget < 1:
            raise SettingError("recompile_budget", got=repr(budget), expected="an integer of at least 1")
        size = self.block_size
        if isinstance(size, bool) or not isinstance(size, int) or size < 16 or size % 16:
            raise SettingError("block_size", got=repr(size), expected="a multiple of 16, such as 128")
