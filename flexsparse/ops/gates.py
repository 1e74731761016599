"""The soft gates of causal selections, for chosen pairs of query and key or for all of them."""

from __future__ import annotations

import torch
from torch import Tensor

from flexsparse.errors import DtypeError, PatternArgumentError, ShapeError

FORMS = ("sparsek", "capped_softmax")


def gates(
    u: Tensor, tau: Tensor, query_index: Tensor, key_index: Tensor, *, form: str = "sparsek", validate: bool = True
) -> Tensor:
    """``clip(u[key_index] - tau[query_index], 0, 1)``, with gradients to u and tau; in tau's dtype.

    ``form="capped_softmax"`` has ``min(1, exp(u - tau))`` instead, for the tau of ``causal_capped_softmax``.

    u and tau [..., S]; the indices [..., N], integers, whose leading dimensions broadcast with theirs; a negative key
    index (an empty slot) has gate 0. Only gates strictly between 0 and 1 have a gradient. A key of -inf has gate 0 and
    one of +inf gate 1 under any finite or lower tau. The gate says nothing of whether the key is a candidate of the
    query. Raises ShapeError and DtypeError, and, unless ``validate=False`` (it costs a synchronisation on a GPU),
    PatternArgumentError for an index beyond S; for another form as well.
    """
    _check_form(form)
    _check_scores(u, tau)
    for name, index in (("query_index", query_index), ("key_index", key_index)):
        if not isinstance(index, Tensor) or index.dim() == 0:
            got = "a number" if isinstance(index, Tensor) else type(index).__name__
            raise ShapeError(name, got=got, expected="a tensor of positions [..., N]")
        if index.is_floating_point() or index.is_complex() or index.dtype is torch.bool:
            raise DtypeError(name, got=str(index.dtype), expected="integers")
    pair = f"shape {tuple(key_index.shape)} beside query_index {tuple(query_index.shape)}"
    try:
        query_index, key_index = torch.broadcast_tensors(query_index, key_index)
    except RuntimeError:
        raise ShapeError("key_index", got=pair, expected="shapes [..., N] that broadcast together") from None
    try:
        lead = torch.broadcast_shapes(u.shape[:-1], key_index.shape[:-1])
    except RuntimeError:
        expected = f"[..., N] whose leading dimensions broadcast with u's {tuple(u.shape[:-1])}"
        raise ShapeError("key_index", got=pair, expected=expected) from None
    if validate and not torch.compiler.is_compiling():
        _refuse_outside("query_index", query_index, 0, u.shape[-1])
        _refuse_outside("key_index", key_index, None, u.shape[-1])
    count = key_index.shape[-1]
    scores = u.to(tau.dtype).expand(*lead, u.shape[-1])
    keys = key_index.long().expand(*lead, count)
    at = scores.gather(-1, keys.clamp(min=0))
    threshold = tau.expand(*lead, tau.shape[-1]).gather(-1, query_index.long().expand(*lead, count))
    return torch.where(keys < 0, 0.0, _gate(at, threshold, form))


def _refuse_outside(name: str, index: Tensor, least: int | None, size: int) -> None:
    bad = index >= size if least is None else (index >= size) | (index < least)
    if bool(bad.any()):
        found = int(index[bad][0])
        expected = f"positions below {size}" if least is None else f"positions from {least} to {size - 1}"
        raise PatternArgumentError(name, got=str(found), expected=expected)


def _check_scores(u: Tensor, tau: Tensor) -> None:
    for name, scores in (("u", u), ("tau", tau)):
        if not isinstance(scores, Tensor):
            mend = "Take its .tau." if hasattr(scores, "tau") else ""
            raise DtypeError(name, got=type(scores).__name__, expected="a tensor", mend=mend)
        if not scores.is_floating_point():
            raise DtypeError(name, got=str(scores.dtype), expected="a tensor of real numbers")
        if scores.dim() == 0:
            raise ShapeError(name, got="a scalar", expected="[..., S]")
    if u.shape != tau.shape:
        raise ShapeError("tau", got=f"shape {tuple(tau.shape)}", expected=f"u's shape, {tuple(u.shape)}")


def _check_form(form: str) -> None:
    if form not in FORMS:
        raise PatternArgumentError("form", got=repr(form), expected=f"one of {', '.join(map(repr, FORMS))}")


def dense_gates(u: Tensor, tau: Tensor, *, form: str = "sparsek") -> Tensor:
    """The gates of every query (rows) and key (columns): [..., S, S] from u and tau [..., S]. For small S."""
    _check_form(form)
    _check_scores(u, tau)
    return _gate(u.to(tau.dtype).unsqueeze(-2), tau.unsqueeze(-1), form)


def _gate(u: Tensor, tau: Tensor, form: str) -> Tensor:
    """Infinities decide by themselves: their difference would be NaN, and their gradient as well."""
    certain = torch.isinf(u) | torch.isinf(tau)
    fixed = torch.where(certain, (u > tau) | (u == torch.inf), False).to(tau.dtype)
    apart = torch.where(certain, 0.0, u) - torch.where(certain, 0.0, tau)
    if form == "capped_softmax":
        soft = apart.clamp(max=0).exp()
    else:
        # Where tau is a score, as it is where every key before it has gate 1, the gate stays 0 whatever the score does.
        soft = torch.where((apart > 0) & (apart < 1), apart, apart.detach().clamp(0, 1))
    return torch.where(certain, fixed, soft)
