"""Triton kernels. They import torch and triton only; what they compute is in PyTorch form in ``flexsparse.ops``."""
