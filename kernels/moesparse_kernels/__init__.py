"""Pruning and running n:m sparse experts: packed weights and Triton kernels. Needs torch, and triton on a GPU."""

from moesparse_kernels.layout import NMWeight
from moesparse_kernels.moe import moe_dense, moe_nm
from moesparse_kernels.ops import column_energy, column_energy_sorted, nm_prune, row_topk

__all__ = ["NMWeight", "column_energy", "column_energy_sorted", "moe_dense", "moe_nm", "nm_prune", "row_topk"]
