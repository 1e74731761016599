"""A sink after FlexAttention: what it takes from every row of out, and what it adds to lse.

With lse the logarithm of the sum over keys, a sink of logit t leaves out * sigmoid(lse - t), and the whole sum's
logarithm is logaddexp(lse, t). Both are plain PyTorch, so the sink's gradient is a sum in a fixed order, and it costs
[B, H, S_q] numbers. It sums the rounding of lse over all queries, which shows in float32: there the compiler takes the
gradient from the chunked path. The chunked path counts the sink in its own sums instead.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flexsparse.runtime.chunked import Work, row_indices, sink_logits


def with_sink(work: Work, tensors: tuple[Tensor, ...], out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """out [B, H, S_q, D_v] and lse [B, H, S_q] of a softmax whose denominator counts the sink as well.

    ``tensors`` in the order of ``work.names``, with the graph that the sink's gradient shall take. A row without keys
    gets out 0 and lse of the sink; a sink of -inf changes nothing and receives the gradient 0.
    """
    functions = work.functions(tensors, broadcast=True)
    sink = sink_logits(functions, lse, *row_indices(work.shapes, lse.device))
    empty, absent = torch.isneginf(lse), torch.isneginf(sink)
    known = ~(empty | absent)
    # Infinities never enter the difference, whose gradient would be NaN.
    keys, mine = torch.where(known, lse, 0.0), torch.where(known, sink, 0.0)
    share = torch.where(absent, 1.0, torch.where(empty, 0.0, torch.sigmoid(keys - mine)))
    total = torch.where(absent, lse, torch.where(empty, sink, torch.logaddexp(keys, mine)))
    return (out * share.unsqueeze(-1)).to(out.dtype), total
