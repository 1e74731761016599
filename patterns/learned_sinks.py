"""Every head has a learned logit in its softmax's denominator, with no key and no value: it may attend to nothing.

out = sum of exp(s_j) v_j / (exp(sink) + sum of exp(s_j)); ``sink_logits=`` is a float tensor [H] that receives
gradients, computed without atomics. lse includes the sink, and a row that sees no key gives 0. It sees every key by
itself: compose it, as in ``causal() & sliding_window(128) & learned_sinks()``. Any pattern takes a sink of its own by
``pattern.sink(expression)``; a logit of 0 is the softmax with 1 added to its denominator ("off by one").
Learned sink logits of each head are OpenAI's in gpt-oss (model card, 2025). Not to be confused with ``sinks(count)``,
which are real keys.
"""

from flexsparse.language import Pattern, captured, everything, h, pattern


@pattern(examples=[{}])
def learned_sinks(logits: str = "sink_logits") -> Pattern:
    return everything.sink(captured(logits, dims=("h",), learnable=True)[h])
