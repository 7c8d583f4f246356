"""What it costs to quantise weights again."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["Rounding"]


@dataclass(frozen=True)
class Rounding:
    """How far weights that are stored lie from those that were solved for.

    Attributes:
        relative: sum of the squares of the differences, as a share of `squared_norm`.
        squared_norm: sum of the squares of the weights that were solved for.
    """

    relative: float = 0.0
    squared_norm: float = 0.0

    @classmethod
    def of(cls, stored: Tensor, solved: Tensor) -> Rounding:
        """Of one matrix; sums are float64."""
        wanted = solved.double()
        norm = float(wanted.square().sum())
        return cls(float((stored.double() - wanted).square_().sum()) / (norm or 1.0), norm)

    def __add__(self, other: Rounding) -> Rounding:
        norm = self.squared_norm + other.squared_norm
        error = self.relative * self.squared_norm + other.relative * other.squared_norm
        return Rounding(error / (norm or 1.0), norm)
