"""What every way of storing a weight can do: name its tensors, check them, make a matrix of them, and take one back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from moesparse.errors import CheckpointError
from moesparse.system.shards import TensorInfo
from moesparse.weights.codes import where_stored

__all__ = ["CODES", "SCALE", "Coded", "Format", "Infos", "Parts", "expect"]

CODES, SCALE = "codes", "scale"

Parts = Mapping[str, Tensor]
"""What a tensor is for (CODES, SCALE, ...) -> the tensor."""

Infos = Mapping[str, TensorInfo]
"""The same, of headers."""


class Format(ABC):
    """One way in which a checkpoint stores a weight as several tensors.

    A weight goes by the key that a bf16 checkpoint has for it. Its tensors are that key with another end. Where the
    experts of a layer are stacked, all of its tensors have a first dim of E.

    Attributes:
        name: of the format.
        own: the end of the key that is replaced.
        tensors: what a tensor is for -> the end of its name.
        mark: which of the tensors tells that a weight is stored in this way.
        beside: ends of the names of tensors that belong to a weight and do not change its value.
        dtypes: what a tensor is for -> its dtypes, as safetensors names them.
        optional: which of the tensors need not be there.
        ranks: of the tensor of the codes.
    """

    name: str
    own: str = ".weight"
    tensors: Mapping[str, str]
    mark: str = SCALE
    beside: Sequence[str] = ()
    dtypes: Mapping[str, tuple[str, ...]]
    optional: Sequence[str] = ()
    ranks: Sequence[int] = (2, 3)

    def key_of(self, name: str) -> str | None:
        """The key of the weight that a tensor is the mark of; None when it is none."""
        end = self.tensors[self.mark]
        return name.removesuffix(end) + self.own if name.endswith(end) else None

    def names(self, key: str) -> dict[str, str]:
        """What a tensor is for -> its name."""
        stem = key.removesuffix(self.own)
        return {what: stem + end for what, end in self.tensors.items()}

    def names_beside(self, key: str) -> list[str]:
        """Of tensors that may be there besides."""
        return [key.removesuffix(".weight") + end for end in self.beside]

    def shape(self, infos: Infos) -> tuple[int, ...]:
        """Of the weight, [out, in] or stacked, from headers alone.

        Raises:
            CheckpointError: a dtype or a shape that this format does not have; names the tensor.
        """
        for what, info in infos.items():
            if info.dtype not in self.dtypes[what]:
                raise CheckpointError(f"{info.name} must be {' or '.join(self.dtypes[what])}, got {info.dtype}")
        codes = infos[CODES]
        if len(codes.shape) not in self.ranks:
            raise CheckpointError(
                f"{codes.name} must have {' or '.join(map(str, self.ranks))} dims, got {list(codes.shape)}"
            )
        return self.matrix(infos)

    @abstractmethod
    def matrix(self, infos: Infos) -> tuple[int, ...]:
        """The same from headers of the right dtypes.

        Raises:
            CheckpointError: shapes that do not fit together.
        """

    @abstractmethod
    def decode(self, parts: Parts, dtype: torch.dtype) -> Tensor:
        """The weight, in one dtype or another."""

    @abstractmethod
    def encode(self, weight: Tensor, parts: Parts) -> dict[str, Tensor]:
        """The weight back in its tensors, its zeros exact.

        Args:
            weight: as `decode` gives it.
            parts: from which it was decoded.
        """

    def requantise(self, weight: Tensor, parts: Parts) -> dict[str, Tensor]:
        """The same, under scales made anew where that is nearer to the weight; a format without scales has none."""
        return self.encode(weight, parts)


class Coded(Format):
    """A format in which every weight has a code, and its value is that of the code, less a zero point, times a scale.

    Attributes:
        transposed: the key's own matrix is [in, out].
    """

    transposed: bool = False

    def decode(self, parts: Parts, dtype: torch.dtype) -> Tensor:
        """The weight: code and scale multiplied in float32 and then rounded to `dtype`."""
        values = self.values(self.codes(parts), parts).to(dtype)
        return values.mT if self.transposed else values

    def encode(self, weight: Tensor, parts: Parts) -> dict[str, Tensor]:
        """The weight back in its tensors. Scales and zero points are held.

        A weight that `decode` gives keeps its very code, also where two codes have one value. Any other gets the
        nearest code, what lies beyond the scale's reach the last one. Zero is exact.
        """
        weight = weight.mT if self.transposed else weight
        codes = self.codes(parts)
        values = self.values(codes, parts)
        # a zero may be asked for where the value is only too small for the dtype of the weight
        held = (values.to(weight.dtype) == weight) & ((weight != 0) | (values == 0))
        # + 0.0: a zero that comes to be is the positive one
        nearest = self.nearest(weight.float() + 0.0, parts)
        return {**parts, CODES: self.packed(torch.where(held, codes, nearest), parts)}

    def requantise(self, weight: Tensor, parts: Parts) -> dict[str, Tensor]:
        """The weight back in its tensors, zeros exact, under scales that are held or made anew.

        Weights that share a scale keep it, and their codes, where each of them is as `decode` gives it or zero.
        Elsewhere they get the one of `remade` under which their squared error is smallest, if it is smaller than under
        the scale that they have. Zero points go with the scales.
        """
        matrix = weight.mT if self.transposed else weight
        before = self.values(self.codes(parts), parts).to(matrix.dtype)
        changed = self.reduced(((matrix != before) & (matrix != 0)).float(), parts, "amax") > 0
        best: Parts = parts
        if changed.any():
            error = self._squared_error(weight, parts)
            for made in self.remade(matrix.float(), parts):
                tried = self._squared_error(weight, {**parts, **made})
                better = changed & (tried < error)
                best, error = self.mixed(better, {**parts, **made}, best), torch.where(better, tried, error)
        return self.encode(weight, best)

    def _squared_error(self, weight: Tensor, parts: Parts) -> Tensor:
        """float64, of the weights that share a scale."""
        written = self.encode(weight, parts)
        matrix = weight.mT if self.transposed else weight
        off = self.values(self.codes(written), written).double() - matrix.double()
        return self.reduced(off.square_(), parts, "sum")

    def mixed(self, first: Tensor, one: Parts, other: Parts) -> dict[str, Tensor]:
        """Scales of one where `first` is True, of the other elsewhere."""
        return {**other, SCALE: where_stored(first, one[SCALE], other[SCALE])}

    @abstractmethod
    def codes(self, parts: Parts) -> Tensor:
        """uint8 (..., out, in), one code for each weight."""

    @abstractmethod
    def values(self, codes: Tensor, parts: Parts) -> Tensor:
        """What the codes stand for: float32 (..., out, in)."""

    @abstractmethod
    def nearest(self, weight: Tensor, parts: Parts) -> Tensor:
        """Codes for float32 weights (..., out, in)."""

    @abstractmethod
    def reduced(self, matrix: Tensor, parts: Parts, how: str) -> Tensor:
        """The sum, the largest or the smallest ("sum", "amax", "amin") of the weights that share a scale.

        Args:
            matrix: (..., out, in); the largest is of what is not negative, the smallest of what is not positive.
            parts: of the weight.
            how: one of the three.

        Returns:
            The shape of the scales.
        """

    @abstractmethod
    def remade(self, weight: Tensor, parts: Parts) -> Iterator[Parts]:
        """Scales, and zero points, that suit a float32 weight (..., out, in): one or two proposals for all of them."""

    @abstractmethod
    def packed(self, codes: Tensor, parts: Parts) -> Tensor:
        """The tensor of the codes, as `parts` has it."""


def expect(info: TensorInfo, shape: Sequence[int]) -> None:
    """Raise a CheckpointError unless a tensor has this shape."""
    if tuple(info.shape) != tuple(shape):
        raise CheckpointError(f"{info.name} must be {list(shape)} to fit its weight, got {list(info.shape)}")
