"""SPARSEK attention: the k keys with the largest learned scores of each causal prefix, under a soft gate.

Query q selects among the keys ``kv <= q - after`` (inclusive), of its own segment if ``segments`` names a tensor
of ids ([S] or [B, S], non-decreasing; cumulative lengths where ``document(cu_seqlens=...)`` names the same
tensor): then the prefix restarts with each segment. That differs from
``document() & sparsek(k)``, which selects over the whole row first and masks then. ``gate`` says where the soft
gate acts: "kv", "k", "v", "logit", "none", "ste", "ste_identity" or "ste_sigmoid", or chooses another gate,
"capped_softmax"; ``topk`` says what each does.
``scores`` names the tensor of scores.
Source: Lou, Jia, Zheng, Tu, "Sparser is Faster and Less is More", arXiv 2406.16747; ``after``, ``segments`` and
the gates beside "kv" are flexsparse's. Eviction is final: a key that leaves the selection never returns.
"""

from flexsparse.language import Index, Selection, pattern, topk


@pattern(examples=[{"k": 1}, {"k": 24}, {"k": 24, "after": 16}])
def sparsek(
    k: int | Index,
    after: int | Index = 0,
    gate: str = "kv",
    scores: str = "scores",
    segments: str | None = None,
) -> Selection:
    return topk(k, after=after, gate=gate, scores=scores, segments=segments)
