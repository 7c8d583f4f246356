"""The folder that a model in memory came from, and whether the model can be written as that folder, edited."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moesparse.checkpoints.edit import SourceFolder, Surplus
from moesparse.checkpoints.skeleton import open_skeleton
from moesparse.errors import CheckpointError, UnsupportedModelError
from moesparse.models.keys import checkpoint_tensors
from moesparse.models.meta import LAYER_COUNT, bare_model, dtype_of, quantization_of, read_config
from moesparse.packed.experts import META_SUFFIX
from moesparse.packed.model import packed_blocks
from moesparse.system.folders import companions
from moesparse.system.json_text import json_with, json_without
from moesparse.system.shard_writer import write_shards
from moesparse.system.shards import Shards

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from moesparse.packed.conversions import Patterns

__all__ = ["EditedModel", "edited_model", "is_packed", "other_dtype", "stores_other_dtypes"]

_PACKING = "quantization_config"


def stores_other_dtypes(source: Path, dtype: torch.dtype) -> bool:
    """Whether a folder holds matrices of experts in another dtype than a model runs in, whose own lack bits of them."""
    try:
        skeleton = open_skeleton(source)
        keys = {key for block in skeleton.blocks for matrix in skeleton.matrices(block) for key in matrix.keys}
    except (CheckpointError, UnsupportedModelError):
        return False
    return any(skeleton.shards.tensors[key].torch_dtype != dtype for key in keys)


def is_packed(folder: Path) -> bool:
    """Whether a folder holds experts packed by moesparse."""
    from moesparse.packed.quantizer import METHOD

    return (folder / "config.json").is_file() and quantization_of(read_config(folder)) == METHOD


@dataclass(frozen=True)
class EditedModel:
    """A model as the folder it came from, edited.

    Attributes:
        model: as it is in memory.
        source: the folder.
        tensors: key in the checkpoint -> tensor of the model; of a packed matrix its values, and its bitmasks.
        known: keys that the model has a place for.
        blocks: the packed blocks of the result; None where it is dense.
    """

    model: PreTrainedModel
    source: SourceFolder
    tensors: dict[str, Tensor]
    known: Collection[str]
    blocks: Patterns | None

    def write(self, folder: Path, max_shard_bytes: int) -> Surplus:
        """Write weights, index and config.json; what the model has no place for is carried over."""
        from moesparse.packed.quantizer import packed_config

        source, kept = self.source, self.source.kept()
        packed = {name: each for name, each in self.tensors.items() if _is_packed(name, self.tensors)}
        dense = {name: each for name, each in self.tensors.items() if name not in packed}
        changed = source.changed(dense, kept) | packed
        masks = {name for name in source.shards.tensors if name.endswith(META_SUFFIX)}
        copies, dropped = source.others({*changed, *masks}, kept)
        write_shards(folder, changed, max_shard_bytes, (copies, source.shards)).write_index()
        text = source.config(bool(dropped), kept)
        if self.blocks is None:
            text = json_without(text, _PACKING)
        else:
            text = json_with(text, {(_PACKING,): packed_config(self.model, self.blocks).to_dict()})
        (folder / "config.json").write_bytes(text.encode())
        return source.became(copies, dropped, {name for key, name in copies.items() if key not in self.known})


def edited_model(
    model: PreTrainedModel,
    state: Mapping[str, Tensor],
    blocks: Patterns | None,
    source: str | os.PathLike[str],
    mtp: str | None = None,
) -> EditedModel | str:
    """How a model is written as a folder, edited; or in words why it cannot be.

    Args:
        model: whose converters are those of the form to save (`packed_metadata`).
        state: its state dict in that form.
        blocks: the packed blocks of that form; None for a dense one.
        source: the folder.
        mtp: what becomes of layers of it that predict further tokens, as in `SourceFolder`.
    """
    from moesparse.packed.quantizer import METHOD

    folder = Path(source)
    if not (folder / "config.json").is_file():
        return "it holds no config.json"
    try:
        config = read_config(folder)
        if quantization_of(config) not in (None, METHOD):
            return "it is quantised"
        edit = SourceFolder(folder, _dense_twin(model, folder), config, mtp=mtp)
        companions(folder)
        tensors = _tensors_of(model, state, edit.shards)
        problem = _unfit(edit, tensors, config)
    except (CheckpointError, UnsupportedModelError) as error:
        return str(error)
    if problem is not None:
        return problem
    known = {*tensors, *(getattr(model, "all_tied_weights_keys", None) or {})}
    return EditedModel(model, edit, tensors, known, blocks)


def other_dtype(source: Path, dtype: torch.dtype) -> str | None:
    """In words, that a model is in another dtype than transformers loads its folder in; None where it is not."""
    try:
        own = dtype_of(source, read_config(source))
    except (CheckpointError, UnsupportedModelError):
        return None
    return None if own == dtype else f"it is loaded in {own} and the model is in {dtype}; source= names it all the same"


def _dense_twin(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The model, or where its experts are packed one without weights that has its config."""
    if not any(True for _ in packed_blocks(model)):
        return model
    twin: Any = bare_model(folder)
    twin = twin.to(model.dtype)
    twin.config = model.config
    return twin


def _unfit(edit: SourceFolder, tensors: Mapping[str, Tensor], config: Any) -> str | None:
    """Why a folder is not the one that the tensors are an edit of."""
    if config.model_type != edit.model_type:
        return f"it holds a {config.model_type}"
    counts = [".".join(path) for path in edit.settings() if LAYER_COUNT.search(path[-1])]
    if counts:
        return f"it has another {counts[0]}"
    try:
        kept = edit.kept()
    except (KeyError, ValueError):
        return "other experts were removed there"
    stored = edit.shards.tensors
    for key, tensor in tensors.items():
        name = edit.name_of(key.removesuffix(META_SUFFIX), kept)
        if name not in stored:
            return f"it holds no {name}"
        is_packed = _is_packed(key, tensors) or name + META_SUFFIX in stored
        if not is_packed and not edit.fits(key, stored[name].shape, tensor.shape, kept):
            return f"{name} has another shape there"
    return None


def _is_packed(key: str, tensors: Mapping[str, Tensor]) -> bool:
    return key.endswith(META_SUFFIX) or key + META_SUFFIX in tensors


def _tensors_of(model: PreTrainedModel, state: Mapping[str, Tensor], shards: Shards) -> dict[str, Tensor]:
    """Key in a checkpoint -> tensor of a model; a tied weight comes once, or twice where the shards hold it twice."""

    def is_twin(name: str, other: str) -> bool:
        both = name in shards.tensors and other in shards.tensors
        return both and torch.equal(shards.read(name), shards.read(other))

    tied = getattr(model, "all_tied_weights_keys", None) or {}
    left = {name: each for name, each in state.items() if name not in tied or is_twin(name, tied[name])}
    return checkpoint_tensors(model, left, shards)
