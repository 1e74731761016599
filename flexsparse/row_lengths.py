"""Rows of a batch that are shorter than its tensors: what stands behind a row's length is neither seen nor read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from flexsparse._torch import version_of
from flexsparse.errors import DeviceError, DtypeError, ShapeError
from flexsparse.expression import Pattern
from flexsparse.ir.names import names_of
from flexsparse.ir.nodes import Node, SelectionNode, walk
from flexsparse.language import b, captured, kv, q

# The keyword of a call, and the name of the tensor in the pattern that such a call computes.
LENGTHS = "lengths"


def names_lengths(pattern: Node) -> bool:
    """Whether the pattern has a tensor or a number of that name itself, as ``padding()`` does."""
    return LENGTHS in names_of(pattern)


def within_lengths(pattern: Pattern) -> Pattern:
    """The pattern of queries and keys within their row's length."""
    length: Any = captured(LENGTHS, dims=("b",))[b]
    return pattern & (kv < length) & (q < length)


def check_lengths(lengths: object, batch: int, kv_len: int, device: torch.device, *, validate: bool) -> Tensor:
    """The lengths [B] as int64 on ``device``.

    Raises ShapeError, DtypeError or DeviceError, and under ``validate`` ShapeError for values outside [0, kv_len].
    """
    if isinstance(lengths, Tensor) and lengths.dtype is torch.bool:
        mend = "A mask of what is real is counted with mask.sum(-1)."
        raise DtypeError(LENGTHS, got="torch.bool", expected="integers", mend=mend)
    if not isinstance(lengths, Tensor) or tuple(lengths.shape) != (batch,):
        got = f"shape {tuple(lengths.shape)}" if isinstance(lengths, Tensor) else type(lengths).__name__
        raise ShapeError(LENGTHS, got=got, expected=f"a tensor [{batch}], how many positions each row has")
    if lengths.is_floating_point() or lengths.is_complex():
        raise DtypeError(LENGTHS, got=str(lengths.dtype), expected="integers")
    if lengths.device not in (device, torch.device("cpu")):
        expected = f"query's device, {device}, or cpu"
        raise DeviceError(LENGTHS, got=str(lengths.device), expected=expected, mend="Move it with .to(...).")
    if validate and not torch.compiler.is_compiling():
        low, high = torch.stack(torch.aminmax(lengths)).tolist()
        if low < 0 or high > kv_len:
            expected = f"lengths from 0 to the key length, {kv_len}"
            raise ShapeError(LENGTHS, got=f"lengths from {low} to {high}", expected=expected)
    return _on(lengths, device)


# What other lengths became where they were needed, by the tensor that was given: layers of a model give the same.
_MOVED: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _on(lengths: Tensor, device: torch.device) -> Tensor:
    """The lengths as int64 on ``device``; the same tensor for the same lengths, as tiles are kept by their tensors."""
    if (lengths.device, lengths.dtype) == (device, torch.int64):
        return lengths
    kept = not (torch.compiler.is_compiling() or lengths.is_inference())
    # A CUDA graph reads the lengths at each replay.
    if not kept or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        return lengths.to(device, torch.int64, non_blocking=True)
    state, known = (version_of(lengths), device), _MOVED.get(lengths)
    if known is None or known[0] != state:
        with torch.inference_mode(False):
            known = (state, lengths.to(device, torch.int64, non_blocking=True))
        _MOVED[lengths] = known
    moved: Tensor = known[1]
    return moved


@dataclass(frozen=True)
class Padding:
    """Which queries [B, S_q] and keys [B, S_kv] stand behind the length of their row."""

    queries: Tensor
    keys: Tensor

    def of_queries(self, x: Tensor, value: float = 0.0) -> Tensor:
        """x [B, H, S_q, ...] with ``value`` for padding, whatever it holds there, and whatever flows back into it."""
        return _filled(x, self.queries, value)

    def of_keys(self, x: Tensor) -> Tensor:
        """x [B, H, S_kv, ...] with zeros for padding."""
        return _filled(x, self.keys, 0.0)

    def operands(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value with zeros for padding: what is multiplied by a weight of 0 must be finite."""
        return self.of_queries(query), self.of_keys(key), self.of_keys(value)

    def given(self, tensors: dict[str, Any], pattern: Node) -> dict[str, Any]:
        """Tensors of the call with their padding set to what the checks of a call take: scores 0, segments going on."""
        hidden = dict(tensors)
        for selection in (n for n in walk(pattern) if isinstance(n, SelectionNode)):
            scores, segments = hidden.get(selection.scores), hidden.get(str(selection.segments))
            if isinstance(scores, Tensor) and scores.dim() == 3 and self._fits(scores):
                hidden[selection.scores] = self.of_keys(scores)
            if isinstance(segments, Tensor) and segments.dim() in (1, 2) and self._fits(segments):
                hidden[str(selection.segments)] = self._going_on(segments)
        return hidden

    def _fits(self, tensor: Tensor) -> bool:
        """Whether it has an entry for each key; a call refuses what has not, and boundaries are of other sizes."""
        rows = tensor.shape[0] if tensor.dim() > 1 else 1
        return tensor.shape[-1] == self.keys.shape[1] and rows in (1, self.keys.shape[0])

    def _going_on(self, ids: Tensor) -> Tensor:
        """Segment ids [B, S] whose last real one goes on through the padding."""
        ids = ids.expand(self.keys.shape)
        last = ids.masked_fill(self.keys, torch.iinfo(ids.dtype).min).amax(-1, keepdim=True)
        last = last.masked_fill(self.keys.all(-1, keepdim=True), 0)
        return torch.where(self.keys, last, ids)


def _filled(x: Tensor, positions: Tensor, value: float) -> Tensor:
    return x.masked_fill(positions.reshape(len(positions), 1, -1, *[1] * (x.dim() - 3)), value)


def padding_of(lengths: Tensor, q_len: int, kv_len: int, q_offset: int = 0) -> Padding:
    """The padding of rows of these lengths [B]; query 0 stands at ``q_offset``."""
    ends = lengths.unsqueeze(-1)
    keys = torch.arange(kv_len, device=lengths.device) >= ends
    if (q_len, q_offset) == (kv_len, 0):
        return Padding(keys, keys)
    return Padding(torch.arange(q_offset, q_offset + q_len, device=lengths.device) >= ends, keys)
