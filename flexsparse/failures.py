"""What an exception of torch's or Triton's compiler says, in the few words that help."""

from __future__ import annotations

import re

_LONGEST = 300
# Where what torch adds for those who debug torch begins: the operands, how to log more, the frames, whom to tell.
_ADDED = re.compile(
    r"\s*(target: |args\[\d+\]|kwargs: |Set TORCH|You can suppress|from user code|Hint: |Developer debug context|"
    r"For more details|Please report|While executing |Original traceback|Found from |The above exception|To fix this|"
    r"backend='\w+' raised:\s*$)"
)
# "LoweringException: ValueError: ...": a wrapper that names what it wraps.
_WRAPPER = re.compile(r"^(?:\w+: )+(?=[\w.]+(?:Error|Exception|Failed|Failure): )")


def cause_of(error: BaseException) -> BaseException:
    """The exception behind ``error``: the last of those that were raised from one another, or wrapped."""
    seen: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in seen:
        seen.append(cause)
        inner = getattr(cause, "inner_exception", None)
        cause = cause.__cause__ or (inner if isinstance(inner, BaseException) else None)
    return seen[-1]


def cause_in_words(error: BaseException) -> str:
    """Type and message of the exception behind ``error``, on one line without what compilers put around it."""
    cause = cause_of(error)
    message = _WRAPPER.sub("", f"{type(cause).__name__}: {_message(str(cause))}")
    if len(message) > _LONGEST:
        message = message[:_LONGEST].rsplit(" ", 1)[0] + " ..."
    return message.rstrip(".:") if not message.endswith("...") else message


def _message(said: str) -> str:
    lines = said.splitlines()
    # Triton shows the line of the kernel, then a caret under it, then what is wrong.
    carets = [n for n, line in enumerate(lines) if line.strip() == "^"]
    kept: list[str] = []
    for line in lines[carets[-1] + 1 if carets else 0 :]:
        if _ADDED.match(line) and kept:
            break
        if line.strip() and not _ADDED.match(line):
            kept.append(line.strip())
    return " ".join(kept) or "no message"
