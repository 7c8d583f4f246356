"""Pruning and running n:m sparse experts: packed weights and Triton kernels. Needs torch, and triton on a GPU.

column_energy, nm_prune, row_topk   score and prune
NMWeight                            a packed weight
route                               expert-sorted rows and their block schedule
moe_nm, moe_dense                   the expert layer; every backend of NM_BACKENDS and DENSE_BACKENDS can be forced,
                                    such as backend="semi_structured", torch's sparse tensor-core GEMMs
"""

from moesparse_kernels.dispatch import DENSE_BACKENDS, NM_BACKENDS
from moesparse_kernels.layout import NMWeight
from moesparse_kernels.moe import moe_dense, moe_nm
from moesparse_kernels.moe_reference import Routing
from moesparse_kernels.ops import column_energy, column_energy_sorted, nm_prune, route, row_topk

__all__ = [
    "DENSE_BACKENDS",
    "NM_BACKENDS",
    "NMWeight",
    "Routing",
    "column_energy",
    "column_energy_sorted",
    "moe_dense",
    "moe_nm",
    "nm_prune",
    "route",
    "row_topk",
]
