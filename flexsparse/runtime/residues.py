"""FlexAttention by residue class: positions reordered so that the keys of a query's own class are its neighbours."""

from __future__ import annotations

import torch
from torch import Tensor

from flexsparse.codegen.block_mask import block_lists
from flexsparse.runtime.chunked import Work
from flexsparse.runtime.flex import Launchers
from flexsparse.runtime.launcher import Launcher, mark_dynamic


def by_class(x: Tensor, modulus: int) -> Tensor:
    """[B * modulus, H, S / modulus, D] from [B, H, S, D]: row b * modulus + c has the positions c, c + modulus, ..."""
    return x.unflatten(2, (-1, modulus)).permute(0, 3, 1, 2, 4).flatten(0, 1).contiguous()


def in_order(x: Tensor, modulus: int) -> Tensor:
    """[B, H, S, ...] from what ``by_class`` makes of it, with any dimensions after the third."""
    return x.unflatten(0, (-1, modulus)).movedim(1, 3).flatten(2, 3)


def attend_residues(
    modulus: int,
    within: Work,
    rest: Work | None,
    launchers: Launchers,
    operands: tuple[Tensor, Tensor, Tensor],
    tensors: tuple[tuple[Tensor, ...], tuple[Tensor, ...]],
    *,
    needs_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """out and, if needed, lse without a sink. ``tensors`` are those of ``within`` and of ``rest``."""
    query, key, value = (by_class(x, modulus) for x in operands)
    wanted = needs_lse or rest is not None
    out, lse = _attend(within, launchers.plain, (query, key, value), tensors[0], wanted)
    out = in_order(out, modulus)
    if lse is None:
        return out, lse
    lse = in_order(lse, modulus)
    if rest is None:
        return out, lse
    other, other_lse = _attend(rest, launchers.rest, operands, tensors[1], True)
    assert other_lse is not None
    return merged(out, lse, other, other_lse)


def _attend(
    work: Work, launcher: Launcher, operands: tuple[Tensor, Tensor, Tensor], tensors: tuple[Tensor, ...], wanted: bool
) -> tuple[Tensor, Tensor | None]:
    dims = zip(tensors, work.sequence_dims, strict=True)
    functions = work.functions(tuple(mark_dynamic(t, d, launcher.settings) for t, d in dims), broadcast=False)
    mods = functions["mask_mod"], functions["score_mod"]
    return launcher(work.shapes, work.scale, operands, mods, block_lists(work.tiles), wanted)


def merged(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two sets of keys that share none, from that over each: out [..., D], lse [...].

    A row that sees no key in either set gives 0 and -inf, without a gradient.
    """
    top = torch.maximum(lse, other_lse).detach()
    empty = torch.isneginf(top)
    top = top.masked_fill(empty, 0.0)
    first, second = torch.exp(lse - top), torch.exp(other_lse - top)
    total = torch.where(empty, 1.0, first + second)
    summed = out.to(lse) * (first / total).unsqueeze(-1) + other.to(lse) * (second / total).unsqueeze(-1)
    return summed.to(out.dtype), torch.where(empty, -torch.inf, top + torch.log(total))
