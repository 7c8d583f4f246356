"""Where each tensor of a checkpoint lies inside the parameters of a model.

transformers fuses the experts of a layer into one parameter while loading and takes them apart again while saving.
Taking apart needs no copy: every tensor of the checkpoint is a strided view of one parameter. So a layer can be filled
from a checkpoint, and written to one, one expert's matrix at a time and without a second layer in memory.

Checkpoints that were not saved by this transformers may hold the experts fused already, in either direction: those of
Qwen3.5-MoE and Qwen3-VL-MoE on the hub do. What a folder holds decides, then.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moesparse.errors import NotInPiecesError
from moesparse.models.blocks import MoEBlock
from moesparse.system.shards import Shards

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


def checkpoint_views(
    model: PreTrainedModel, state: Mapping[str, Tensor], shards: Shards | None = None
) -> dict[str, Tensor]:
    """The checkpoint tensors that a part of the model's state is saved as.

    Args:
        model: of any transformers family; its converters are used, its tensors are not touched.
        state: names of the model's state dict -> tensors, on any device, also meta. All of one layer, or of all.
        shards: of the checkpoint; where it holds fused experts under the model's own name, or transposed, as
            transformers reads them too, so do the views. None: as transformers saves the family.

    Returns:
        Key in the checkpoint -> a view of one of the tensors given: reading and writing it reads and writes the model.
        On meta tensors, keys, shapes and dtypes alone.

    Raises:
        NotInPiecesError: a tensor is computed on saving, not cut out of a parameter.
    """
    views = checkpoint_tensors(model, state, shards)
    owners = {tensor.untyped_storage()._cdata for tensor in state.values()}
    for key, view in views.items():
        if view.untyped_storage()._cdata not in owners:
            raise NotInPiecesError(
                f"{type(model).__name__} computes {key} when it is saved: it cannot be read or written piece by piece"
            )
    return views


def checkpoint_tensors(
    model: PreTrainedModel, state: Mapping[str, Tensor], shards: Shards | None = None
) -> dict[str, Tensor]:
    """The same for any family: views where a tensor is cut out of a parameter, new tensors where it is computed."""
    from transformers.core_model_loading import revert_weight_conversion

    held = {} if shards is None else {key: info.shape for key, info in shards.tensors.items() if len(info.shape) == 3}
    fused = {name: tensor for name, tensor in state.items() if name in held and _alike(held[name], tensor)}
    others: dict[str, Tensor] = {
        name: tensor.as_subclass(_Uncopied) for name, tensor in state.items() if name not in fused
    }
    # without any tensor to convert it gives a list
    found = dict(revert_weight_conversion(model, others)) if others else {}
    tensors = {key: tensor.as_subclass(Tensor) for key, tensor in found.items()} | fused
    other_way = [key for key, tensor in tensors.items() if key in held and not _alike(held[key], tensor)]
    turning = _turned_on_loading(model) if other_way else []
    for key in other_way:
        if any(pattern.search(key) for pattern in turning):
            tensors[key] = tensors[key].transpose(1, 2)
    return tensors


def _alike(held: tuple[int, ...], tensor: Tensor) -> bool:
    """Whether a stack in a folder is of matrices of the tensor's shape; there may be more of them in it."""
    return tensor.ndim == 3 and held[1:] == tuple(tensor.shape[1:])


def _turned_on_loading(model: PreTrainedModel) -> list[re.Pattern[str]]:
    """Found in the keys of tensors that transformers transposes on loading where they lie the other way round."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:
        conversions = get_model_conversion_mapping(model, add_legacy=False)
    return [
        re.compile(pattern)
        for each in conversions
        if any(getattr(operation, "check_dims", False) for operation in getattr(each, "operations", ()))
        for pattern in each._original_source_patterns
    ]


def layers_prefix(model: PreTrainedModel, block: MoEBlock) -> str:
    """What stands in a checkpoint's keys before the number of a decoder layer, "model.layers."; any block will do."""
    state = {
        name: torch.empty_like(tensor, device="meta")
        for name, tensor in model.state_dict().items()
        if name.startswith(f"{block.layer}.")
    }
    key = next(iter(checkpoint_tensors(model, state)))
    return key[: key.index(f".{block.layer.rpartition('.')[2]}.") + 1]
