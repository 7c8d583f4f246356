"""What the formats of 8-bit floats share: E4M3 codes, and a scale for each block of a matrix."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

from moesparse.models.formats.base import CODES, SCALE, Coded, Parts
from moesparse.weights.codes import FP8_MAX, nearest_fp8, of_fp8, reduced, scales_near, scales_of, spread

__all__ = ["Fp8"]


class Fp8(Coded):
    """E4M3 codes [out, in]."""

    @abstractmethod
    def block_of(self, shape: torch.Size, parts: Parts) -> tuple[int, int]:
        """Rows and columns that share a scale."""

    def codes(self, parts: Parts) -> Tensor:
        return parts[CODES].view(torch.uint8)

    def values(self, codes: Tensor, parts: Parts) -> Tensor:
        return of_fp8(codes).mul_(self._scales(codes, parts))

    def nearest(self, weight: Tensor, parts: Parts) -> Tensor:
        return nearest_fp8((weight / self._scales(weight, parts)).nan_to_num(0))

    def packed(self, codes: Tensor, parts: Parts) -> Tensor:
        return codes.view(torch.float8_e4m3fn)

    def reduced(self, matrix: Tensor, parts: Parts, how: str) -> Tensor:
        return reduced(matrix, self.block_of(matrix.shape, parts), how).view(parts[SCALE].shape)

    def remade(self, weight: Tensor, parts: Parts) -> Iterator[Parts]:
        """The largest weight is the largest code."""
        for scale in scales_near(self.reduced(weight.abs(), parts, "amax") / FP8_MAX, parts[SCALE]):
            yield {SCALE: scale}

    def _scales(self, matrix: Tensor, parts: Parts) -> Tensor:
        scale = scales_of(parts[SCALE])
        if scale.ndim < 2:
            return scale
        rows, columns = self.block_of(matrix.shape, parts)
        return spread(spread(scale, rows, matrix.shape[-2], -2), columns, matrix.shape[-1], -1)
