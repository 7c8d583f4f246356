"""FP8 with a scale for every block of a matrix: DeepSeek-V3 (arXiv 2412.19437, 3.3), Qwen3-FP8, MiniMax-M2."""

from __future__ import annotations

import torch
from torch import Tensor

from moesparse.models.formats.base import CODES, SCALE, Coded, Infos, Parts, expect
from moesparse.models.formats.numbers import nearest_fp8, scales_of, spread

__all__ = ["Fp8Block"]


class Fp8Block(Coded):
    """E4M3 codes [out, in] and a scale for each block of them; the last blocks may be cut off by the matrix's end.

    Args:
        block: rows and columns of a block; None is one scale for the matrix.
        own, scale: the end of the key, and that of the scale's name in its place.
    """

    name = "fp8_block"
    # of the inputs, where their scale is static
    beside = (".activation_scale", ".input_scale")
    # the last two hold powers of two: scale_fmt "ue8m0"
    dtypes = {CODES: ("F8_E4M3",), SCALE: ("F32", "BF16", "F16", "F8_E8M0", "U8")}  # noqa: RUF012

    def __init__(self, block: tuple[int, int] | None, own: str = "", scale: str = "_scale_inv") -> None:
        self.block, self.own = block, own
        self.tensors = {CODES: own, SCALE: scale}

    def matrix(self, infos: Infos) -> tuple[int, ...]:
        shape = infos[CODES].shape
        if self.block is not None:
            rows, columns = self.block
            expect(infos[SCALE], (*shape[:-2], -(-shape[-2] // rows), -(-shape[-1] // columns)))
        elif infos[SCALE].shape != ():
            expect(infos[SCALE], (1,))
        return shape

    def codes(self, parts: Parts) -> Tensor:
        return parts[CODES].view(torch.uint8)

    def values(self, codes: Tensor, parts: Parts) -> Tensor:
        return codes.view(torch.float8_e4m3fn).float().mul_(self._scales(codes, parts))

    def nearest(self, weight: Tensor, parts: Parts) -> Tensor:
        return nearest_fp8((weight / self._scales(weight, parts)).nan_to_num(0))

    def packed(self, codes: Tensor, parts: Parts) -> Tensor:
        return codes.view(torch.float8_e4m3fn)

    def _scales(self, matrix: Tensor, parts: Parts) -> Tensor:
        scale = scales_of(parts[SCALE])
        if self.block is None:
            return scale
        rows, columns = self.block
        return spread(spread(scale, rows, matrix.shape[-2], -2), columns, matrix.shape[-1], -1)
