"""The compositions on which every backend is compared with the oracle."""

from __future__ import annotations

from typing import Any

from flexsparse.language import b, captured, h, heads, kv, kv_len, per_head, q, q_len, score, topk, where
from flexsparse.patterns import catalogue

P: Any = catalogue()
CAUSAL, FULL = P["causal"](), P["full"]()
KEEP: Any = captured("keep", dims=("b", "s"), dtype="bool")
SLOPE: Any = captured("slope", dims=("h",), learnable=True)
SINK: Any = captured("sink_logits", dims=("h",), learnable=True)
BIAS = P["relative_bias"](16)


def hybrid(k: int, window: int, gate: str) -> Any:
    """Window or sinks or selection, causally: the library's own first example."""
    return CAUSAL & (P["sliding_window"](window) | P["sinks"](2) | topk(k, after=window, gate=gate))


GATES = ("kv", "k", "v", "logit", "none", "ste", "ste_identity", "ste_sigmoid", "capped_softmax")

COMPOSITIONS: dict[str, Any] = {
    "full": FULL,
    "causal": CAUSAL,
    "window and alibi": P["sliding_window"](9) + P["alibi"](),
    "softcap then bias": CAUSAL.score(P["softcap"](2.0)) + BIAS,
    "document and padding": P["document"]() & P["padding"]() & CAUSAL,
    "prefix or global": P["prefix_lm"](3) | P["global_tokens"](2),
    "dilated": P["dilated_window"](4, 3),
    "cumulative lengths": P["document"](cu_seqlens="cu_seqlens") & CAUSAL,
    "boolean tensor": KEEP[b, kv] & CAUSAL,
    "learned slope": CAUSAL - where(kv < q, SLOPE[h] * abs(q - kv), 0),
    "xor and not": (CAUSAL ^ P["sinks"](3)) & ~P["document"](),
    "window of each head": P["sliding_window"](per_head([2, 20])) + per_head([0.5, -0.5, 0.25, 0.0]),
    "pattern of each head": per_head([CAUSAL + 1.0, P["sparsek"](3), P["sinks"](4), P["sliding_window"](4) + BIAS]),
    **{f"sparsek gate {gate}": P["sparsek"](5, gate=gate) for gate in GATES},
    **{f"hybrid gate {gate}": hybrid(4, 6, gate) for gate in GATES},
    "paper hybrid": P["sparsek_window"](4, 6),
    "overlap": P["sliding_window"](6) | P["sparsek"](4),
    "after less than window": P["sliding_window"](6) | P["sparsek"](4, after=2, gate="logit"),
    "after greater than window": P["sliding_window"](3) | P["sparsek"](4, after=8),
    "segments": P["sparsek"](3, segments="segments", gate="v"),
    "document after selection": P["document"]() & P["sparsek"](5),
    "selection within documents": CAUSAL
    & (P["document"]() & P["sliding_window"](4) | topk(3, after=4, segments="doc", gate="kv")),
    "two selections, either": P["sparsek"](4) | P["sparsek"](5, scores="u", gate="v"),
    "two selections, both": P["sparsek"](9) & P["sparsek"](8, scores="u", gate="logit"),
    "same scores twice": P["sparsek"](6) & P["sparsek"](3, after=2, gate="k") | P["sinks"](1),
    "three selections": (P["sparsek"](3) | P["sparsek"](4, scores="u", gate="ste"))
    | topk(2, scores="other", gate="logit"),
    "softcap on a selection": P["sparsek"](5).score(P["softcap"](1.5)) | (P["sliding_window"](3) + 0.5),
    "bias on a hybrid": hybrid(4, 6, "kv") + P["alibi"]() + BIAS,
    "scaled score": hybrid(4, 6, "v").score(score * 1.5 - 0.25),
    "selection of a head": per_head([P["sparsek"](3, gate="v"), P["sliding_window"](4)]),
    "straight through or gated": topk(4, gate="ste") | topk(6, scores="u", gate="kv"),
    "score without the running score": (CAUSAL & topk(5, gate="kv")).score(q - kv) | P["sinks"](1).score(0.5),
    "score of sizes": CAUSAL.score(q_len / 7),
    "mask of sizes": (kv_len < 20) & CAUSAL | ~(q_len < 20) & P["sliding_window"](5),
    "choice by sizes": CAUSAL + where(kv_len < 20, q, 0) - where(q_len < 20, 0.5, kv),
    "learned sinks": CAUSAL & P["sliding_window"](4) & P["learned_sinks"](),
    "off by one": CAUSAL.sink(0),
    "sink where rows see nothing": (CAUSAL & (kv > 3)).sink(SLOPE[h] - 0.5) + BIAS,
    "sink under a gate on V": hybrid(4, 6, "kv") & P["learned_sinks"](),
    "sink under a straight-through gate": topk(4, after=3, gate="ste").sink(0.25),
    "sink and score of one tensor": (CAUSAL - SLOPE[h] * abs(q - kv)).sink(SLOPE[h] * 2),
    "sink of position and sizes": (P["sparsek"](3, after=2) + 0.5).sink(where(q < 9, q / 7, -0.1) - heads / 3),
    "sink of some heads": per_head(
        [CAUSAL.sink(SINK[h]), P["sinks"](4), topk(3, gate="v").sink(1.5), CAUSAL & (kv > 5)]
    ),
    "moba": P["moba"](5, 2),
    "quest": P["quest"](4, 1),
    "moba within documents": P["moba"](4, 3) & P["document"]() | P["sinks"](1) & CAUSAL,
    "what quest left out": ~P["quest"](3, 2) & CAUSAL,
    "two choices of blocks": (P["moba"](6, 1) + 0.5 | P["quest"](4, 2)) & P["sliding_window"](14),
    "blocks or a selection": P["moba"](7, 1) | P["sparsek"](4, gate="v"),
    "bias where a block was chosen": CAUSAL + where(P["moba"](4, 1), SLOPE[h], 0),
    "moba of a head": per_head([P["moba"](4, 1), P["sliding_window"](3)]) & P["learned_sinks"](),
    "selection of every key": P["sparsek"](10**9) & CAUSAL,
}
