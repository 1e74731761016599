"""The differentiable top-k by itself: gates, the thresholds of every prefix, lifetimes, slots, and gradients.

Run it with ``python tutorials/3_selection_operators.py``; it needs no GPU and takes a few seconds.
"""

import torch

from flexsparse.ops import causal_select, causal_sparsek, dense_gates, gates, slot_table, sparsek


def heading(title: str) -> None:
    print(f"\n=== {title}")


# 1. SPARSEK of one row: gates between 0 and 1 that sum to k. Far scores are cut off, near ones share.
heading("gates of one row")
scores = torch.tensor([2.0, 0.1, 1.5, 1.4, -1.0])
print("k = 2:", sparsek(scores, 2).tolist())
print("k = 1 is sparsemax:", sparsek(scores, 1).tolist())

# 2. In causal attention every query has a prefix of its own, and so a threshold of its own: all of them in one call.
#    Adding keys can only raise the bar, so thresholds never fall.
heading("the threshold of every prefix")
torch.manual_seed(0)
u = torch.randn(12)
tau, candidates = causal_sparsek(u, k=3)
print("tau       ", [round(t, 2) for t in tau.tolist()])
print("candidates", candidates.tolist())
print("never falls:", bool((tau[1:] >= tau[:-1]).all()))

# 3. So a key that leaves the k best never comes back. It is selected from its birth to its death, in one slot, and k
#    slots are all that generation needs.
heading("lifetimes and slots")
thresholds, selection = causal_select(u, k=3)
for key, (birth, death, slot) in enumerate(zip(*(x.tolist() for x in selection), strict=True)):
    life = "never selected" if slot < 0 else f"slot {slot}"
    print(f"key {key:2d}  {' ' * birth}{'#' * (death - birth)}{' ' * (12 - max(birth, death))}  {life}")
print("what every fourth query finds in the slots:", slot_table(selection, k=3, chunk=4).tolist())

# 4. The hard selection lies inside the soft support: every selected key has a gate above 0.
heading("gates of the selected keys")
dense = dense_gates(u, tau)
query = torch.tensor([11, 11, 11])
alive = torch.tensor([j for j in range(12) if selection.birth[j] <= 11 < selection.death[j]])
chosen = gates(u, tau, query, alive)
print(dict(zip(alive.tolist(), [round(g, 2) for g in chosen.tolist()], strict=True)))
print("the same in the dense form:", bool((dense[11, alive] == chosen).all()))

# 5. Thresholds have gradients, so scores can be learned: here the wish that keys 2 and 5 be selected at the end. Scores
#    start close together, so that every key is in the soft support: outside of it there is no gradient.
heading("learning what to keep")
learned = (0.1 * u).requires_grad_()
optimizer = torch.optim.SGD([learned], lr=0.3)
for _ in range(40):
    wanted = gates(learned, causal_sparsek(learned, k=3).tau, torch.tensor([11, 11]), torch.tensor([2, 5]))
    optimizer.zero_grad()
    (-wanted.sum()).backward()
    optimizer.step()
print("gates of 2 and 5:", [round(g, 2) for g in wanted.tolist()])
assert float(wanted.detach().min()) > 0.9

# 6. Packed documents restart the prefix, and `after` keeps the newest keys out, for a sliding window to cover.
heading("documents, and a window beside the selection")
document = torch.tensor([0] * 5 + [1] * 7)
print("candidates", causal_sparsek(u, k=3, after=2, segments=document).candidates.tolist())
