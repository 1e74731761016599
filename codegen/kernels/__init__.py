"""Triton kernels. They import torch, triton and ``_torch`` only; what they compute is in PyTorch form in ``flexsparse.ops``."""
