"""What gates read of a selection, in one launch, as Triton kernels: its scores and thresholds without infinities."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexsparse.codegen.kernels.arithmetic import cdiv
from flexsparse.codegen.kernels.launch import launch

_BLOCK = 1024


@triton.jit
def _bounded(x, low, high):
    """As torch.nan_to_num with nan=nan."""
    infinity = float("inf")
    return tl.where(x == infinity, high, tl.where(x == -infinity, low, x))


@triton.jit
def _gate_inputs(p_u, p_tau, p_count, p_bounded, p_shifted, p_least, size, k, far, low, high, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_at = at < size
    u = tl.load(p_u + at, mask=m_at, other=0.0).to(tl.float32)
    tau = tl.load(p_tau + at, mask=m_at, other=0.0)
    count = tl.load(p_count + at, mask=m_at, other=0)
    tl.store(p_bounded + at, _bounded(u, -far, far), mask=m_at)
    tl.store(p_shifted + at, _bounded(tau, low, high), mask=m_at)
    half = tl.full([BLOCK], 0.5, tl.float32)
    tl.store(p_least + at, tl.div_rn(half, tl.maximum(count - k + 1, 1).to(tl.float32)), mask=m_at)


@triton.jit
def _flow(p_u, p_tau, p_d_bounded, p_d_shifted, p_d_u, p_d_tau, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_at = at < size
    infinity = float("inf")
    u = tl.load(p_u + at, mask=m_at, other=0.0).to(tl.float32)
    tau = tl.load(p_tau + at, mask=m_at, other=0.0)
    d_u = tl.load(p_d_bounded + at, mask=m_at, other=0.0)
    d_tau = tl.load(p_d_shifted + at, mask=m_at, other=0.0)
    tl.store(p_d_u + at, tl.where(tl.abs(u) < infinity, d_u, 0.0), mask=m_at)
    tl.store(p_d_tau + at, tl.where(tl.abs(tau) < infinity, d_tau, 0.0), mask=m_at)


class GateInputs(NamedTuple):
    """Scores and thresholds that are finite or NaN, and the least gate of a selected key; float32 of one shape."""

    u: Tensor
    tau: Tensor
    least: Tensor


class Finite(NamedTuple):
    """What stands for infinities: -far and far for those of scores, low and high for those of thresholds."""

    far: float
    low: float
    high: float


def gate_inputs(u: Tensor, tau: Tensor, count: Tensor, k: int, finite: Finite, out: GateInputs) -> None:
    """u and tau with ``finite`` for infinities, and 0.5 / max(count - k + 1, 1), into ``out``; NaN stays.

    u (float16, bfloat16 or float32), tau (float32) and count (int32) of one shape, contiguous.
    """
    launch(
        _gate_inputs, (cdiv(u.numel(), _BLOCK),), (u, tau, count, *out), (u.numel(), k, *finite), BLOCK=_BLOCK
    )  # fmt: skip


def gate_input_gradients(u: Tensor, tau: Tensor, d_bounded: Tensor, d_shifted: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of u and tau, float32, from those of what is bounded; 0 where they are not finite."""
    d_u, d_tau = torch.empty_like(tau), torch.empty_like(tau)
    launch(
        _flow, (cdiv(u.numel(), _BLOCK),), (u, tau, d_bounded, d_shifted, d_u, d_tau), (u.numel(),), BLOCK=_BLOCK
    )  # fmt: skip
    return d_u, d_tau
