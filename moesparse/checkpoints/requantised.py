"""Weights of a layer on their way back into the formats of the quantised folder that they were read from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from moesparse.checkpoints.edit import SourceFolder
from moesparse.models.blocks import MoEBlock
from moesparse.models.formats.rounding import Rounding
from moesparse.models.formats.stored import Stored, StoredWeights

__all__ = ["requantise"]


@torch.no_grad()
def requantise(
    source: SourceFolder, block: MoEBlock, views: Mapping[str, Tensor], kept: Mapping[int, Sequence[int]]
) -> tuple[dict[str, Tensor], Rounding | None]:
    """Bring the experts of a block back into the formats of their folder; what is not quantised there stays.

    The model gets the values that were stored. Memory: the tensors of the block as they are stored, and one matrix.

    Args:
        source: the folder that the model was read from.
        block: of the model, in memory.
        views: key in the checkpoint -> tensor of the model, of the block's layer.
        kept: as `SourceFolder.kept` gives it.

    Returns:
        Name in a checkpoint -> tensor, codes, scales and all; and the rounding of the matrices that have changed, None
        where nothing is quantised.
    """
    experts = {matrix.parameter.untyped_storage()._cdata for matrix in block.matrices}
    tensors: dict[str, Tensor] = {}
    rounding = Rounding()
    for key, view in views.items():
        name = source.name_of(key, kept)
        stored = source.weights.stored.get(name)
        if stored is None or view.is_meta or view.untyped_storage()._cdata not in experts:
            continue
        entries: Sequence[int | None] = [None]
        if source.weights.is_stacked(name):
            entries = source.ids_of(key, kept) or range(len(view))
        written = []
        for place, entry in enumerate(entries):
            matrix = view if entry is None else view[place]
            found, one = _written(source.weights, stored, name, entry, matrix)
            written.append(found)
            rounding += one
        for what, part in stored.format.names(key).items():
            if what in stored.names:
                each = [found[what] for found in written]
                tensors[part] = each[0] if entries[0] is None else torch.stack(each)
    return tensors, rounding if tensors else None


def _written(
    weights: StoredWeights, stored: Stored, name: str, entry: int | None, matrix: Tensor
) -> tuple[dict[str, Tensor], Rounding]:
    """The tensors of a matrix, which gets the values that they stand for; the folder's own where it has not changed."""
    wanted, parts = matrix.cpu(), weights.parts_of(name, entry)
    if stored.format.decode(parts, matrix.dtype).equal(wanted):
        return parts, Rounding()
    found = stored.format.requantise(wanted, parts)
    values = stored.format.decode(found, matrix.dtype)
    rounding = Rounding.of(values, wanted)
    # the same memory as `wanted`, on a CPU
    matrix.copy_(values)
    return found, rounding
