"""A layer with SPARSEK attention in a small language model: training on recall, and what the selection does meanwhile.

Run it with ``python tutorials/4_a_layer.py``; it needs no GPU and takes about 10 seconds.
"""

import torch
from torch import Tensor, nn

from flexsparse.nn import SparseKAttention


def heading(title: str) -> None:
    print(f"\n=== {title}")


torch.manual_seed(0)
# On tensors as small as these a second thread costs more than it gives.
torch.set_num_threads(1)

# 1. Each query sees a window of 8 keys and 8 selected keys before it: 16 of 96. A block is written as ever.
heading("a model of two layers")
DIM, LENGTH, WINDOW, K = 64, 96, 8, 8
FACTS, FILLERS = 8, 16
ASK = FACTS + FILLERS


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before_attention, self.before_mlp = nn.RMSNorm(DIM), nn.RMSNorm(DIM)
        self.attention = SparseKAttention(DIM, heads=4, kv_heads=2, k=K, window=WINDOW, backend="chunked")
        self.mlp = nn.Sequential(nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, DIM))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.before_attention(x))
        return x + self.mlp(self.before_mlp(x))


model = nn.Sequential(nn.Embedding(ASK + 1, DIM), Block(), Block(), nn.Linear(DIM, FACTS))
first = model[1]
print(first.attention)

# 2. The task: facts are rare among fillers, and wherever ASK stands the model must name the latest fact. Through two
#    layers the window and the newest candidates reach 2 * (WINDOW + K) tokens back; further away a fact is
#    forgotten, unless the scorer has learned to keep it.
heading("the task")


def draw(rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens, the answer at every position, where it is asked for, and how far back it stands: [rows, LENGTH] each."""
    place, at = torch.rand(rows, LENGTH), torch.arange(LENGTH)
    is_fact = (place < 0.02) | (at == 0)
    asked = (place > 0.85) & ~is_fact
    tokens = torch.randint(FACTS, ASK, (rows, LENGTH)).masked_fill(asked, ASK)
    tokens = torch.where(is_fact, torch.randint(0, FACTS, (rows, LENGTH)), tokens)
    latest = torch.where(is_fact, at, 0).cummax(1).values
    return tokens, tokens.gather(1, latest), asked, at - latest


def shown(token: int) -> str:
    return "?" if token == ASK else str(token) if token < FACTS else "."


print("".join(shown(token) for token in draw(1)[0][0].tolist()))


@torch.no_grad()
def judge() -> tuple[float, float]:
    """The share of right answers to near and to far facts."""
    tokens, answers, asked, distance = draw(64)
    right = model(tokens).argmax(-1) == answers
    far = distance > 2 * (WINDOW + K)
    return right[asked & ~far].float().mean().item(), right[asked & far].float().mean().item()


# 3. The selection can be looked at without running the attention. At the start it is a sliding window in disguise:
#    contents differ little, the slope prefers what is new, and every new key evicts one (a turnover of 1).
heading("the selection before training")
inputs = first.before_attention(model[0](draw(16)[0]))
print(first.attention.diagnose(inputs))

# 4. Training needs nothing special. Facts asked for while they are still selected teach the scorer to keep them.
heading("training")
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
losses = []
for step in range(100):
    tokens, answers, asked, _ = draw(8)
    loss = nn.functional.cross_entropy(model(tokens)[asked], answers[asked])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
    if step % 20 == 19:
        print(f"step {step + 1:3d}: loss {sum(losses[-10:]) / 10:.2f}")
near, far = judge()
print(f"right answers: {near:.0%} of near facts, {far:.0%} of those beyond {2 * (WINDOW + K)} tokens")
assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
assert far > 0.5, "guessing gives an eighth"

# 5. Now contents spread over more of a gate, and fewer newcomers evict a key. A head whose spread stays below 0.001 is
#    reported as dead; a saturated share near 1 means that the gates pass hardly any gradient.
heading("the selection after training")
inputs = first.before_attention(model[0](draw(16)[0]))
found = first.attention.diagnose(inputs)
print(found)
assert float(found.turnover.max()) < 1
content = first.attention.scorer.content(first.before_attention(model[0].weight.unsqueeze(0)))[0].mean(0)
print(f"mean score of a fact {content[:FACTS].mean().item():+.2f}, of a filler {content[FACTS:ASK].mean().item():+.2f}")

# 6. Packed documents: the selection restarts with each, the attention stays inside, and so may the positions.
heading("packed documents")
packed = SparseKAttention(
    DIM, heads=4, k=K, window=WINDOW, segments="doc", pattern="document", learnable_slope=True, backend="chunked"
)
doc = torch.arange(LENGTH) // 40
x = torch.randn(1, LENGTH, DIM)
out = packed(x, doc=doc, positions=torch.arange(LENGTH) % 40)
alone = packed(x[:, :40], doc=doc[:40])
print("the first document is as if alone:", bool((out[:, :40] - alone).abs().max() < 1e-5))
print("its parameters:", ", ".join(packed.state_dict()))
