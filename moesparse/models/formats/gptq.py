"""GPTQ (arXiv 2210.17323) as AutoGPTQ and GPTQModel store it, with and without the order of activations."""

from __future__ import annotations

import torch
from torch import Tensor

from moesparse.errors import CheckpointError, UnsupportedModelError
from moesparse.models.formats.base import CODES, SCALE, Infos, Parts, expect
from moesparse.models.formats.integers import ZERO
from moesparse.models.formats.words import Words
from moesparse.weights.codes import pack_words, unpack_words

__all__ = ["Gptq"]

_GROUPS = "groups"


class Gptq(Words):
    """Words [in / 8, out] along the inputs, zero points [groups, out / 8] along the outputs, scales [groups, out].

    `g_idx` [in] names the group of each input; without it, groups are neighbours. In format 1 a zero point is stored
    less one. A stored 15 is 16 to one reader and 0 to another; so it is refused.

    Args:
        bits: 4 or 8.
        group: inputs that share a scale; -1 is all of them.
        ordered: `g_idx` must be there (desc_act).
        version: 1 ("gptq") or 2 ("gptq_v2").
        symmetric: every zero point is half of the number of codes (sym); there are kernels that take it for that.
    """

    name = "gptq"

    def __init__(self, bits: int, group: int, ordered: bool, version: int = 1, symmetric: bool = True) -> None:
        self.bits, self.group, self.version, self.symmetric = bits, group, version, symmetric
        self.lowest_zero = 1 if version == 1 else 0
        self.tensors = {CODES: ".qweight", SCALE: ".scales", ZERO: ".qzeros", _GROUPS: ".g_idx"}
        self.dtypes = {CODES: ("I32",), SCALE: ("F16", "BF16", "F32"), ZERO: ("I32",), _GROUPS: ("I32", "I64")}
        self.optional = () if ordered else (_GROUPS,)

    def matrix(self, infos: Infos) -> tuple[int, ...]:
        in_word = 32 // self.bits
        *outer, words, outputs = infos[CODES].shape
        inputs = words * in_word
        size = inputs if self.group == -1 else self.group
        if inputs % size:
            raise CheckpointError(f"{infos[CODES].name} must hold groups of {size} inputs, got {inputs}")
        expect(infos[SCALE], (*outer, inputs // size, outputs))
        expect(infos[ZERO], (*outer, inputs // size, -(-outputs // in_word)))
        if _GROUPS in infos:
            expect(infos[_GROUPS], (*outer, inputs))
        return (*outer, outputs, inputs)

    def codes(self, parts: Parts) -> Tensor:
        return unpack_words(parts[CODES].mT, self.bits)

    def zeros(self, parts: Parts) -> Tensor:
        zeros = unpack_words(parts[ZERO], self.bits)[..., : parts[SCALE].shape[-1]]
        if self.version == 1:
            if (zeros == 2**self.bits - 1).any():
                raise UnsupportedModelError(
                    f"qzeros must be below {2**self.bits - 1} in format gptq, got {2**self.bits - 1}, which readers "
                    "understand in different ways; save the model as gptq_v2"
                )
            zeros = zeros + 1
        return zeros.float()

    def group_of(self, parts: Parts, inputs: int) -> Tensor:
        if _GROUPS in parts:
            return parts[_GROUPS].long()
        return torch.arange(inputs, device=parts[CODES].device) // (inputs if self.group == -1 else self.group)

    def packed(self, codes: Tensor, parts: Parts) -> Tensor:
        return pack_words(codes, self.bits).mT.contiguous()

    def packed_zeros(self, zeros: Tensor, parts: Parts) -> Tensor:
        held = unpack_words(parts[ZERO], self.bits)
        held[..., : zeros.shape[-1]] = (zeros - self.lowest_zero).to(torch.uint8)
        return pack_words(held, self.bits)
