"""The functions that every module of kernels begins with, as text."""

from __future__ import annotations

from flexsparse.codegen.kernels.record_layout import KEY_BITS

HELPERS = f"""
LOG2E = tl.constexpr(1.4426950408889634)
# A slot's record has its key in so many bits, and above them for how many queries of the chunk it stays.
KEY_BITS = tl.constexpr({KEY_BITS})
KEY_MASK = tl.constexpr({(1 << KEY_BITS) - 1})
# A row is measured against its highest score so far, or one that is less by no more than this; float32 has no slack.
SLACK = tl.constexpr(5.0)
# Where rows keep their level, sums between these; beyond them scores are too far from it.
LEAST = tl.constexpr({2.0**-60})
MOST = tl.constexpr({2.0**60})
# Marks of chunks that are read together.
MARKS = tl.constexpr(64)
"""
HELPERS += '''

def multiplies(count):
    """PTX that multiplies ``count`` numbers of each thread in place, unless all factors of a warp are 1."""
    least = [f"${2 * count + i}" for i in range(count)]
    lines = [".reg .pred differs;", f".reg .f32 least<{count}>;"]
    while len(least) > 1:
        half = [f"least{len(least) // 2 + i}" for i in range(len(least) // 2)]
        lines += [f"min.f32 {x}, {a}, {b};" for x, a, b in zip(half, least[::2], least[1::2])]
        least = half
    lines += [f"setp.neu.f32 differs, {least[0]}, 0f3F800000;", "vote.sync.any.pred differs, differs, 0xffffffff;"]
    lines += ["@!differs bra.uni done;", *(f"mul.f32 ${i}, ${i}, ${2 * count + i};" for i in range(count)), "done:"]
    return "{ " + " ".join(lines) + " }"


def operands(count):
    return ",".join(["=f"] * count + [str(i) for i in range(count)] + ["f"] * count)


MULTIPLIES_32, OPERANDS_32 = tl.constexpr(multiplies(32)), tl.constexpr(operands(32))
MULTIPLIES_64, OPERANDS_64 = tl.constexpr(multiplies(64)), tl.constexpr(operands(64))


def hides(count, of):
    """PTX for ``of`` times ``count`` numbers: 0 where their key is gone, unless all keys of a warp stay to the end."""
    least = [f"${(2 * of + 1) * count + i}" for i in range(count)]
    lines = [".reg .pred goes;", f".reg .s32 least<{count}>;"]
    while len(least) > 1:
        half = [f"least{len(least) // 2 + i}" for i in range(len(least) // 2)]
        lines += [f"min.s32 {x}, {a}, {b};" for x, a, b in zip(half, least[::2], least[1::2])]
        least = half
    lines += [f"setp.lt.s32 goes, {least[0]}, ${(2 * of + 2) * count};"]
    lines += ["vote.sync.any.pred goes, goes, 0xffffffff;", "@!goes bra.uni done;"]
    for i in range(count):
        lines.append(f"setp.ge.s32 goes, ${2 * of * count + i}, ${(2 * of + 1) * count + i};")
        lines += [f"selp.f32 ${i + n * count}, 0f00000000, ${i + n * count}, goes;" for n in range(of)]
    return "{ " + " ".join([*lines, "done:"]) + " }"


def seen_by(count, of):
    return ",".join(["=f"] * of * count + [str(i) for i in range(of * count)] + ["r"] * 3 * count)


HIDES, SEEN_BY = tl.constexpr(hides(16, 1)), tl.constexpr(seen_by(16, 1))
HIDES_3, SEEN_BY_3 = tl.constexpr(hides(16, 3)), tl.constexpr(seen_by(16, 3))


@triton.jit
def floordiv(a, b):
    """Division that rounds down, as Python's."""
    whole = a // b
    return tl.where((a % b != 0) & ((a < 0) != (b < 0)), whole - 1, whole)


@triton.jit
def floormod(a, b):
    return a - floordiv(a, b) * b


@triton.jit
def tanh(x, PRECISION: tl.constexpr):
    found = 2.0 * tl.sigmoid(2.0 * x) - 1.0
    if PRECISION == "ieee":
        # That difference has an error of 1e-7, which is much of a small number; a polynomial, fitted to tanh, has not.
        z = x * x
        rest = ((-0.0057896917 * z + 0.020771945) * z - 0.05380028) * z + 0.13332416
        found = tl.where(z < 0.45, x + x * z * (rest * z - 0.33333325), found)
    return found


@triton.jit
def clipped(x, least):
    """x in [least, 1], NaN where it is NaN."""
    return tl.maximum(tl.minimum(x, 1.0, tl.PropagateNan.ALL), least, tl.PropagateNan.ALL)


@triton.jit
def saturated(x, least):
    """x in [least, 1], a number even where it is none. What is between 0 and 1 costs a sum nothing."""
    return tl.maximum(tl.minimum(tl.maximum(x, 0.0), 1.0), least)


@triton.jit
def exp_above(score, level, PRECISION: tl.constexpr):
    """exp(score - level)"""
    if PRECISION == "ieee":
        # A product with level is rounded: the larger the scores, the more each row would be off, in float32 visibly.
        x = (score - level) * LOG2E
    else:
        # One operation a pair.
        x = score * LOG2E - level * LOG2E
    return tl.exp2(x)


@triton.jit
def raised(top, highest, PRECISION: tl.constexpr):
    """What rows are measured against once their highest new score is known."""
    if PRECISION == "ieee":
        # The less a score is below the level, the more exact is its exponential.
        higher = tl.maximum(top, highest)
    else:
        higher = tl.where(highest > top + SLACK, highest, top)
    return higher


@triton.jit
def scaled(x, by, THREADS: tl.constexpr):
    """x * by for factors that mostly are 1: of so many THREADS, those of a warp pass it by where all are."""
    each: tl.constexpr = x.shape[0] * x.shape[1] // THREADS if THREADS != 0 else 0
    if each < 32:
        x = x * by
    elif each == 32:
        x, by = tl.broadcast(x, by)
        x = tl.inline_asm_elementwise(MULTIPLIES_32, OPERANDS_32, [x, by], dtype=tl.float32, is_pure=True, pack=32)
    else:
        x, by = tl.broadcast(x, by)
        x = tl.inline_asm_elementwise(MULTIPLIES_64, OPERANDS_64, [x, by], dtype=tl.float32, is_pure=True, pack=64)
    return x


@triton.jit
def staying(p, q, gone, end, THREADS: tl.constexpr):
    """p where q < gone, 0 elsewhere. All q are before ``end``; most keys go no sooner, which a warp finds out first."""
    each: tl.constexpr = p.shape[0] * p.shape[1] // THREADS if THREADS != 0 else 0
    if each < 16:
        p = tl.where(q < gone, p, 0.0)
    else:
        p, q = tl.broadcast(p, q)
        p, gone = tl.broadcast(p, gone)
        end = tl.full(p.shape, end, tl.int32)
        p = tl.inline_asm_elementwise(HIDES, SEEN_BY, [p, q, gone, end], dtype=tl.float32, is_pure=True, pack=16)
    return p


@triton.jit
def staying_3(x, y, z, q, gone, end, THREADS: tl.constexpr):
    """As ``staying``, of three at once."""
    each: tl.constexpr = x.shape[0] * x.shape[1] // THREADS if THREADS != 0 else 0
    if each < 16:
        visible = q < gone
        x, y, z = tl.where(visible, x, 0.0), tl.where(visible, y, 0.0), tl.where(visible, z, 0.0)
    else:
        x, q = tl.broadcast(x, q)
        x, gone = tl.broadcast(x, gone)
        end = tl.full(x.shape, end, tl.int32)
        x, y, z = tl.inline_asm_elementwise(
            HIDES_3, SEEN_BY_3, [x, y, z, q, gone, end], (tl.float32, tl.float32, tl.float32), is_pure=True, pack=16
        )
    return x, y, z


@triton.jit
def part_sums(x):
    """Sums along the rows of x [M, N] in four parts, [M, 4]. Tensor cores leave what a part adds up in one thread."""
    return tl.sum(tl.sum(tl.reshape(x, [x.shape[0], x.shape[1] // 8, 4, 2]), 3), 1)


@triton.jit
def for_parts(by, x):
    """by [M] for each part of x's rows, [M, 4]. That all that it takes the greatest of is equal, the compiler sees."""
    same = tl.reshape(tl.broadcast_to(by[:, None], x.shape), [x.shape[0], x.shape[1] // 8, 4, 2])
    return tl.max(tl.max(same, 3), 1)


@triton.jit
def rows_of(p_base, index, stride, feature, SIZE: tl.constexpr, PADDED: tl.constexpr, WIDE: tl.constexpr):
    """Rows by index, [len(index), PADDED]; WIDE where they lie more than 2^31 numbers apart."""
    if WIDE:
        index = index.to(tl.int64)
    at = p_base + index[:, None] * stride + feature[None, :]
    if SIZE == PADDED:
        found = tl.load(at)
    else:
        found = tl.load(at, mask=feature[None, :] < SIZE, other=0.0)
    return found


@triton.jit
def put_rows(p_base, index, stride, feature, x, m_row, SIZE: tl.constexpr):
    at = p_base + index.to(tl.int64)[:, None] * stride + feature[None, :]
    tl.store(at, x.to(p_base.dtype.element_ty), mask=m_row[:, None] & (feature[None, :] < SIZE))
'''
