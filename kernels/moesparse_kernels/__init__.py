"""Pruning and running n:m sparse experts: packed weights and Triton kernels. Needs torch, and triton on a GPU."""

from moesparse_kernels.layout import NMWeight
from moesparse_kernels.moe import moe_dense, moe_nm

__all__ = ["NMWeight", "moe_dense", "moe_nm"]
