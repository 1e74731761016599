"""Every query sees every key; the neutral element of ``&`` and the base for a score alone."""

from flexsparse.language import Mask, everything, pattern


@pattern(examples=[{}])
def full() -> Mask:
    return everything
