"""Hand-written predicates for patterns taken from papers and libraries, over plain integers as in ``witnesses``."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

Predicate = Callable[..., bool]


def bigbird(w: Any, b: int, h: int, q: int, kv: int, block: int, random: int, seed: int) -> bool:
    row, column, blocks = q // block, kv // block, math.ceil(w.size / block)
    if row == 0 or column == 0 or column in (row - 1, row, row + 1):
        return True
    draws = []
    for draw in range(random):
        state = ((row % 46337) * 16807 + (seed % 1009) * 97 + draw * 3571 + 1) % 46337
        draws.append((state * 16807) % 46337 % blocks)
    return column in draws


def strided(w: Any, b: int, h: int, q: int, kv: int, stride: int) -> bool:
    return kv in range(q - stride + 1, q + 1) or kv in range(q, -1, -stride)


def fixed(w: Any, b: int, h: int, q: int, kv: int, block: int, summary: int) -> bool:
    start = kv - kv % block
    return kv <= q and (q < start + block or kv in range(start + block - summary, start + block))


def longformer(w: Any, b: int, h: int, q: int, kv: int, window: int, count: int) -> bool:
    return kv in range(q - window + 1, q + window) or q < count or kv < count


def natten_1d(w: Any, b: int, h: int, q: int, kv: int, kernel: int) -> bool:
    return kv in neighbours(q, w.size, min(kernel, w.size))


def neighbours(position: int, extent: int, kernel: int) -> range:
    """``kernel`` places around a position, moved inward where they would leave [0, extent)."""
    start = position - kernel // 2
    while start < 0:
        start += 1
    while start + kernel > extent:
        start -= 1
    return range(start, start + kernel)


def natten_2d(
    w: Any, b: int, h: int, q: int, kv: int, height: int, width: int, kernel_height: int, kernel_width: int
) -> bool:
    if q >= height * width or kv >= height * width:
        return False
    rows = neighbours(q // width, height, kernel_height)
    return kv // width in rows and kv % width in neighbours(q % width, width, kernel_width)


def natten_3d(w: Any, b: int, h: int, q: int, kv: int, frames: int, height: int, width: int, kernel: int) -> bool:
    extents = (frames, height, width)
    mine, other = (coordinates(p, extents) for p in (q, kv))
    if mine is None or other is None:
        return False
    return all(y in neighbours(x, n, kernel) for x, y, n in zip(mine, other, extents, strict=True))


def coordinates(position: int, extents: tuple[int, int, int]) -> tuple[int, int, int] | None:
    for number, place in enumerate(
        (f, r, c) for f in range(extents[0]) for r in range(extents[1]) for c in range(extents[2])
    ):
        if number == position:
            return place
    return None


def sliding_tile_3d(
    w: Any, b: int, h: int, q: int, kv: int, frames: int, height: int, width: int, tile: int, window: int
) -> bool:
    mine, other = (coordinates(p // tile**3, (frames, height, width)) for p in (q, kv))
    if mine is None or other is None:
        return False
    return max(abs(x - y) for x, y in zip(mine, other, strict=True)) <= window


def prefix_document(w: Any, b: int, h: int, q: int, kv: int) -> bool:
    doc, prefix = w.tensors["doc"][b], w.tensors["in_prefix"][b]
    return doc[q] == doc[kv] and (kv <= q or bool(prefix[kv]))


def shared_prefix(w: Any, b: int, h: int, q: int, kv: int, prefix: int, length: int) -> bool:
    if kv > q:
        return False
    # Which continuation a position belongs to; the prompt counts backwards from it.
    mine, other = (math.floor((p - prefix) / length) for p in (q, kv))
    return kv < prefix or mine == other


def head_windows(w: Any, b: int, h: int, q: int, kv: int, windows: list[int]) -> bool:
    return kv in range(q - windows[h * len(windows) // w.heads] + 1, q + 1)


def vertical_slash(w: Any, b: int, h: int, q: int, kv: int) -> bool:
    return kv <= q and (w.tensors["vertical"][h][kv] or w.tensors["slash"][h][q - kv])


def mixed_modal(w: Any, b: int, h: int, q: int, kv: int) -> bool:
    image = w.tensors["image"][b]
    return kv <= q or (image[q] >= 0 and image[q] == image[kv])


def tree(w: Any, b: int, h: int, q: int, kv: int) -> bool:
    token = q
    while token >= 0:
        if token == kv:
            return True
        token = w.tensors["parents"][token]
    return False


PUBLISHED: dict[str, Predicate] = {
    "bigbird": bigbird,
    "block_causal": lambda w, b, h, q, kv, block: kv < (q // block + 1) * block,
    "block_diagonal": lambda w, b, h, q, kv, block: kv in range(q - q % block, q - q % block + block),
    "block_layout": lambda w, b, h, q, kv, block: bool(w.tensors["layout"][h][q // block][kv // block]),
    "chunked_local": lambda w, b, h, q, kv, chunk: kv in range(q - q % chunk, q + 1),
    "fixed": fixed,
    "head_windows": head_windows,
    "logsparse": lambda w, b, h, q, kv: q == kv or (q > kv and bin(q - kv).count("1") == 1),
    "longformer": longformer,
    "lookahead": lambda w, b, h, q, kv, count: kv in range(q + count + 1),
    "mixed_modal": mixed_modal,
    "natten_1d": natten_1d,
    "natten_2d": natten_2d,
    "natten_3d": natten_3d,
    "prefix_document": prefix_document,
    "ring": lambda w, b, h, q, kv, window: any((q + step) % w.size == kv for step in range(1 - window, window)),
    "shared_prefix": shared_prefix,
    "sliding_tile_3d": sliding_tile_3d,
    "streaming_llm": lambda w, b, h, q, kv, window, count=4: kv <= q and (kv < count or kv > q - window),
    "strided": strided,
    "tree": tree,
    "vertical_slash": vertical_slash,
}


def t5_buckets(w: Any, h: int, q: int, kv: int, running: float, buckets: int, furthest: int) -> float:
    distance, exact = max(q - kv, 0), buckets // 2
    bucket = distance
    if distance >= exact:
        share = math.log(distance / exact) / math.log(furthest / exact)
        bucket = min(exact + int(share * (buckets - exact)), buckets - 1)
    return float(running + w.tensors["bias"][h][bucket])


def kerple(w: Any, h: int, q: int, kv: int, running: float) -> float:
    first, second = w.tensors["rates"][h]
    return float(running - first * math.log(1 + second * abs(q - kv)))


def sandwich(w: Any, h: int, q: int, kv: int, running: float, terms: int) -> float:
    waves = (math.cos((q - kv) / 10000 ** (i / terms)) for i in range(terms))
    return running + sum(waves) - terms


PUBLISHED_SCORES: dict[str, Callable[..., float]] = {
    "distance_decay": lambda w, h, q, kv, running, reach: running * math.exp(-abs(q - kv) / reach),
    "kerple": kerple,
    "log_length": lambda w, h, q, kv, running, trained: running * max(1.0, math.log(q + 1) / math.log(trained)),
    "retention": lambda w, h, q, kv, running: running + abs(q - kv) * math.log(1 - 2 ** (-5 - h)),
    "sandwich": sandwich,
    "sigmoid_weights": lambda w, h, q, kv, running: math.log(1 / (1 + math.exp(-running))),
    "t5_buckets": t5_buckets,
    "temperature": lambda w, h, q, kv, running, value: running / value,
}
