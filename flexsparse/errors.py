"""One class per user mistake; every message names the argument, what came, what was expected, and the mend."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FlexsparseError(Exception):
    """Base of every error that flexsparse raises on purpose.

    ``argument`` is the name the user wrote, ``got`` and ``expected`` are short phrases, and
    ``mend`` is one sentence in the imperative. All four are attributes, so tools can show them.
    """

    def __init__(self, argument: str, *, got: str, expected: str, mend: str = "") -> None:
        self.argument, self.got, self.expected, self.mend = argument, got, expected, mend
        text = f"{argument}: got {got}, expected {expected}."
        super().__init__(f"{text} {mend}" if mend else text)

    def __reduce__(self) -> tuple[object, ...]:
        state = {"got": self.got, "expected": self.expected, "mend": self.mend}
        return (_rebuild, (type(self), self.argument, state))


def _rebuild(cls: type[FlexsparseError], argument: str, state: dict[str, str]) -> FlexsparseError:
    return cls(argument, **state)


class ExpressionError(FlexsparseError, TypeError):
    """Operands of the wrong kind: a score where a mask is needed, a selection under ``~``, and so on."""


class TruthValueError(FlexsparseError, TypeError):
    """``bool()`` of an expression, usually from a chained comparison or ``and``/``or``/``not``."""


class PatternArgumentError(FlexsparseError, ValueError):
    """A pattern was called with an argument that it does not take or that is out of range."""


class ParseError(FlexsparseError, ValueError):
    """Text that is not an expression of the language. ``column`` is 1-based, 0 when unknown."""

    def __init__(self, argument: str, *, got: str, expected: str, mend: str = "", column: int = 0) -> None:
        super().__init__(argument, got=got, expected=expected, mend=mend)
        self.column = column


class VerificationError(FlexsparseError):
    """An IR program that breaks an invariant: a defect of flexsparse, not of the caller."""


class ShapeError(FlexsparseError, ValueError):
    """A tensor of the wrong rank or size."""


class DtypeError(FlexsparseError, TypeError):
    """A tensor of the wrong dtype, or a mix of dtypes that is not supported."""


class DeviceError(FlexsparseError, ValueError):
    """Tensors on different devices, or a device that the chosen backend cannot use."""


class CapturedError(FlexsparseError, TypeError):
    """A captured tensor that is missing, unknown, or indexed outside its size."""


class SegmentError(FlexsparseError, ValueError):
    """Segment ids that are not non-decreasing integers."""


class NonFiniteScoresError(FlexsparseError, ValueError):
    """NaN among the scores of a selection."""


class GradientError(FlexsparseError, RuntimeError):
    """A derivative that an operator does not have."""


class SettingError(FlexsparseError, ValueError):
    """An option outside its list or range."""


class NotBoundError(FlexsparseError, RuntimeError):
    """Asked for something that needs shapes before the compiled pattern was bound to any."""


class BackendError(FlexsparseError, RuntimeError):
    """The chosen backend cannot run this call here; nothing else was tried in its place."""


class RecompileBudgetError(BackendError):
    """A pattern was called in more ways than it may be compiled for; the message lists what changed each time."""


class BackendNotice(UserWarning):
    """Said once per process when ``backend="auto"`` picks the chunked path on a CPU, or a fallback is used."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``"Did you mean 'x'?"`` with the nearest known name, or a list of what there is."""
    names = sorted(known)
    return nearest(name, names) or (f"Known: {', '.join(names)}." if names else "")


def nearest(name: str, known: Iterable[str]) -> str:
    """``"Did you mean 'x'?"`` with the nearest known name; empty where none is near, for errors that list them."""
    close = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.5)
    return f"Did you mean {close[0]!r}?" if close else ""
