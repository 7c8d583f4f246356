"""FP8 with a scale for every output row, of compressed-tensors ("float-quantized"): GLM-4.5-FP8 to GLM-4.7-FP8."""

from __future__ import annotations

import torch

from moesparse.models.formats.base import CODES, SCALE, Infos, Parts, expect
from moesparse.models.formats.fp8 import Fp8

__all__ = ["Fp8Channel"]


class Fp8Channel(Fp8):
    """E4M3 codes [out, in] and scales [out, 1], or one for the matrix [1]."""

    name = "fp8_channel"
    tensors = {CODES: ".weight", SCALE: ".weight_scale"}  # noqa: RUF012
    beside = (".input_scale",)
    dtypes = {CODES: ("F8_E4M3",), SCALE: ("F32", "BF16", "F16")}  # noqa: RUF012

    def matrix(self, infos: Infos) -> tuple[int, ...]:
        shape = infos[CODES].shape
        if infos[SCALE].shape not in ((), (1,)):
            expect(infos[SCALE], (*shape[:-1], 1))
        return shape

    def block_of(self, shape: torch.Size, parts: Parts) -> tuple[int, int]:
        return (1 if parts[SCALE].ndim > 1 else shape[-2]), shape[-1]
