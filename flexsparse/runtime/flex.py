"""FlexAttention: the block mask from classified tiles, one compiled launcher a pattern, and the gate on V.

A gate m on V is applied through two calls, over what the gates keep and over what they lose:
out = flex(s + log m) * Z(s + log m) / (Z(s + log m) + Z(s + log(1 - m))), with Z the sum that the softmax divides by.
Where no gate is below 1 the second call sees nothing and changes nothing: unlike flex(s + log m) * Z(s + log m) / Z(s),
whose two gradients of every key are large and cancel.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from flexsparse.codegen.block_mask import BlockLists, block_lists
from flexsparse.runtime.chunked import Work
from flexsparse.runtime.completion import completed, is_carried
from flexsparse.runtime.inputs import Shapes
from flexsparse.runtime.launcher import Launcher, mark_dynamic
from flexsparse.settings import Settings


class Launchers:
    """The compiled launchers of one pattern, each with its own builds.

    For its scores, for what a gate on V loses, and for pairs that are not of one residue class.
    """

    def __init__(self, name: str, settings: Settings, backend: str) -> None:
        self.plain = Launcher(f"attend_{name}", settings, backend)
        self.lost = Launcher(f"attend_lost_{name}", settings, backend)
        self.rest = Launcher(f"attend_rest_{name}", settings, backend)

    @property
    def builds(self) -> int:
        """How many kernels were built so far."""
        return sum(len(launcher.builds) for launcher in (self.plain, self.lost, self.rest))


def attend_flex(
    work: Work,
    launchers: Launchers,
    operands: tuple[Tensor, Tensor, Tensor],
    tensors: tuple[Tensor, ...],
    recomputed: tuple[bool, ...],
    *,
    needs_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """out and, if needed, lse. ``recomputed`` marks the tensors whose gradients are computed without atomics."""
    carried = is_carried(tensors, recomputed)
    outside = tuple(t.detach() if r else t for t, r in zip(tensors, recomputed, strict=True))
    inside = tuple(
        mark_dynamic(t, dims, launchers.plain.settings) for t, dims in zip(outside, work.sequence_dims, strict=True)
    )
    functions = work.functions(inside, broadcast=False)
    wanted = needs_lse or carried or work.sink
    out, lse = fused(launchers, work.shapes, work.scale, operands, functions, block_lists(work.tiles), wanted)
    if lse is None:
        return out, lse
    return completed(work, operands, tensors, recomputed, out, lse)


def fused(
    launchers: Launchers,
    shapes: Shapes,
    scale: float,
    operands: tuple[Tensor, Tensor, Tensor],
    functions: dict[str, Any],
    lists: BlockLists,
    needs_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """One call, or the two of a gate on V; lse where it is needed or at hand, without a sink."""
    common = (shapes, scale, operands)
    mask_mod = functions["mask_mod"]
    if functions["kept_score_mod"] is None:
        return launchers.plain(*common, (mask_mod, functions["score_mod"]), lists, needs_lse)
    kept, kept_lse = launchers.plain(*common, (mask_mod, functions["kept_score_mod"]), lists, True)
    _, lost_lse = launchers.lost(*common, (mask_mod, functions["lost_score_mod"]), lists, True)
    return _joined(kept, kept_lse, lost_lse, functions["gate_total"])


def _joined(kept: Tensor, kept_lse: Tensor | None, lost_lse: Tensor | None, total: float) -> tuple[Tensor, Tensor]:
    """out [B, H, S_q, D_v] and lse [B, H, S_q] from what the gates on V keep, and the rest up to ``total``."""
    assert kept_lse is not None
    assert lost_lse is not None
    empty = torch.isneginf(kept_lse)
    # The difference of two -inf is NaN; such rows are 0. Where nothing is lost the difference is +inf, the share 1.
    above = torch.where(empty, 0.0, kept_lse) - torch.where(empty, 0.0, lost_lse)
    out = (kept * (total * torch.sigmoid(above)).unsqueeze(-1)).to(kept.dtype)
    lse = kept_lse + torch.nn.functional.softplus(-above) - math.log(total)
    return out, torch.where(empty, -torch.inf, lse)
