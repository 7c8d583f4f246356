"""MXFP4 of compressed-tensors ("mxfp4-pack-quantized"), a matrix for each expert: Kimi-K3."""

from __future__ import annotations

from moesparse.models.formats.base import CODES, SCALE
from moesparse.models.formats.fp4 import Fp4

__all__ = ["Mxfp4Packed"]


class Mxfp4Packed(Fp4):
    """Two E2M1 codes a byte [out, in / 2], and E8M0 scales [out, in / 32]."""

    name = "mxfp4_packed"
    tensors = {CODES: ".weight_packed", SCALE: ".weight_scale"}  # noqa: RUF012
    mark = CODES
    dtypes = {CODES: ("U8",), SCALE: ("U8", "F8_E8M0")}  # noqa: RUF012
    beside = (".input_global_scale",)
    group = 32
