"""Are tile classes sound, and how often exact? Random masks against their elements, for as long as you like.

    python benchmarks/soundness.py --cases 100000 --seed 0 --out benchmarks/results/soundness.json

A case is drawn from the seed and its number alone, so a run may stop (--seconds) and another continue: cases that the
file has already are not run again, and each run is listed with its cases and its commit.

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


def case(seed: int, number: int) -> tuple[Any, int, dict[str, torch.Tensor]]:
    """An expression, a size and tensors, drawn from the seed and the number of the case."""
    draw = random.Random(f"{seed}/{number}")
    size = draw.choice((1, 7, 8, 17, 30))
    expression = mask(draw, draw.randint(0, 3))
    ids = torch.tensor([sorted(draw.randint(0, 4) for _ in range(size)) for _ in range(2)])
    if draw.random() < 0.3:
        ids = ids[:, torch.tensor(draw.sample(range(size), size))]
    return expression, size, {"doc": ids, "table": torch.tensor([draw.randint(-3, 9) for _ in range(2)])}


def run(seed: int, numbers: range, seconds: float) -> dict[str, Any]:
    """What the cases of these numbers gave, as many as fit into the time. Raises AssertionError for an unsound one."""
    start, exact, done = time.perf_counter(), 0, 0
    for number in numbers:
        if time.perf_counter() - start > seconds:
            break
        expression, size, tensors = case(seed, number)
        sound, precise = judge(expression, size, tensors)
        if not sound:
            raise AssertionError(f"case {number} is NOT SOUND at size {size}: {expression} with {tensors}")
        exact, done = exact + precise, done + 1
    return {"first": numbers.start, "cases": done, "exact": exact, "seconds": round(time.perf_counter() - start, 1)}


def summary(seed: int, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The runs with their sums; an unsound case would have ended its run without a result."""
    cases, exact = (sum(r[name] for r in runs) for name in ("cases", "exact"))
    return {
        **{"cases": cases, "unsound": 0, "exact": exact, "inexact": cases - exact, "seed": seed},
        **{"torch": torch.__version__, "python": platform.python_version()},
        "command": f"python benchmarks/soundness.py --cases {cases} --seed {seed}",
        "runs": runs,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=2000, help="how many there shall be, with those of the file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after this long")
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--out", type=pathlib.Path, help="a file of results, continued if it is there")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    runs: list[dict[str, Any]] = []
    if arguments.out and arguments.out.exists():
        known = json.loads(arguments.out.read_text())
        if known["seed"] != arguments.seed:
            parser.error(f"{arguments.out} has cases of seed {known['seed']}")
        runs = known["runs"]
    first = sum(r["cases"] for r in runs)
    runs.append({**run(arguments.seed, range(first, arguments.cases), arguments.seconds), "commit": arguments.commit})
    result = summary(arguments.seed, runs)
    print(json.dumps(result))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
