"""What AWQ and GPTQ share: codes in words, with a scale and a zero point for each group of inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from moesparse.models.formats.base import CODES, SCALE, Parts
from moesparse.models.formats.integers import Integers

__all__ = ["Words"]


class Words(Integers):
    """Scales and zero points are [groups, out].

    Attributes:
        group: inputs that share a scale.
    """

    mark = CODES
    group: int

    def group_of(self, parts: Parts, inputs: int) -> Tensor:
        """int64 [in]: the group of each input."""
        return torch.arange(inputs, device=parts[CODES].device) // self.group

    def spread(self, each: Tensor, parts: Parts, inputs: int) -> Tensor:
        return each.mT[..., self.group_of(parts, inputs)]

    def reduced(self, matrix: Tensor, parts: Parts, how: str) -> Tensor:
        index = self.group_of(parts, matrix.shape[-1]).expand(matrix.shape)
        start = torch.zeros(parts[SCALE].mT.shape, dtype=matrix.dtype, device=matrix.device)
        return start.scatter_reduce(-1, index, matrix, how).mT
