"""Blocks: a window of three, the first block global, and ``random`` others for each block of queries, by a seed.

Query block i sees the blocks i - 1, i and i + 1, block 0, and block ``hash(i, r, seed) % blocks`` for r < random; all
see and are seen by block 0. The hash is integer arithmetic, so the pattern is the same on every device and run; two
draws may coincide. Zaheer et al., Big Bird, arXiv 2007.14062, which draws its random blocks without repetition.
"""

from flexsparse.language import Mask, at_least, kv, kv_len, pattern, q


@pattern(examples=[{"block": 16, "random": 2, "seed": 1}])
def bigbird(block: int, random: int, seed: int = 0) -> Mask:
    at_least(1, block=block)
    at_least(0, random=random, seed=seed)
    row, column, blocks = q // block, kv // block, (kv_len + block - 1) // block
    mask = (abs(row - column) <= 1) | (row == 0) | (column == 0)
    for draw in range(random):
        # Two rounds of a multiplicative congruential generator; the modulus keeps products below 2^31.
        state = (row % 46337 * 16807 + seed % 1009 * 97 + draw * 3571 + 1) % 46337
        mask = mask | (column == state * 16807 % 46337 % blocks)
    return mask
