"""Integers in words, of compressed-tensors ("pack-quantized"): the experts of Kimi-K2-Thinking to Kimi-K2.6."""

from __future__ import annotations

import torch
from torch import Tensor

from moesparse.errors import CheckpointError
from moesparse.models.formats.base import CODES, SCALE, Coded, Infos, Parts, expect
from moesparse.models.formats.numbers import pack_words, scales_of, spread, unpack_words

__all__ = ["Int4Packed"]

_SHAPE, _ZERO = "shape", "zero"


class Int4Packed(Coded):
    """Codes of 4 or 8 bits along a row, eight or four to an int32 [out, in / 8], and a scale for each group of a row.

    A code stands for itself less half of their number, or less its zero point, which lies in words along the outputs
    [out / 8, in / group].

    Args:
        bits: 4 or 8.
        group: neighbours that share a scale; None is the whole row.
        symmetric: there are no zero points.
    """

    name = "int4_packed"
    mark = CODES

    def __init__(self, bits: int, group: int | None, symmetric: bool) -> None:
        self.bits, self.group, self.symmetric = bits, group, symmetric
        self.tensors = {CODES: ".weight_packed", SCALE: ".weight_scale", _SHAPE: ".weight_shape"}
        self.dtypes = {CODES: ("I32",), SCALE: ("BF16", "F16", "F32"), _SHAPE: ("I32", "I64"), _ZERO: ("I32",)}
        if not symmetric:
            self.tensors |= {_ZERO: ".weight_zero_point"}

    def matrix(self, infos: Infos) -> tuple[int, ...]:
        words, scale = infos[CODES].shape, infos[SCALE].shape
        in_word = 32 // self.bits
        columns = words[-1] * in_word
        groups = 1 if self.group is None else -(-columns // self.group)
        if self.group is not None and columns % self.group:
            raise CheckpointError(
                f"{infos[CODES].name} must hold groups of {self.group} weights, got {columns} in a row"
            )
        expect(infos[SCALE], (*words[:-1], groups))
        expect(infos[_SHAPE], (*words[:-2], 2))
        if _ZERO in infos:
            expect(infos[_ZERO], (*words[:-2], -(-words[-2] // in_word), scale[-1]))
        return (*words[:-1], columns)

    def codes(self, parts: Parts) -> Tensor:
        codes = unpack_words(parts[CODES], self.bits)
        stated = parts[_SHAPE].flatten()[-2:].tolist()
        if list(codes.shape[-2:]) != stated:
            raise CheckpointError(f"weight_shape must be {list(codes.shape[-2:])}, as the words have it, got {stated}")
        return codes

    def values(self, codes: Tensor, parts: Parts) -> Tensor:
        scale, zero = self._scale_and_zero(parts, codes.shape[-1])
        return codes.float().sub_(zero).mul_(scale)

    def nearest(self, weight: Tensor, parts: Parts) -> Tensor:
        scale, zero = self._scale_and_zero(parts, weight.shape[-1])
        codes = (weight / scale).nan_to_num(0).round() + zero
        return codes.clamp(0, 2**self.bits - 1).to(torch.uint8)

    def packed(self, codes: Tensor, parts: Parts) -> Tensor:
        return pack_words(codes, self.bits)

    def _scale_and_zero(self, parts: Parts, columns: int) -> tuple[Tensor, Tensor]:
        group = columns if self.group is None else self.group
        scale = spread(scales_of(parts[SCALE]), group, columns, -1)
        if self.symmetric:
            return scale, torch.tensor(float(2 ** (self.bits - 1)), device=scale.device)
        zero = unpack_words(parts[_ZERO].mT, self.bits).mT[..., : scale.shape[-2], :].float()
        return scale, spread(zero, group, columns, -1)
