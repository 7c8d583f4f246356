"""What the formats of integer codes share: a code less its zero point, times a scale."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

from moesparse.models.formats.base import SCALE, Coded, Parts
from moesparse.weights.codes import nearest_integers, scales_near, scales_of

__all__ = ["ZERO", "Integers"]

ZERO = "zero"


class Integers(Coded):
    """Codes less their zero point, times a scale.

    Attributes:
        bits: of a code.
        symmetric: zero points are all half of the number of codes, and stay.
        lowest_zero: the smallest zero point there is.
    """

    bits: int
    symmetric: bool
    lowest_zero: int = 0

    @abstractmethod
    def zeros(self, parts: Parts) -> Tensor:
        """float32, the shape of the scales, or one for all."""

    @abstractmethod
    def packed_zeros(self, zeros: Tensor, parts: Parts) -> Tensor:
        """The tensor of the zero points, as `parts` has it, for those of `zeros`."""

    @abstractmethod
    def spread(self, each: Tensor, parts: Parts, inputs: int) -> Tensor:
        """(..., out, in): what there is one of for each scale, for every weight."""

    def values(self, codes: Tensor, parts: Parts) -> Tensor:
        scale, zero = self._scale_and_zero(codes, parts)
        return codes.float().sub_(zero).mul_(scale)

    def nearest(self, weight: Tensor, parts: Parts) -> Tensor:
        scale, zero = self._scale_and_zero(weight, parts)
        return nearest_integers((weight / scale).nan_to_num(0), zero, self.bits)

    def remade(self, weight: Tensor, parts: Parts) -> Iterator[Parts]:
        """Codes reach from the smallest to the largest weight and hold zero, as in compressed-tensors."""
        steps = 2**self.bits - 1
        if self.symmetric:
            wanted = self.reduced(weight.abs(), parts, "amax") * 2 / steps
            yield from ({SCALE: scale} for scale in scales_near(wanted, parts[SCALE]))
            return
        low = self.reduced(weight.clamp(max=0), parts, "amin")
        high = self.reduced(weight.clamp(min=0), parts, "amax")
        for scale in scales_near((high - low) / steps, parts[SCALE]):
            zeros = (-low / scales_of(scale)).nan_to_num(0).round().clamp(self.lowest_zero, steps)
            yield {SCALE: scale, ZERO: self.packed_zeros(zeros, parts)}

    def mixed(self, first: Tensor, one: Parts, other: Parts) -> dict[str, Tensor]:
        found = super().mixed(first, one, other)
        if not self.symmetric:
            zeros = torch.where(first, self.zeros(one), self.zeros(other))
            found[ZERO] = self.packed_zeros(zeros, other)
        return found

    def _scale_and_zero(self, matrix: Tensor, parts: Parts) -> tuple[Tensor, Tensor]:
        scale, zero = scales_of(parts[SCALE]), self.zeros(parts)
        inputs = matrix.shape[-1]
        return self.spread(scale, parts, inputs), zero if zero.ndim == 0 else self.spread(zero, parts, inputs)
