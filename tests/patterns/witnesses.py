"""A hand-written predicate for each pattern, over plain Python integers: no compiler code takes part.

A mask's witness takes (b, h, q, kv), the sizes and the call's tensors as nested lists, then the example's arguments.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.patterns.witnesses_published import PUBLISHED, PUBLISHED_SCORES
from tests.twins import exact_selection


@dataclass(frozen=True)
class World:
    """What a predicate may look at besides its indices."""

    size: int
    heads: int
    tensors: dict[str, Any]


Predicate = Callable[..., bool]


def document(w: World, b: int, h: int, q: int, kv: int, ids: str = "doc", cu_seqlens: str | None = None) -> bool:
    if cu_seqlens is None:
        return bool(w.tensors[ids][b][q] == w.tensors[ids][b][kv])
    ends = w.tensors[cu_seqlens]
    return any(first <= q < last and first <= kv < last for first, last in itertools.pairwise(ends))


def global_tokens(w: World, b: int, h: int, q: int, kv: int, count: int) -> bool:
    return q < count or kv < count


def sliding_window(w: World, b: int, h: int, q: int, kv: int, window: int, causal: bool = True) -> bool:
    return kv in range(q - window + 1, q + 1 if causal else q + window)


def dilated_window(w: World, b: int, h: int, q: int, kv: int, window: int, dilation: int) -> bool:
    return kv in [q - step * dilation for step in range(window)]


def sparsek(w: World, b: int, h: int, q: int, kv: int, k: int, after: int = 0) -> bool:
    key = (b, h, k, after)
    cache = w.tensors.setdefault("selected", {})
    if key not in cache:
        cache[key] = exact_selection(w.tensors["scores"][b][h * len(w.tensors["scores"][b]) // w.heads], k, after)
    return kv in cache[key][q]


def sparsek_window(w: World, b: int, h: int, q: int, kv: int, k: int, window: int) -> bool:
    return q - window < kv <= q or sparsek(w, b, h, q, kv, k, after=window)


def blocks(w: World, b: int, h: int, q: int, kv: int, block: int, k: int, score: Callable[..., float]) -> bool:
    """The own block up to the query, and the k past blocks of the best score, the earlier first on ties."""
    cache = w.tensors.setdefault("blocks", {})
    at = (b, h, q)
    if at not in cache:
        query, keys = w.tensors["query"][b][h][q], w.tensors["key"][b][h * len(w.tensors["key"][b]) // w.heads]
        past = range(q // block)
        rates = [score(query, keys[n * block : (n + 1) * block]) for n in past]
        cache[at] = sorted(past, key=lambda n: (-rates[n], n))[:k]
    return kv // block in cache[at] or (kv // block == q // block and kv <= q)


def mean_score(query: list[float], keys: list[list[float]]) -> float:
    return math.fsum(
        x * math.fsum(column) / len(keys) for x, column in zip(query, zip(*keys, strict=True), strict=True)
    )


def bound_score(query: list[float], keys: list[list[float]]) -> float:
    columns = zip(*keys, strict=True)
    return math.fsum(max(x * min(c), x * max(c)) for x, c in zip(query, columns, strict=True))


MASKS: dict[str, Predicate] = {
    "causal": lambda w, b, h, q, kv: kv <= q,
    "dilated_window": dilated_window,
    "document": document,
    "full": lambda w, b, h, q, kv: True,
    "global_tokens": global_tokens,
    # The sink is no key; what it does to the softmax is in tests/runtime/test_sinks.py.
    "learned_sinks": lambda w, b, h, q, kv: True,
    "moba": lambda w, b, h, q, kv, block, k: blocks(w, b, h, q, kv, block, k, mean_score),
    "padding": lambda w, b, h, q, kv: kv < w.tensors["lengths"][b],
    "prefix_lm": lambda w, b, h, q, kv, prefix: kv in range(max(prefix, q + 1)),
    "quest": lambda w, b, h, q, kv, block, k: blocks(w, b, h, q, kv, block, k, bound_score),
    "sinks": lambda w, b, h, q, kv, count: kv in range(count),
    "sliding_window": sliding_window,
    "sparsek": sparsek,
    "sparsek_window": sparsek_window,
    **PUBLISHED,
}


def alibi(w: World, h: int, q: int, kv: int, running: float) -> float:
    return running - alibi_slopes(w.heads)[h] * abs(q - kv)


def alibi_slopes(heads: int) -> list[float]:
    """The authors' own scheme, as a recursion: slopes of a power of two, then every other slope of twice that."""
    if math.log2(heads).is_integer():
        return [2 ** (-8 * (n + 1) / heads) for n in range(heads)]
    power = 2 ** math.floor(math.log2(heads))
    return alibi_slopes(power) + alibi_slopes(2 * power)[0::2][: heads - power]


def relative_bias(w: World, h: int, q: int, kv: int, running: float, span: int) -> float:
    return float(running + w.tensors["bias"][h][sorted((-span, q - kv, span))[1] + span])


SCORES: dict[str, Callable[..., float]] = {
    "alibi": alibi,
    "relative_bias": relative_bias,
    "softcap": lambda w, h, q, kv, running, cap: cap * math.tanh(running / cap),
    **PUBLISHED_SCORES,
}
