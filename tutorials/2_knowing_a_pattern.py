"""What the compiler knows of a pattern: its tiles, its block mask, proofs, and your own FlexAttention code as input.

Run it with ``python tutorials/2_knowing_a_pattern.py``; it needs no GPU and takes a few seconds.
"""

import time

import torch

import flexsparse as fs


def heading(title: str) -> None:
    print(f"\n=== {title}")


# 1. A block mask says which tiles of queries x keys are empty, partial or full. It is solved from the expression,
#    so a million tokens are no more trouble than a thousand.
heading("a block mask of a million tokens")
fs.block_mask("causal", 256)  # The first one loads torch's FlexAttention.
length = 1 << 20
start = time.perf_counter()
mask = fs.block_mask("causal & (sliding_window(1024) | sinks(4))", length)
print(f"{length:,} tokens in {(time.perf_counter() - start) * 1e3:.0f} ms, {mask.kv_indices.shape[-1]} key tiles a row")

# 2. Captured tensors take part. Packed documents are a band whose edges come from the tensor.
heading("packed documents")
doc = torch.arange(65536) // 1000
mask = fs.block_mask("document & causal", 65536, doc=doc)
print(f"{mask.sparsity():.1f} % of the tiles are empty")

# 3. The result is torch's own BlockMask: use it with plain flex_attention, together with the pattern's functions.
heading("functions for plain flex_attention")
pattern = fs.parse("(document & causal) + alibi")
assert isinstance(pattern, fs.language.Pattern)
mask_mod, score_mod = pattern.to_flex(heads=8, q_len=65536, doc=doc)
print(mask_mod.__name__, score_mod.__name__)

# 4. Existing code comes in unchanged, closures and all.
heading("your own mask_mod")
boundary = torch.tensor(100)


def mine(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
    near = (q - kv).abs() < 64
    return torch.where(q < boundary, q >= kv, near & (q >= kv))


traced = fs.from_flex(mask_mod=mine)
print(fs.compile(traced).ir)
print("causal:", fs.is_causal(traced))

# 5. Questions have answers with reasons. Where bounds and small sizes do not decide, z3 does, for every
#    size (`pip install flexsparse[proofs]`; without it the answer is None, and says so).
heading("questions")
for question, verdict in {
    "causal & window == window": fs.equivalent("causal & sliding_window(8)", "sliding_window(8)"),
    "window(8) == window(9)": fs.equivalent("sliding_window(8)", "sliding_window(9)"),
    "dilated within window": fs.implies("dilated_window(5, 3)", "sliding_window(15)"),
}.items():
    print(f"{question}: {verdict.holds} ({verdict.reason})")

# 6. Lengths are data. One compiled pattern serves them all, and the plan says what each would cost.
heading("across lengths")
attention = fs.compile("causal & sliding_window(1024)")
for tokens in (4096, 65536, 1 << 20):
    plan = attention.explain(hardware="H200", q_len=tokens, head_dim=128, heads=16, device="cuda")
    assert plan.plan.tiles is not None
    print(f"{tokens:>9,} tokens: {plan.plan.tiles.density:8.3%} of the tiles, {plan.cost}")
