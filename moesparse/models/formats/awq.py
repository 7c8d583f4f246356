"""AWQ, the "gemm" version of AutoAWQ (arXiv 2306.00978)."""

from __future__ import annotations

from torch import Tensor

from moesparse.errors import CheckpointError
from moesparse.models.formats.base import CODES, SCALE, Infos, Parts, expect
from moesparse.models.formats.numbers import pack_words, unpack_words
from moesparse.models.formats.words import ZERO, Words

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
        self.group, self.has_zeros = group, has_zeros
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
        if not self.has_zeros:
            return parts[SCALE].new_full((), 8.0).float().expand(parts[SCALE].shape)
        return _unpack(parts[ZERO]).float()

    def packed(self, codes: Tensor, parts: Parts) -> Tensor:
        order = [_PLACES.index(place) for place in range(8)]
        return pack_words(codes.mT.unflatten(-1, (-1, 8))[..., order].flatten(-2), self.bits)


def _unpack(words: Tensor) -> Tensor:
    return unpack_words(words, 4).unflatten(-1, (-1, 8))[..., list(_PLACES)].flatten(-2)
