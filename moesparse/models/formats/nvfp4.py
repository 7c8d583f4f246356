"""NVFP4: E2M1 codes, an E4M3 scale for 16 of them and one for the matrix; of ModelOpt and of compressed-tensors."""

from __future__ import annotations

from torch import Tensor

from moesparse.models.formats.base import CODES, SCALE, Infos, Parts, expect
from moesparse.models.formats.fp4 import Fp4

__all__ = ["WHOLE", "Nvfp4", "Nvfp4ModelOpt"]

WHOLE = "whole"


class Nvfp4(Fp4):
    """compressed-tensors ("nvfp4-pack-quantized"): the scale of 16 weights is `weight_scale / weight_global_scale`.

    The global scale is held, because engines ask for one that gate and up of an expert share: a scale that would lie
    beyond E4M3's reach is the largest there.
    """

    name = "nvfp4"
    tensors = {CODES: ".weight_packed", SCALE: ".weight_scale", WHOLE: ".weight_global_scale"}  # noqa: RUF012
    mark = CODES
    beside = (".input_global_scale",)
    dtypes = {CODES: ("U8",), SCALE: ("F8_E4M3",), WHOLE: ("F32",)}  # noqa: RUF012
    group = 16

    def matrix(self, infos: Infos) -> tuple[int, ...]:
        shape = super().matrix(infos)
        if infos[WHOLE].shape != ():
            expect(infos[WHOLE], (1,))
        return shape

    def scales(self, parts: Parts) -> Tensor:
        return super().scales(parts) / parts[WHOLE]

    def stored_scales(self, scales: Tensor, parts: Parts) -> Tensor:
        return scales * parts[WHOLE]


class Nvfp4ModelOpt(Nvfp4):
    """ModelOpt: the scale of 16 weights is `weight_scale * weight_scale_2`."""

    tensors = {CODES: ".weight", SCALE: ".weight_scale", WHOLE: ".weight_scale_2"}  # noqa: RUF012
    mark = WHOLE
    beside = (".input_scale",)

    def scales(self, parts: Parts) -> Tensor:
        return Fp4.scales(self, parts) * parts[WHOLE]

    def stored_scales(self, scales: Tensor, parts: Parts) -> Tensor:
        return scales / parts[WHOLE]
