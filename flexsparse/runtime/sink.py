"""A sink after the attention: what it takes from every row of out, and what it adds to lse.

With lse the logarithm of the sum over keys, a sink of logit t leaves out * sigmoid(lse - t), and the whole sum's
logarithm is logaddexp(lse, t). Both are plain PyTorch, on every backend, so the sink's gradient is a sum in a fixed
order, and it costs [B, H, S_q] numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flexsparse.runtime.chunked import Work


def with_sink(work: Work, tensors: tuple[Tensor, ...], out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """out [B, H, S_q, D_v] and lse [B, H, S_q] of a softmax whose denominator counts the sink as well.

    ``tensors`` in the order of ``work.names``, with the graph that the sink's gradient shall take. A row without keys
    gets out 0 and lse of the sink; a sink of -inf changes nothing and receives the gradient 0.
    """
    sink = _logits(work, tensors, lse)
    empty, absent = torch.isneginf(lse), torch.isneginf(sink)
    known = ~(empty | absent)
    # Infinities never enter the difference, whose gradient would be NaN.
    keys, mine = torch.where(known, lse, 0.0), torch.where(known, sink, 0.0)
    share = torch.where(absent, 1.0, torch.where(empty, 0.0, torch.sigmoid(keys - mine)))
    total = torch.where(absent, lse, torch.where(empty, sink, torch.logaddexp(keys, mine)))
    return (out * share.unsqueeze(-1)).to(out.dtype), total


def _logits(work: Work, tensors: tuple[Tensor, ...], like: Tensor) -> Tensor:
    """The sink's logit for every row, [B, H, S_q], in the dtype of lse."""
    counts = (work.shapes.batch, work.shapes.heads, work.shapes.q_len)
    b, h, q = (
        torch.arange(count, device=like.device).reshape([-1 if d == n else 1 for d in range(3)])
        for n, count in enumerate(counts)
    )
    sink: Tensor = work.functions(tensors, broadcast=True)["sink_logit"](like, b, h, q)
    return sink.to(like.dtype).expand(like.shape)
