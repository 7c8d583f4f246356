"""FP8 with a scale for every block of a matrix: DeepSeek-V3 (arXiv 2412.19437, 3.3), Qwen3-FP8, MiniMax-M2."""

from __future__ import annotations

import torch

from moesparse.models.formats.base import CODES, SCALE, Infos, Parts, expect
from moesparse.models.formats.fp8 import Fp8

__all__ = ["Fp8Block"]


class Fp8Block(Fp8):
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

    def block_of(self, shape: torch.Size, parts: Parts) -> tuple[int, int]:
        return self.block or (shape[-2], shape[-1])
