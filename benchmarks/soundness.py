"""Are tile classes sound, and how often exact? Random masks against their elements, for as long as you like.

    python benchmarks/soundness.py --cases 100000 --seed 0 --out benchmarks/results/soundness.json

Each case draws an expression over q, kv, b, h and captured tensors, with // % negatives, where, ^ and abs, classifies
its tiles at a random small size, and compares every tile with the dense mask of the oracle. A FULL tile that is not
full, or an EMPTY one that is not empty, ends the run with the expression.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import platform
import random
import sys
import time
from typing import Any

import torch

import flexsparse as fs
from flexsparse.analysis.tiles import EMPTY, FULL, Sizes, classify
from flexsparse.ir.lower import lower
from flexsparse.language import b, captured, h, kv, maximum, minimum, q, where

BLOCK = 8
DOC = captured("doc", dims=("b", "s"))
TABLE = captured("table", dims=("h",))
DIVISORS = (-7, -3, -2, 1, 2, 3, 4, 5, 8, 11)


def number(draw: random.Random, depth: int) -> Any:
    """A random index expression."""
    if depth == 0 or draw.random() < 0.25:
        leaves = (q, kv, q, kv, b, h, DOC[b, q], DOC[b, kv], TABLE[h], q - kv, draw.randint(-20, 40))
        return draw.choice(leaves)
    left, right = number(draw, depth - 1), number(draw, depth - 1)
    if isinstance(left, int):
        left = q + left
    kind = draw.randrange(10)
    if kind < 4:
        return (left + right, left - right, left * draw.randint(-3, 3), abs(left))[kind]
    if kind < 6:
        return left // draw.choice(DIVISORS) if kind == 4 else left % draw.choice(DIVISORS)
    if kind < 8:
        return minimum(left, right) if kind == 6 else maximum(left, right)
    return where(mask(draw, 1), left, right) if kind == 8 else -left


def mask(draw: random.Random, depth: int) -> Any:
    """A random plain mask."""
    if depth == 0 or draw.random() < 0.3:
        left, right = number(draw, 2), number(draw, 2)
        left = q - kv + left if isinstance(left, int) else left
        kind = draw.randrange(6)
        return (left < right, left <= right, left > right, left >= right, left == right, left != right)[kind]
    left, right = mask(draw, depth - 1), mask(draw, depth - 1)
    return (left & right, left | right, left ^ right, ~left)[draw.randrange(4)]


def judge(expression: Any, size: int, tensors: dict[str, torch.Tensor]) -> tuple[bool, bool]:
    """Whether the classes are sound, and whether they are exact."""
    program = lower(expression.node)
    tiles = classify(program.mask, Sizes(2, 2, size, size), tensors, block=BLOCK)
    dense = fs.dense_mask(expression, size, batch=2, heads=2, **tensors)  # type: ignore[arg-type]
    count = -(-size // BLOCK)
    padded = torch.nn.functional.pad(dense, (0, count * BLOCK - size) * 2)
    seen = padded.reshape(2, 2, count, BLOCK, count, BLOCK).sum((3, 5))
    kinds = tiles.kinds.expand(2, 2, count, count)
    empty, full = seen == 0, seen == BLOCK * BLOCK
    sound = not bool(((kinds == EMPTY) & ~empty).any() or ((kinds == FULL) & ~full).any())
    return sound, bool(((kinds == EMPTY) == empty).all() and ((kinds == FULL) == full).all())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after this long")
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--out", type=pathlib.Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    draw, start, exact, done = random.Random(arguments.seed), time.perf_counter(), 0, 0
    while done < arguments.cases and time.perf_counter() - start < arguments.seconds:
        done += 1
        size = draw.choice((1, 7, 8, 17, 30))
        expression = mask(draw, draw.randint(0, 3))
        ids = torch.tensor([sorted(draw.randint(0, 4) for _ in range(size)) for _ in range(2)])
        if draw.random() < 0.3:
            ids = ids[:, torch.tensor(draw.sample(range(size), size))]
        tensors = {"doc": ids, "table": torch.tensor([draw.randint(-3, 9) for _ in range(2)])}
        sound, precise = judge(expression, size, tensors)
        exact += precise
        if not sound:
            print(f"NOT SOUND at size {size}: {expression} with {tensors}")
            return 1
    result = {
        "cases": done,
        "unsound": 0,
        "exact": exact,
        "seed": arguments.seed,
        "seconds": round(time.perf_counter() - start, 1),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": arguments.commit,
        "command": f"python benchmarks/soundness.py --cases {arguments.cases} --seed {arguments.seed}",
    }
    print(json.dumps(result))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
