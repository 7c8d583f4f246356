"""Where each tensor of a checkpoint lies inside the parameters of a model.

transformers fuses the experts of a layer into one parameter while loading and takes them apart again while saving.
Taking apart needs no copy: every tensor of the checkpoint is a strided view of one parameter. So a layer can be filled
from a checkpoint, and written to one, one expert's matrix at a time and without a second layer in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moesparse.errors import NotInPiecesError
from moesparse.models.blocks import MoEBlock

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["checkpoint_tensors", "checkpoint_views", "layers_prefix"]


class _Uncopied(Tensor):
    """A tensor whose `contiguous` and `clone` give itself: transformers' converters then yield views."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.contiguous, Tensor.clone):
            return args[0]
        return super().__torch_function__(func, types, args, kwargs or {})


def checkpoint_views(model: PreTrainedModel, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The checkpoint tensors that a part of the model's state is saved as.

    Args:
        model: of any transformers family; its converters are used, its tensors are not touched.
        state: names of the model's state dict -> tensors, on any device, also meta. All of one layer, or of all.

    Returns:
        Key in the checkpoint -> a view of one of the tensors given: reading and writing it reads and writes the model.
        On meta tensors, keys, shapes and dtypes alone.

    Raises:
        NotInPiecesError: a tensor is computed on saving, not cut out of a parameter.
    """
    views = checkpoint_tensors(model, state)
    owners = {tensor.untyped_storage()._cdata for tensor in state.values()}
    for key, view in views.items():
        if view.untyped_storage()._cdata not in owners:
            raise NotInPiecesError(
                f"{type(model).__name__} computes {key} when it is saved: it cannot be read or written piece by piece"
            )
    return views


def checkpoint_tensors(model: PreTrainedModel, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same for any family: views where a tensor is cut out of a parameter, new tensors where it is computed."""
    from transformers.core_model_loading import revert_weight_conversion

    found = revert_weight_conversion(model, {name: tensor.as_subclass(_Uncopied) for name, tensor in state.items()})
    return {key: tensor.as_subclass(Tensor) for key, tensor in found.items()}


def layers_prefix(model: PreTrainedModel, block: MoEBlock) -> str:
    """What stands in a checkpoint's keys before the number of a decoder layer, "model.layers."; any block will do."""
    state = {
        name: torch.empty_like(tensor, device="meta")
        for name, tensor in model.state_dict().items()
        if name.startswith(f"{block.layer}.")
    }
    key = next(iter(checkpoint_tensors(model, state)))
    return key[: key.index(f".{block.layer.rpartition('.')[2]}.") + 1]
