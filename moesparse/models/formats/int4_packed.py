"""Integers in words, of compressed-tensors ("pack-quantized"): the experts of Kimi-K2-Thinking to Kimi-K2.6."""

from __future__ import annotations

import torch
from torch import Tensor

from moesparse.errors import CheckpointError
from moesparse.models.formats.base import CODES, SCALE, Infos, Parts, expect
from moesparse.models.formats.integers import ZERO, Integers
from moesparse.weights.codes import pack_words, reduced, spread, unpack_words

__all__ = ["SHAPE", "Int4Packed"]

SHAPE = "shape"


class Int4Packed(Integers):
    """Codes of `bits` along a row, in words int32 [out, in * bits / 32], and a scale for each group of a row.

    A code stands for itself less half of their number, or less its zero point, which lies in words along the outputs
    [out * bits / 32, in / group]. Codes of 3 bits lie without gaps, as compressed-tensors packs them since 0.18.

    Args:
        bits: 2, 3, 4 or 8.
        group: neighbours that share a scale; None is the whole row.
        symmetric: there are no zero points.
    """

    name = "int4_packed"
    mark = CODES

    def __init__(self, bits: int, group: int | None, symmetric: bool) -> None:
        self.bits, self.group, self.symmetric = bits, group, symmetric
        self.tensors = {CODES: ".weight_packed", SCALE: ".weight_scale", SHAPE: ".weight_shape"}
        self.dtypes = {CODES: ("I32",), SCALE: ("BF16", "F16", "F32"), SHAPE: ("I32", "I64"), ZERO: ("I32",)}
        if not symmetric:
            self.tensors |= {ZERO: ".weight_zero_point"}

    def matrix(self, infos: Infos) -> tuple[int, ...]:
        words, scale = infos[CODES].shape, infos[SCALE].shape
        columns = words[-1] * 32 // self.bits
        groups = 1 if self.group is None else -(-columns // self.group)
        if self.group is not None and columns % self.group:
            raise CheckpointError(
                f"{infos[CODES].name} must hold groups of {self.group} weights, got {columns} in a row"
            )
        expect(infos[SCALE], (*words[:-1], groups))
        expect(infos[SHAPE], (*words[:-2], 2))
        if ZERO in infos:
            expect(infos[ZERO], (*words[:-2], -(-words[-2] * self.bits // 32), scale[-1]))
        return (*words[:-1], columns)

    def codes(self, parts: Parts) -> Tensor:
        codes = unpack_words(parts[CODES], self.bits)
        stated = parts[SHAPE].flatten()[-2:].tolist()
        if list(codes.shape[-2:]) != stated:
            raise CheckpointError(f"weight_shape must be {list(codes.shape[-2:])}, as the words have it, got {stated}")
        return codes

    def packed(self, codes: Tensor, parts: Parts) -> Tensor:
        return pack_words(codes, self.bits)

    def zeros(self, parts: Parts) -> Tensor:
        if self.symmetric:
            return torch.tensor(float(2 ** (self.bits - 1)), device=parts[SCALE].device)
        return unpack_words(parts[ZERO].mT, self.bits).mT[..., : parts[SCALE].shape[-2], :].float()

    def packed_zeros(self, zeros: Tensor, parts: Parts) -> Tensor:
        return pack_words(zeros.mT.to(torch.uint8), self.bits).mT.contiguous()

    def spread(self, each: Tensor, parts: Parts, inputs: int) -> Tensor:
        return spread(each, self.group or inputs, inputs, -1)

    def reduced(self, matrix: Tensor, parts: Parts, how: str) -> Tensor:
        return reduced(matrix, (1, self.group or matrix.shape[-1]), how)
