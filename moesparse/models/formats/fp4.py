"""What the formats of 4-bit floats share: E2M1 codes, and a scale for every few neighbours of a row."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from moesparse.errors import CheckpointError
from moesparse.models.formats.base import CODES, SCALE, Coded, Infos, Parts, expect
from moesparse.weights.codes import (
    FP4_VALUES,
    nearest_fp4,
    of_fp4,
    pack_nibbles,
    reduced,
    scales_near,
    scales_of,
    spread,
    unpack_nibbles,
)

__all__ = ["Fp4"]


class Fp4(Coded):
    """E2M1 codes, two to a byte, and a scale for each `group` of a row.

    Attributes:
        group: neighbours that share a scale.
    """

    group: int

    def matrix(self, infos: Infos) -> tuple[int, ...]:
        shape = infos[CODES].shape
        if shape[-1] * 2 % self.group:
            raise CheckpointError(
                f"{infos[CODES].name} must hold groups of {self.group} weights, got {shape[-1] * 2} in a row"
            )
        expect(infos[SCALE], (*shape[:-1], shape[-1] * 2 // self.group))
        return (*shape[:-1], shape[-1] * 2)

    def codes(self, parts: Parts) -> Tensor:
        return unpack_nibbles(parts[CODES])

    def values(self, codes: Tensor, parts: Parts) -> Tensor:
        return of_fp4(codes).mul_(spread(self.scales(parts), self.group, codes.shape[-1], -1))

    def scales(self, parts: Parts) -> Tensor:
        """float32 (..., out, in / group)."""
        return scales_of(parts[SCALE])

    def nearest(self, weight: Tensor, parts: Parts) -> Tensor:
        scales = spread(self.scales(parts), self.group, weight.shape[-1], -1)
        return nearest_fp4((weight / scales).nan_to_num(0))

    def reduced(self, matrix: Tensor, parts: Parts, how: str) -> Tensor:
        return reduced(matrix, (1, self.group), how)

    def remade(self, weight: Tensor, parts: Parts) -> Iterator[Parts]:
        """The largest weight is the largest code."""
        wanted = self.reduced(weight.abs(), parts, "amax") / max(FP4_VALUES)
        for scale in scales_near(self.stored_scales(wanted, parts), parts[SCALE]):
            yield {SCALE: scale}

    def stored_scales(self, scales: Tensor, parts: Parts) -> Tensor:
        """float32, what is to be stored for `scales` to give these."""
        return scales

    def packed(self, codes: Tensor, parts: Parts) -> Tensor:
        return pack_nibbles(codes).view(parts[CODES].dtype)
