"""Packed weights made dense, for where a dense GEMM wins."""

from __future__ import annotations

import torch

from .layout import NMWeight
from .ops import use_triton

__all__ = ["unpack"]


def unpack(weight: NMWeight) -> torch.Tensor:
    """The dense weight (E, N, K), bit for bit: in one launch where Triton serves it, in fragment order."""
    if weight.order == "fragment" and use_triton(weight.values):
        from .unpack_fragment import unpack_fragment

        with torch.cuda.device_of(weight.values):
            return unpack_fragment(weight)
    return weight.unpack()
