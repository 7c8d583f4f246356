"""FP8 with a scale for every output row, of compressed-tensors ("float-quantized"): GLM-4.5-FP8 to GLM-4.7-FP8."""

from __future__ import annotations

import torch
from torch import Tensor

from moesparse.models.formats.base import CODES, SCALE, Coded, Infos, Parts, expect
from moesparse.models.formats.numbers import nearest_fp8, scales_of

__all__ = ["Fp8Channel"]


class Fp8Channel(Coded):
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

    def codes(self, parts: Parts) -> Tensor:
        return parts[CODES].view(torch.uint8)

    def values(self, codes: Tensor, parts: Parts) -> Tensor:
        return codes.view(torch.float8_e4m3fn).float().mul_(scales_of(parts[SCALE]))

    def nearest(self, weight: Tensor, parts: Parts) -> Tensor:
        return nearest_fp8((weight / scales_of(parts[SCALE])).nan_to_num(0))

    def packed(self, codes: Tensor, parts: Parts) -> Tensor:
        return codes.view(torch.float8_e4m3fn)
