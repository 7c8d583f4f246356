"""Rounded weights of experts on their way into a checkpoint: codes and scales, expert by expert."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moesparse.errors import UnsupportedModelError
from moesparse.models.blocks import ExpertMatrix, MoEBlock
from moesparse.models.formats.written import format_of, said_of_values, written
from moesparse.models.on_disk import LayersOnDisk
from moesparse.weights.value_formats import Scales, ValueFormat

__all__ = ["CodedExperts", "expert_keys"]

_INSTEAD = ": fake_quantised=True stores the rounded values plain"


class CodedExperts:
    """How the experts of a checkpoint are stored whose values are rounded to a format.

    Attributes:
        values: the format of the values.
        format: that of the tensors.

    Args:
        layers: of the source, whose names the tensors go by.
        values: any but bf16.

    Raises:
        UnsupportedModelError: experts that no loader would find in codes, or blocks of rows that are cut through.
    """

    def __init__(self, layers: LayersOnDisk, values: ValueFormat) -> None:
        self.values, family = values, str(layers.model.config.model_type)
        ranks = set()
        for position in range(len(layers)):
            for key, part in _experts(layers.checkpoint_tensors(position), layers.blocks_at(position)).items():
                ranks.add(part.view.ndim)
                if part.view.ndim == 2:
                    self._check_rows(key, part)
        self._stacked = ranks == {3}
        if 3 in ranks and not (self._stacked and family == "gpt_oss" and values.kind == "mxfp4"):
            wanted = "mxfp4" if family == "gpt_oss" else "left out"
            raise UnsupportedModelError(
                f"values must be {wanted} to be stored as codes of {family}, whose checkpoints hold the experts of a "
                f"layer in one tensor, got {values}{_INSTEAD}"
            )
        self.format = format_of(values, stacked=self._stacked)

    def _check_rows(self, key: str, part: _Part) -> None:
        block, (_, rows) = self.values.rows, part.place(key)
        if block > 1 and (rows.step != 1 or rows.start % block):
            raise UnsupportedModelError(
                f"{key} must start at a whole block of {block} rows for values {self.values}, got row {rows.start} of "
                f"what the model holds together{_INSTEAD}"
            )
        size = part.view.shape[1]
        if self.values.kind == "int" and size * self.values.bits % 32:
            raise UnsupportedModelError(
                f"{key} must have rows of a multiple of {32 // self.values.bits} for values {self.values}, got {size}"
                f"{_INSTEAD}"
            )

    def said(self, plain: Sequence[str]) -> dict[str, object]:
        """quantization_config of the result, in which these modules are plain."""
        return said_of_values(self.values, plain, stacked=self._stacked)

    @torch.no_grad()
    def tensors(
        self, views: Mapping[str, Tensor], blocks: Sequence[MoEBlock], scales: Mapping[str, Sequence[Scales]]
    ) -> dict[str, Tensor]:
        """Name in the checkpoint -> tensor on the CPU, of the experts of a layer; memory: these, and one matrix.

        Args:
            views: key in the checkpoint -> tensor of the model.
            blocks: of the layer, rounded.
            scales: block name -> those of each of its matrices.
        """
        found: dict[str, Tensor] = {}
        for key, part in _experts(views, blocks).items():
            held, weight = scales[part.block][part.number], part.matrix.weight
            if part.view.ndim == 3:
                each = [self._written(weight[expert], held, expert) for expert in range(len(weight))]
                tensors = {what: torch.stack([one[what] for one in each]) for what in each[0]}
            else:
                tensors = self._written(part.view, held, *part.place(key))
            found |= {self.format.names(key)[what]: tensor for what, tensor in tensors.items()}
        return found

    def _written(self, weight: Tensor, scales: Scales, expert: int, rows: slice = slice(None)) -> dict[str, Tensor]:
        """Of one expert's matrix, or of some of its rows."""
        block, out = self.values.rows, weight.shape[0]
        start = (rows.start or 0) // block
        blocks = rows if block == 1 else slice(start, start - (-out // block))
        zero = None if scales.zero is None else scales.zero[expert, blocks]
        whole = None if scales.whole is None else scales.whole[expert]
        own = Scales(scales.stored[expert, blocks], zero, whole)
        parts = written(weight, own, self.values, stacked=self._stacked)
        return {what: part.cpu() for what, part in parts.items()}


def expert_keys(views: Mapping[str, Tensor], blocks: Sequence[MoEBlock]) -> set[str]:
    """Of the matrices of experts among the tensors of a layer."""
    return set(_experts(views, blocks))


@dataclass(frozen=True)
class _Part:
    """A tensor of a checkpoint that is cut out of the matrices of a block.

    Attributes:
        block: its name.
        matrix: it is cut out of, and
        number: which one of the block.
        view: of the model.
    """

    block: str
    matrix: ExpertMatrix
    number: int
    view: Tensor

    def place(self, key: str) -> tuple[int, slice]:
        """The expert and the rows of its matrix that it is.

        Raises:
            UnsupportedModelError: it is no rows.
        """
        view, (_, out, size) = self.view, self.matrix.weight.shape
        expert, offset = divmod(int(view.storage_offset() - self.matrix.parameter.storage_offset()), out * size)
        start, column = divmod(offset, size)
        step, off = divmod(view.stride(0), size)
        if self.matrix.transposed or view.shape[1] != size or view.stride(1) != 1 or column or off:
            raise UnsupportedModelError(
                f"{key} must be rows of {self.matrix.name} to be stored as codes, got others{_INSTEAD}"
            )
        return expert, slice(start, start + step * (len(view) - 1) + 1, step)


def _experts(views: Mapping[str, Tensor], blocks: Sequence[MoEBlock]) -> dict[str, _Part]:
    """Key in the checkpoint -> what it is cut out of."""
    owners = {
        matrix.parameter.untyped_storage()._cdata: (block.name, matrix, number)
        for block in blocks
        for number, matrix in enumerate(block.matrices)
    }
    found = {key: (owners.get(view.untyped_storage()._cdata), view) for key, view in views.items()}
    return {key: _Part(*owner, view) for key, (owner, view) in found.items() if owner is not None}
