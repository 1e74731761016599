"""The loops of a kernel over the parts of a chunk's keys, and over the chunks that see a tile of keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from flexsparse.codegen.gathering.slots import known
from flexsparse.codegen.gathering.tiles import ENTERS, Lines, key_loads


def _near_loop(name: str, body: Lines) -> Lines:
    """All tiles of one list of a chunk; a tile of the block mask is BLOCK_M keys wide."""
    edge = ["seen = (column < length)[None, :]", "column = tl.minimum(column, length - 1)"] if name == "near" else []
    return [
        f"# {'Tiles whose every pair' if name == 'full' else 'Tiles of which some pairs'} the pattern allows anyway.",
        f"count = tl.load(p_{name}_count + b * count_b + h * count_h + chunk) * (BLOCK_M // BLOCK_N)",
        f"tiles = p_{name}_index + b * index_b + h * index_h + chunk * index_row",
        *_for_each_tile("BLOCK_N"),
        "    column = tile * BLOCK_M + step % (BLOCK_M // BLOCK_N) * BLOCK_N + tl.arange(0, BLOCK_N)",
        *(f"    {line}" for line in edge),
        "    kv = column[None, :]",
        *(f"    {line}" for line in body),
    ]


def _for_each_tile(part: str) -> Lines:
    """The head of a loop over ``count`` parts of the ``tiles`` of a list; the next tile is known before its turn."""
    return [
        "following = tl.load(tiles, mask=count > 0, other=0)",
        "for step in range(count):",
        "    tile = following",
        f"    following = tl.load(tiles + (step + 1) // (BLOCK_M // {part}), mask=step + 1 < count, other=0)",
    ]


def _slots_loop(n: str, body: Lines, scored: bool) -> Lines:
    head = f"(b * heads_{n} + h // group_{n})"
    load = f"tl.load(records + tl.minimum(slot, k_{n} - 1)[:, None] * 2 + twice[None, :])"
    return [
        f"# Selection {n}: the keys in its slots as the chunk starts; no more slots are in use than keys came before.",
        "slot = tl.arange(0, BLOCK_N)",
        "# Read twice: of fewer numbers than it has threads, a block loads each wherever it is wanted.",
        "twice = tl.arange(0, 4) % 2",
        f"records = p_records_{n} + ({head} * n_chunks + chunk) * k_{n} * 2",
        f"following = {load}",
        f"for first in range(0, tl.minimum(k_{n}, start + 1), BLOCK_N):",
        "    # The keys of the next tile are known before this one's are used.",
        "    # Masked only now: a loop waits at its end for what it loads with a mask, to move it.",
        f"    known = tl.where((first + tl.arange(0, BLOCK_N) < k_{n})[:, None], following, 0)",
        "    holders, scores = tl.split(tl.reshape(known, [BLOCK_N, 2, 2]))",
        "    holder, again = tl.split(holders)",
        *(["    bits, again = tl.split(scores)", f"    u_{n} = bits.to(tl.float32, bitcast=True)[None, :]"] * scored),
        "    slot += BLOCK_N",
        f"    following = {load}",
        "    column = holder & KEY_MASK",
        "    kv = column[None, :]",
        "    gone = (start + (holder >> KEY_BITS))[None, :]",
        "    seen = q < gone",
        *(f"    {line}" for line in _while_they_stay(body)),
    ]


def _while_they_stay(body: Lines) -> Lines:
    """Where nothing but ``seen`` hides a key in a slot, few tiles have one that is hidden."""
    shown = "tl.where(visible, p, 0.0)"
    asked = "staying(p, q, gone, start + BLOCK_M, THREADS)"
    return [line.replace(shown, asked) for line in body] if "visible = seen" in body else body


def _fresh_loop(n: str, body: Lines, scored: bool) -> Lines:
    return [
        f"# Selection {n}: the keys that enter inside the chunk.",
        f"for first in range(start + 1 - after_{n}, start + BLOCK_M - after_{n}, BLOCK_N):",
        "    column = first + tl.arange(0, BLOCK_N)",
        "    m_key = (column >= 0) & (column < length)",
        "    column = tl.minimum(tl.maximum(column, 0), length - 1)",
        "    kv = column[None, :]",
        f"    gone = tl.where(m_key, tl.load(p_death_{n} + (b * heads_{n} + h // group_{n}) * length + column), 0)"
        "[None, :]",
        f"    seen = (kv + after_{n} <= q) & (q < gone)",
        *(f"    {line}" for line in (key_loads([int(n)], "[None, :]") if scored else [])),
        *(f"    {line}" for line in body),
    ]


def _joined_loop(body: Lines) -> Lines:
    """The tiles with the keys that enter selection 0 inside the chunk, whole."""
    return [
        "# Tiles inside which keys enter selection 0: those that do, and what the pattern allows anyway.",
        "begin = tl.maximum(start + 1 - after_0, 0) // BLOCK_M * BLOCK_M",
        "end = tl.cdiv(tl.maximum(start + BLOCK_M - after_0, 0), BLOCK_M) * BLOCK_M",
        "for first in range(begin, end, BLOCK_N):",
        "    column = first + tl.arange(0, BLOCK_N)",
        "    seen = (column < length)[None, :]",
        "    column = tl.minimum(column, length - 1)",
        "    kv = column[None, :]",
        "    gone = tl.load(p_death_0 + (b * heads_0 + h // group_0) * length + column)[None, :]",
        f"    selected_0 = {ENTERS}",
        *(f"    {line}" for line in body),
    ]


# Between the loops that raise levels and those over tiles that may leave them.
_HOLDS = (
    "if HELD:",
    "    # From here on rows keep their level; those that saw no key near are measured against 0.",
    '    top = tl.where(top == float("-inf"), 0.0, top)',
    "    level = top",
)


def row_loops(blocks: Mapping[tuple[str, str], Lines], way: str, gated: Mapping[int, Sequence[int]]) -> Lines:
    """The loops of one chunk of queries over all its keys; in the forward pass those over partly near tiles first."""
    parts = {name: body for (of, name), body in blocks.items() if of == way}
    lines: Lines = []
    if way == "forward" and "near" in parts:
        lines += [*_near_loop("near", parts.pop("near")), *_HOLDS]
    for name, body in parts.items():
        kind, _, number = name.partition(" ")
        if kind == "selected":
            scored = int(number) in gated[int(number)]
            lines += _slots_loop(number, body, scored)
            lines += [] if (way, "joined") in blocks else _fresh_loop(number, body, scored)
        else:
            lines += _joined_loop(body) if kind == "joined" else _near_loop(kind, body)
    return lines


def key_loops(blocks: Mapping[tuple[str, str], Lines]) -> Lines:
    """For a tile of keys and a head: the chunks that see it near, and those inside which its keys enter."""
    lines: Lines = []
    for (of, name), body in blocks.items():
        if of != "keys":
            continue
        kind, _, n = name.partition(" ")
        inner = [f"    {line}" for line in body]
        if kind == "joined":
            lines += [
                "# Chunks inside which keys of this tile's block enter selection 0.",
                "begin = (first // BLOCK_M * BLOCK_M + after_0) // BLOCK_M",
                "end = tl.minimum((first // BLOCK_M * BLOCK_M + BLOCK_M - 2 + after_0) // BLOCK_M + 1, n_chunks)",
                *_entry_steps("0"),
                *inner,
            ]
        elif kind == "selected" and ("keys", "joined") not in blocks:
            lines += [
                f"# Selection {n}: the chunks inside which these keys enter it.",
                f"begin = tl.maximum(first + after_{n}, 0) // BLOCK_M",
                f"end = tl.minimum((first + BLOCK_N - 1 + after_{n}) // BLOCK_M + 1, n_chunks)",
                *_entry_steps(n),
                *known(inner, f"(kv + after_{n} <= q) & (q < gone) & (kv + after_{n} > start)"),
            ]
        elif kind != "selected":
            lines += [
                f"count = tl.load(p_{kind}_count + b * count_b + h * count_h + first // BLOCK_M)",
                "count *= BLOCK_M // BLOCK_Q",
                f"tiles = p_{kind}_index + b * index_b + h * index_h + first // BLOCK_M * index_row",
                *_for_each_tile("BLOCK_Q"),
                "    first_row = tile * BLOCK_M + step % (BLOCK_M // BLOCK_Q) * BLOCK_Q",
                *inner,
            ]
    return lines


def _entry_steps(n: str) -> Lines:
    """The head of a loop over the queries of the chunks from ``begin`` to ``end``."""
    return [
        f"gone = tl.load(p_death_{n} + (b * heads_{n} + h // group_{n}) * length + column)",
        "gone = tl.where(m_column, gone, 0)[:, None]",
        "for step in range(begin * (BLOCK_M // BLOCK_Q), end * (BLOCK_M // BLOCK_Q)):",
        "    first_row = step * BLOCK_Q",
        "    start = step // (BLOCK_M // BLOCK_Q) * BLOCK_M",
    ]
