"""Weights proportional to ``sigmoid(score)`` instead of ``exp(score)``: write ``pattern.score(sigmoid_weights())``.

The score becomes ``log(sigmoid(score))``, so no key can outweigh another without bound. Sigmoid attention proper does
not normalise; softmax attention does.
"""

from flexsparse.language import Value, log, pattern, score, sigmoid


@pattern(examples=[{}])
def sigmoid_weights() -> Value:
    return log(sigmoid(score))
