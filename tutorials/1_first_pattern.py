"""From ``causal() & sliding_window(256)`` to a pattern of your own, seen at every stage.

Run it with ``python tutorials/1_first_pattern.py``; it needs no GPU and takes a few seconds.
"""

import torch

import flexsparse as fs
from flexsparse.language import b, captured, h, kv, q, score, where
from flexsparse.patterns import alibi, causal, sinks, sliding_window, softcap, sparsek


def heading(title: str) -> None:
    print(f"\n=== {title}")


# 1. A pattern is an expression over the indices b, h, q and kv. It prints as you would type it.
heading("a pattern")
local = causal() & sliding_window(256)
print(local)
assert fs.parse("causal & sliding_window(256)") == local, "the same text parses to an equal object"

# 2. Compiling it touches no device and no shape. What comes out is real Python source.
heading("its generated functions")
attention = fs.compile(local, backend="chunked")
print(attention.code("ir"))
print(attention.source)

# 3. Shapes give a plan: which backend runs, what else could, and how many tiles are computed.
heading("its plan for 4,096 tokens")
print(attention.explain(q_len=4096, head_dim=64, heads=8))

# 4. It is called like scaled_dot_product_attention, and trains, on CPU as on a GPU.
heading("a call")
torch.manual_seed(0)
batch, heads, kv_heads, length, head_dim = 1, 4, 2, 600, 32
query = torch.randn(batch, heads, length, head_dim, requires_grad=True)
key, value = (torch.randn(batch, kv_heads, length, head_dim, requires_grad=True) for _ in range(2))
out = attention(query, key, value)
out.square().mean().backward()
print("out", tuple(out.shape), "gradient of query", tuple(query.grad.shape))  # type: ignore[union-attr]

# 5. The dense oracle judges it: float64, element by element, sharing nothing with the compiler.
exact = fs.reference(local, query, key, value)
error = (out - exact).abs().max().item()
print(f"largest difference from the oracle: {error:.1e}")
assert error < 1e-5

# 6. Patterns compose. & and | combine masks, + adds to scores, and a selection brings its own scores.
heading("a composition")
hybrid = causal() & (sliding_window(128) | sinks(4) | sparsek(64, after=128)) + alibi()
print(hybrid)
scores = torch.randn(batch, kv_heads, length, requires_grad=True)
compiled = fs.compile(hybrid, backend="chunked")
out = compiled(query, key, value, scores=scores)
out.square().mean().backward()
print("the scores learn:", int((scores.grad != 0).sum()), "of", scores.numel(), "have a gradient")  # type: ignore[union-attr]

# 7. A pattern of your own. The decorator gives it a name, checked arguments and a printed form.
heading("a pattern of one's own")


@fs.pattern(examples=[{"window": 64, "stride": 32}])
def strided_glimpse(window: int, stride: int) -> fs.language.Pattern:
    """The window before each token, and every stride-th key of the whole past."""
    return (kv <= q) & ((q - kv < window) | (kv % stride == 0))


# A tensor that comes with the call is declared once, by name and dimensions.
speaker = captured("speaker", dims=("b", "s"))
mine = strided_glimpse(64, 32) & (speaker[b, q] == speaker[b, kv])
# Half of the heads look with capped scores: per-head choice is an ordinary expression in h.
mine = mine.score(where(h % 2 == 0, score, softcap(20.0)))
print(mine)
who = torch.arange(length).div(150, rounding_mode="floor")
own = fs.compile(mine, backend="chunked")
out = own(query, key, value, speaker=who)
exact = fs.reference(mine, query, key, value, speaker=who)
print(own.code("mask_mod"))
print(own.code("score_mod"))
print(f"largest difference from the oracle: {(out - exact).abs().max().item():.1e}")
assert (out - exact).abs().max().item() < 1e-5

# 8. Mistakes are answered with what came, what was expected, and the mend.
heading("a mistake")
try:
    0 <= q - kv < 64  # noqa: B015
except fs.FlexsparseError as error:
    print(error)
try:
    own(query, key, value)
except fs.FlexsparseError as error:
    print(error)
