"""AWQ, the "gemm" version of AutoAWQ (arXiv 2306.00978)."""

from __future__ import annotations

import torch
from torch import Tensor

from moesparse.errors import CheckpointError
from moesparse.models.formats.base import CODES, SCALE, Infos, Parts, expect
from moesparse.models.formats.integers import ZERO
from moesparse.models.formats.words import Words
from moesparse.weights.codes import pack_words, unpack_words

__all__ = ["Awq"]

# where the weights of eight neighbouring outputs lie in a word
_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)


class Awq(Words):
    """Words [in, out / 8] along the outputs, zero points [in / group, out / 8] alike, scales [in / group, out].

    Args:
        group: inputs that share a scale.
        has_zeros: False: a code stands for itself less 8, and there are no zero points.
    """

    name = "awq"
    bits = 4

    def __init__(self, group: int, has_zeros: bool = True) -> None:
        self.group, self.symmetric = group, not has_zeros
        self.tensors = {CODES: ".qweight", SCALE: ".scales"} | ({ZERO: ".qzeros"} if has_zeros else {})
        self.dtypes = {CODES: ("I32",), SCALE: ("F16", "BF16"), ZERO: ("I32",)}

    def matrix(self, infos: Infos) -> tuple[int, ...]:
        inputs, words = infos[CODES].shape[-2:]
        if inputs % self.group:
            raise CheckpointError(f"{infos[CODES].name} must hold groups of {self.group} inputs, got {inputs}")
        outer = infos[CODES].shape[:-2]
        expect(infos[SCALE], (*outer, inputs // self.group, words * 8))
        if ZERO in infos:
            expect(infos[ZERO], (*outer, inputs // self.group, words))
        return (*outer, words * 8, inputs)

    def codes(self, parts: Parts) -> Tensor:
        return _unpack(parts[CODES]).mT

    def zeros(self, parts: Parts) -> Tensor:
        if self.symmetric:
            return torch.tensor(8.0, device=parts[SCALE].device)
        return _unpack(parts[ZERO]).float()

    def packed(self, codes: Tensor, parts: Parts) -> Tensor:
        return _pack(codes.mT)

    def packed_zeros(self, zeros: Tensor, parts: Parts) -> Tensor:
        return _pack(zeros.to(torch.uint8))


def _unpack(words: Tensor) -> Tensor:
    return unpack_words(words, 4).unflatten(-1, (-1, 8))[..., list(_PLACES)].flatten(-2)


def _pack(codes: Tensor) -> Tensor:
    order = [_PLACES.index(place) for place in range(8)]
    return pack_words(codes.unflatten(-1, (-1, 8))[..., order].flatten(-2), 4)
