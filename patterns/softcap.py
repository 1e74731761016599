"""Scores pass through ``cap * tanh(score / cap)``: write ``pattern.score(softcap(30))``.

Gemma 2 caps its attention logits this way (arXiv 2408.00118). ``cap`` is in units of the scaled score, above 0.
"""

from flexsparse.errors import PatternArgumentError
from flexsparse.language import Value, pattern, score, tanh


@pattern(examples=[{"cap": 30.0}])
def softcap(cap: float) -> Value:
    if not cap > 0:
        raise PatternArgumentError("softcap(cap)", got=repr(cap), expected="a number above 0")
    return cap * tanh(score / cap)
