"""What AWQ and GPTQ share: codes in words, with a scale and a zero point for each group of inputs."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from moesparse.models.formats.base import CODES, SCALE, Coded, Parts
from moesparse.models.formats.numbers import scales_of

__all__ = ["ZERO", "Words"]

ZERO = "zero"


class Words(Coded):
    """Codes less their zero point, times a scale.

    Attributes:
        bits: of a code.
        group: inputs that share a scale.
    """

    mark = CODES
    bits: int
    group: int

    @abstractmethod
    def zeros(self, parts: Parts) -> Tensor:
        """float32 [groups, out]."""

    def group_of(self, parts: Parts, inputs: int) -> Tensor:
        """int64 [in]: the group of each input."""
        return torch.arange(inputs, device=parts[CODES].device) // self.group

    def values(self, codes: Tensor, parts: Parts) -> Tensor:
        groups = self.group_of(parts, codes.shape[-1])
        zero, scale = (each.mT[..., groups] for each in (self.zeros(parts), scales_of(parts[SCALE])))
        return codes.float().sub_(zero).mul_(scale)

    def nearest(self, weight: Tensor, parts: Parts) -> Tensor:
        groups = self.group_of(parts, weight.shape[-1])
        zero, scale = (each.mT[..., groups] for each in (self.zeros(parts), scales_of(parts[SCALE])))
        codes = (weight / scale).nan_to_num(0).round() + zero
        return codes.clamp(0, 2**self.bits - 1).to(torch.uint8)
