"""MXFP4 of gpt-oss: the experts of a layer stacked (OCP Microscaling Formats 1.0, 2023; arXiv 2508.10925)."""

from __future__ import annotations

from torch import Tensor

from moesparse.models.formats.base import CODES, SCALE, Infos, Parts, expect
from moesparse.models.formats.fp4 import Fp4

__all__ = ["Mxfp4"]


class Mxfp4(Fp4):
    """Blocks [E, out, in / 32, 16] of two E2M1 codes a byte, and E8M0 scales [E, out, in / 32].

    The key's own tensor is [E, in, out]. Rows of gate and up alternate there and here.
    """

    name = "mxfp4"
    own = ""
    tensors = {CODES: "_blocks", SCALE: "_scales"}  # noqa: RUF012
    mark = CODES
    dtypes = {CODES: ("U8",), SCALE: ("U8",)}  # noqa: RUF012
    transposed = True
    ranks = (4,)
    group = 32

    def matrix(self, infos: Infos) -> tuple[int, ...]:
        *outer, rows, blocks, _ = infos[CODES].shape
        expect(infos[CODES], (*outer, rows, blocks, self.group // 2))
        expect(infos[SCALE], (*outer, rows, blocks))
        return (*outer, blocks * self.group, rows)

    def codes(self, parts: Parts) -> Tensor:
        return super().codes(parts).flatten(-2)

    def packed(self, codes: Tensor, parts: Parts) -> Tensor:
        return super().packed(codes, parts).view(parts[CODES].shape)
