"""Pruning and running n:m sparse experts: packed weights and Triton kernels. Needs torch, and triton on a GPU."""

from moesparse_kernels.layout import NMWeight

__all__ = ["NMWeight"]
