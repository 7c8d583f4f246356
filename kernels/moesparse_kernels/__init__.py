"""Pruning and running n:m sparse experts: packed weights and Triton kernels. Needs torch, and triton on a GPU.

column_energy, nm_prune, row_topk   score and prune
NMWeight                            a packed weight
route                               expert-sorted rows and their block schedule
QuantisedWeight, moe_quantised      weights of 8 and 4 bits, under a mask or dense, and the expert layer on them
moe_nm, moe_dense                   the expert layer; every backend of NM_BACKENDS and DENSE_BACKENDS can be forced,
                                    such as backend="semi_structured", torch's sparse tensor-core GEMMs
"""

from .dispatch import DENSE_BACKENDS, NM_BACKENDS
from .layout import NMWeight
from .moe import moe_dense, moe_nm
from .ops import column_energies, column_energy, column_energy_sorted, nm_prune, route, row_topk
from .quantised import QuantisedWeight
from .quantised_layer import moe_quantised
from .schedule import Routing

__all__ = [
    "DENSE_BACKENDS",
    "NM_BACKENDS",
    "NMWeight",
    "QuantisedWeight",
    "Routing",
    "column_energies",
    "column_energy",
    "column_energy_sorted",
    "moe_dense",
    "moe_nm",
    "moe_quantised",
    "nm_prune",
    "route",
    "row_topk",
]
