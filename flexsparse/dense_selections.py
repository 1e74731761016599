"""What the oracle knows of selections: gates by sorting every prefix, scores of blocks, walks of trees. No lowering."""

from __future__ import annotations

import torch
from torch import Tensor


def block_scores(score: str, query: Tensor, keys: Tensor) -> Tensor:
    """How a block of keys [B, H, n, D] scores for each query [B, H, S_q, D]: [B, H, S_q]."""
    if score == "mean":
        return (query * keys.mean(2, keepdim=True)).sum(-1)
    ends = (query * keys.amin(2, keepdim=True), query * keys.amax(2, keepdim=True))
    return torch.maximum(*ends).sum(-1)


def sorted_gates(z: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """SPARSEK gates along the last dimension and tau, by sorting; exact gradients from autograd. z float64."""
    with torch.no_grad():
        count = (z > -torch.inf).sum(-1, keepdim=True)
        infinite = z == torch.inf
        budget = k - infinite.sum(-1, keepdim=True)
        finite = torch.isfinite(z)
        safe = torch.where(finite, z, 0.0)
        events = torch.cat((safe, safe - 1), -1)
        sign = torch.cat((finite.double(), -finite.double()), -1)
        events, order = torch.where(sign != 0, events, -torch.inf).sort(dim=-1, descending=True)
        sign = sign.gather(-1, order)
        heights = torch.where(torch.isfinite(events), events, 0.0)
        # Sums relative to the largest event keep their digits.
        relative = heights - heights[..., :1]
        sums, moments = sign.cumsum(-1), (sign * relative).cumsum(-1)
        reached = moments - sums * relative
        # Rounding of a sum must not decide whether a kink is met; whole numbers and 1e-9 alone would add in float32.
        inside = (reached <= budget.double() + 1e-9) & (sign != 0)
        last = inside.sum(-1, keepdim=True) - 1
        weight, moment = sums.gather(-1, last.clamp(min=0)), moments.gather(-1, last.clamp(min=0))
        tau = (moment - budget) / weight.clamp(min=1) + heights[..., :1]
        upper = heights.gather(-1, last.clamp(min=0))
        tau = torch.where((tau - upper).abs() < 1e-12, upper, tau)
        everything = (count <= k) | (weight == 0)
        unsaturated = finite & (safe > tau + 1e-12) & (safe - 1 < tau - 1e-12) & ~everything & (last >= 0)
        saturated = finite & ~unsaturated & ((safe - 1 >= tau - 1e-12) | everything) & (everything | (last >= 0))
        first = infinite & (infinite.cumsum(-1) <= k)
        n = unsaturated.sum(-1, keepdim=True).clamp(min=1)
        whole = (saturated.sum(-1, keepdim=True) + infinite.sum(-1, keepdim=True)).double()
    free = torch.where(unsaturated, finite_scores(z), 0.0)
    exact_tau = (free.sum(-1, keepdim=True) - (k - whole)) / n
    gates = torch.where(unsaturated, finite_scores(z) - exact_tau, (saturated | first).double())
    # Where no gate is strictly between 0 and 1, tau is constant.
    moving = unsaturated.any(-1, keepdim=True)
    tau = torch.where(moving, exact_tau, tau.masked_fill(everything, -torch.inf).masked_fill(last < 0, torch.inf))
    return torch.where(torch.isnan(z).any(-1, keepdim=True), torch.nan, gates), tau


def capped_gates(z: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Gates min(1, exp(z - tau)) that sum to k along the last dimension, and tau; differentiable. z float64."""
    finite, infinite = torch.isfinite(z), z == torch.inf
    with torch.no_grad():
        budget = k - infinite.sum(-1, keepdim=True)
        falling, order = torch.where(finite, z, -torch.inf).sort(dim=-1, descending=True, stable=True)
        tails = torch.nn.functional.pad(falling.flip(-1).logcumsumexp(-1).flip(-1)[..., 1:], (0, 1), value=-torch.inf)
        place = torch.arange(1, z.shape[-1] + 1, device=z.device)
        # With tau at a capped key's score, those above, itself and the rest fit the budget, with room for the rest.
        rest = torch.where(torch.isfinite(falling), tails - finite_scores(falling), torch.inf).exp()
        fits = (place < budget) & (place + rest <= budget)
        capped = torch.zeros_like(finite).scatter_(-1, order, fits)
        everything = (finite | infinite).sum(-1, keepdim=True) <= k
        nothing = (budget <= 0) & ~everything
        free = finite & ~capped & ~everything & ~nothing
        room = (budget - capped.sum(-1, keepdim=True)).clamp(min=1).double().log()
        top = torch.where(free, z, -torch.inf).amax(-1, keepdim=True)
        top = finite_scores(top)
    total = torch.where(free, torch.where(free, z - top, 0.0).exp(), 0.0).sum(-1, keepdim=True)
    tau = torch.where(total > 0, top + torch.where(total > 0, total, 1.0).log() - room, 0.0)
    whole = (finite & (everything | (capped & ~nothing))) | (infinite & (infinite.cumsum(-1) <= k))
    soft = torch.where(free, torch.where(free, z - tau, 0.0).clamp(max=0).exp(), whole.double())
    return torch.where(torch.isnan(z).any(-1, keepdim=True), torch.nan, soft), tau


def finite_scores(z: Tensor) -> Tensor:
    """The scores with 0 for infinities, whose gradient is 0."""
    return torch.where(torch.isfinite(z), z, 0.0)


def walk(parents: Tensor) -> Tensor:
    """Where a depth-first walk of a tree enters and leaves each token: [S] -> [2, S]."""
    given = parents.tolist()
    times = [[0] * len(given), [0] * len(given)]
    clock = 0

    def visit(token: int) -> None:
        nonlocal clock
        times[0][token] = clock
        clock += 1
        for child, parent in enumerate(given):
            if parent == token:
                visit(child)
        times[1][token] = clock

    for root, parent in enumerate(given):
        if parent < 0:
            visit(root)
    return torch.tensor(times, device=parents.device)
