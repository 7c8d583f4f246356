"""Our own packed n:m weights, docs/packed-format.md: the values that are kept and a bit for every weight."""

from __future__ import annotations

import torch
from torch import Tensor

from moesparse.errors import CheckpointError
from moesparse.models.formats.base import CODES, Format, Infos, Parts, expect
from moesparse_kernels.row_order import unpack_bits

__all__ = ["PackedNm"]

_MASK = "mask"


class PackedNm(Format):
    """Kept values [out, in / m * n], left to right, and bits [out, in / 8], the lowest of a byte first."""

    name = "packed_nm"
    own = ""
    tensors = {CODES: "", _MASK: "_meta"}  # noqa: RUF012
    mark = _MASK
    dtypes = {CODES: ("BF16", "F16", "F32"), _MASK: ("U8",)}  # noqa: RUF012

    def matrix(self, infos: Infos) -> tuple[int, ...]:
        *outer, kept = infos[CODES].shape
        words = infos[_MASK].shape[-1] if infos[_MASK].shape else 0
        expect(infos[_MASK], (*outer, words))
        if not 0 < kept < words * 8:
            raise CheckpointError(f"{infos[CODES].name} must hold fewer than {words * 8} in a row, got {kept}")
        return (*outer, words * 8)

    def decode(self, parts: Parts, dtype: torch.dtype) -> Tensor:
        """The weight, +0.0 where nothing is kept."""
        mask, values = unpack_bits(parts[_MASK]), parts[CODES]
        if not (mask.sum(-1) == values.shape[-1]).all():
            raise CheckpointError(f"a row must keep as many weights as it has values, {values.shape[-1]}")
        dense = torch.zeros(mask.shape, dtype=values.dtype, device=values.device)
        return dense.masked_scatter_(mask, values).to(dtype)

    def encode(self, weight: Tensor, parts: Parts) -> dict[str, Tensor]:
        """The weight's values where the mask has them.

        Raises:
            CheckpointError: one that is not zero where nothing is kept.
        """
        mask = unpack_bits(parts[_MASK])
        if weight[~mask].any():
            raise CheckpointError("a weight must be zero where its mask keeps none, got another value")
        return {**parts, CODES: weight[mask].view(parts[CODES].shape).to(parts[CODES].dtype)}
