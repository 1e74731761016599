"""Scores pass through ``cap * tanh(score / cap)``: write ``pattern.score(softcap(30))``.

Gemma 2 caps its attention logits this way (arXiv 2408.00118). ``cap`` is in units of the scaled score, above 0.
"""

from flexsparse.language import Value, above, pattern, score, tanh


@pattern(examples=[{"cap": 30.0}])
def softcap(cap: float | Value) -> Value:
    above(0, cap=cap)
    return cap * tanh(score / cap)
