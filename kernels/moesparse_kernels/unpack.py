"""Packed weights made dense, for where a dense GEMM wins."""

from __future__ import annotations

import torch

from .layout import NMWeight

__all__ = ["unpack"]


def unpack(weight: NMWeight) -> torch.Tensor:
    """The dense weight (E, N, K), bit for bit: one launch for fragment order on a GPU, `weight.unpack()` elsewhere."""
    if weight.order == "fragment" and weight.device.type == "cuda":
        from .unpack_fragment import unpack_fragment

        return unpack_fragment(weight)
    return weight.unpack()
