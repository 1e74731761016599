"""Triton kernels. They import torch, triton and ``_torch`` alone; ``flexsparse.ops`` has their PyTorch forms."""
