"""What a selection does on an input, from thresholds and lifetimes alone: O(S log S), and no S x S work."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flexsparse.ir.nodes import SelectionNode
from flexsparse.ops import causal_select
from flexsparse.ops.causal import ranges_of
from flexsparse.ops.projection import on_grid
from flexsparse.ops.range_search import first_true

# Contents closer than this move no gate by more than a thousandth.
DEAD_SPREAD = 1e-3


@dataclass(frozen=True)
class SelectionDiagnostics:
    """One number for each KV head, over all rows of the input; tensors [kv_heads] without a graph.

    ``support``: the mean number of candidates j with ``u_j > tau_i``, over queries i that have candidates. Far above
    k the gates are thin; near k the gradient reaches few keys beyond the selected ones.
    ``saturated``: the share of the pairs (query, selected key) whose gate is 1, through which "kv", "k", "v", "logit"
    and "ste" pass no gradient. Where a query has at most k candidates all gates are 1.
    ``turnover``: the share of the queries with more than k candidates at which a selected key is evicted for the new
    candidate. 1 is a sliding window in disguise, 0 a selection that has frozen.
    ``spread``: the standard deviation of the scores' content (without the slope) along a row, the root of its mean
    square over rows, in units of one gate.
    ``dead``: whether the spread is below 0.001 (bool). Such a head selects by position alone.
    A share or mean of nothing is 0.
    """

    support: Tensor
    saturated: Tensor
    turnover: Tensor
    spread: Tensor
    dead: Tensor


@torch.no_grad()
def diagnose(
    u: Tensor, content: Tensor, selection: SelectionNode, segments: Tensor | None, lengths: Tensor | None = None
) -> SelectionDiagnostics:
    """The diagnostics of scores u [B, kv_heads, S], of which ``content`` is u without the slope.

    ``segments`` [S] or [B, S] are the ids that the selection names. ``lengths`` [B], integers in u's device, are how
    many positions of each row count: no query and no key stands behind them. Raises what
    ``flexsparse.ops.causal_select`` does.
    """
    ends = torch.full(u.shape[:1], u.shape[2], device=u.device) if lengths is None else lengths
    real = torch.arange(u.shape[2], device=u.device) < ends[:, None, None]
    u = u.masked_fill(~real, -torch.inf)
    ids = segments.unsqueeze(1) if segments is not None and segments.dim() == 2 else segments
    thresholds, lifetimes = causal_select(u, selection.k, selection.after, ids)
    flat, tau = u.flatten(0, 1).double(), thresholds.tau.flatten(0, 1)
    rows = None if ids is None else ids.expand(u.shape).flatten(0, 1)
    ranges = ranges_of(flat, selection.after, rows)
    last = ends[:, None, None].expand(*u.shape[:2], 1).flatten(0, 1)
    # What happens behind a row's end happens to nobody.
    birth, death = (torch.minimum(x.flatten(0, 1).long(), last) for x in (lifetimes.birth, lifetimes.death))
    stop = torch.minimum(ranges.end, last)
    # Kinks lie on the grid on which thresholds are found: rounded as they are, what meets there meets here.
    finite = torch.isfinite(flat)
    grid = on_grid(flat, finite)
    outside, full = (
        torch.where(finite, grid.to_scores(values), flat).to(tau.dtype)
        for values in (grid.values, grid.values - grid.unit)
    )
    # Thresholds never fall along a segment: a key leaves the support, and its gate leaves 1, once.
    leaves = first_true(tau, birth, stop, outside, strict=False)
    loosens = first_true(tau, birth, stop, full, strict=True)
    selected = death - birth
    candidates = (thresholds.candidates * real).flatten(0, 1)

    def total(counts: Tensor) -> Tensor:
        return counts.reshape(u.shape).sum((0, 2), dtype=torch.float64)

    def share(part: Tensor, whole: Tensor) -> Tensor:
        return (total(part) / total(whole).clamp(min=1)).float()

    evicted = (selected > 0) & (death < stop)
    spread = _spread(content.double(), real)
    return SelectionDiagnostics(
        support=share(leaves - birth, candidates > 0),
        saturated=share(torch.minimum(loosens, death) - birth, selected),
        turnover=share(evicted, candidates > selection.k),
        spread=spread,
        dead=spread < DEAD_SPREAD,
    )


def _spread(content: Tensor, real: Tensor) -> Tensor:
    """The root of the variance along a row, averaged over the rows that have any position: [kv_heads]."""
    count = real.sum(-1, keepdim=True)
    some = count.clamp(min=1)
    mean = content.masked_fill(~real, 0.0).sum(-1, keepdim=True) / some
    variance = (content - mean).square().masked_fill(~real, 0.0).sum(-1, keepdim=True) / some
    return (variance.sum((0, 2)) / (count > 0).sum().clamp(min=1)).sqrt().float()
