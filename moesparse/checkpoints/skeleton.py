"""A checkpoint folder without its weights: the model on the "meta" device, and which expert lies where in which file.

Everything that works on checkpoints tensor by tensor (pack, unpack, inspect) starts here. Opening reads config.json,
the index and the headers; a folder whose tensors do not make the model that its config describes is refused before more
is read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from moesparse.errors import CheckpointError, MoESparseError, UnsupportedModelError, reason_of
from moesparse.models.blocks import MoEBlock, find_moe_blocks
from moesparse.models.formats.said import said_of
from moesparse.models.formats.stored import StoredWeights
from moesparse.models.meta import bare_model, check_layer_counts
from moesparse.packed.experts import META_SUFFIX, PACKED_DTYPES, MatrixLayout
from moesparse.system.shards import Shards, read_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.core_model_loading import WeightTransform

    from moesparse.packed.conversions import LoadPlan, Target
    from moesparse.packed.quantizer import MoESparseConfig

__all__ = ["Piece", "Skeleton", "StoredMatrix", "open_skeleton"]


@dataclass(frozen=True)
class Piece:
    """A part of an expert matrix that is read at once: whole rows [out, in] of one expert.

    Attributes:
        key: of the tensor in the checkpoint; of the kept values when packed.
        entry: which entry along the tensor's first dim; None when the piece is all of it.
        transposed: the tensor holds [in, out].
    """

    key: str
    entry: int | None
    transposed: bool

    def read(self, shards: Shards, suffix: str = "") -> Tensor:
        """The tensor [out, in] as it is stored, packed or not; `suffix` META_SUFFIX for the bitmask."""
        tensor = shards.read(self.key + suffix, self.entry)
        return tensor.t() if self.transposed else tensor


@dataclass(frozen=True)
class StoredMatrix:
    """One weight of every expert of a block, as a checkpoint holds it.

    Attributes:
        block: name of the block in the model.
        name: of the parameter, "gate_up_proj".
        shape: (E, out, in) of the dense weight.
        layout: when packed.
        keys: of its tensors; for a packed one those of the values, and each has a bitmask at key + "_meta".
        transposed: a dense tensor holds [in, out], one or a stack of them.
    """

    block: str
    name: str
    shape: tuple[int, int, int]
    layout: MatrixLayout | None
    keys: tuple[str, ...]
    transposed: bool

    def pieces(self, shards: Shards, *keys: str) -> Iterator[Piece]:
        """Those of some of its tensors, of all when no key is given."""
        for key in keys or self.keys:
            shape = shards.tensors[key].shape
            if len(shape) == 2:
                yield Piece(key, None, self.transposed)
            else:
                for entry in range(shape[0]):
                    yield Piece(key, entry, self.transposed)


@dataclass(frozen=True)
class Skeleton:
    """A checkpoint folder that was opened.

    Attributes:
        folder: where it lies.
        config: its config.json.
        shards: its tensors.
        model: on the "meta" device, with SparseExperts where the checkpoint is packed.
        blocks: all MoE blocks, as the dense model has them.
        dense_parameters: parameters of the dense model.
        packing: its quantization_config, None for a dense checkpoint.
        conversions: with which transformers loads it.
        plan: what becomes of its keys.
    """

    folder: Path
    config: dict[str, Any]
    shards: Shards
    model: PreTrainedModel
    blocks: list[MoEBlock]
    dense_parameters: int
    packing: MoESparseConfig | None
    conversions: list[WeightTransform]
    plan: LoadPlan

    @property
    def quantised(self) -> StoredWeights | None:
        """Its weights, where some are quantised by another method than ours."""
        return self.shards if isinstance(self.shards, StoredWeights) and self.shards.stored else None

    @property
    def recipe(self) -> dict[str, Any] | None:
        """How config.json says the model was pruned."""
        recipe = self._noted.get("recipe")
        return recipe if isinstance(recipe, dict) else None

    @property
    def earlier(self) -> list[dict[str, Any]]:
        """The recipes of the commands before the last one, as config.json says them."""
        found = self._noted.get("earlier")
        return [each for each in found if isinstance(each, dict)] if isinstance(found, list) else []

    @property
    def _noted(self) -> dict[str, Any]:
        noted = self.config.get("moesparse")
        return noted if isinstance(noted, dict) else {}

    def matrices(self, block: MoEBlock) -> list[StoredMatrix]:
        """The matrices of a block.

        Raises:
            CheckpointError: one is missing, of another shape than the model's, or packed in a dtype that cannot be.
            UnsupportedModelError: it is stored in a way that cannot be read expert by expert.
        """
        return [self._matrix(block, matrix.name, tuple(matrix.weight.shape)) for matrix in block.matrices]  # type: ignore[arg-type]

    def _matrix(self, block: MoEBlock, name: str, shape: tuple[int, int, int]) -> StoredMatrix:
        packed = self.packing is not None and block.name in self.packing.blocks
        target = self._target(f"{block.name}.{name}")
        if not packed:
            stored = self.shards.tensors[target.keys[0]].shape
            return StoredMatrix(block.name, name, shape, None, target.keys, _is_transposed(block, target, stored))
        assert self.packing is not None
        metas = self._target(f"{block.name}.{name}{META_SUFFIX}")
        if metas.keys != tuple(key + META_SUFFIX for key in target.keys):
            raise CheckpointError(f"{target.keys[0]} must have its bitmask beside it, got {metas.keys[0]}")
        tensors = self.shards.tensors
        dtype = tensors[target.keys[0]].torch_dtype
        for key in target.keys:
            if dtype not in PACKED_DTYPES or tensors[key].torch_dtype != dtype:
                raise CheckpointError(
                    f"{key} must be of the one dtype of its matrix, BF16, F16 or F32, to be packed, got "
                    f"{tensors[key].dtype} beside {tensors[target.keys[0]].dtype}"
                )
            if tensors[key + META_SUFFIX].dtype != "U8":
                raise CheckpointError(f"{key}{META_SUFFIX} must be U8, got {tensors[key + META_SUFFIX].dtype}")
        layout = self.packing.layout(block.name, name, shape)
        return StoredMatrix(block.name, name, shape, layout, target.keys, False)

    def _target(self, name: str) -> Target:
        target = self.plan.targets.get(name)
        if target is None:
            raise CheckpointError(f"the checkpoint {self.folder} must hold {name}, got none of its tensors")
        if target.problem:
            raise CheckpointError(f"the checkpoint {self.folder} does not fit its config.json: {name} {target.problem}")
        return target


def _is_transposed(block: MoEBlock, target: Target, stored: tuple[int, ...]) -> bool:
    from transformers.core_model_loading import Concatenate, MergeModulelist, Transpose

    transposed = block.is_transposed
    for operation in target.operations:
        if isinstance(operation, Transpose) and {operation.dim0, operation.dim1} == {1, 2}:
            # some are transposed on loading only where they lie the other way round
            turned = not getattr(operation, "check_dims", False) or stored != target.wanted
            transposed ^= turned
        elif not (isinstance(operation, MergeModulelist | Concatenate) and operation.dim in (0, 1)):
            raise UnsupportedModelError(
                f"{block.name}: this family's checkpoints must store experts as matrices to be read one by one, got "
                f"{type(operation).__name__} on loading; load the model and save it with moesparse.save_pretrained"
            )
    if transposed and len(target.operations) > 0 and any(isinstance(op, Concatenate) for op in target.operations):
        raise UnsupportedModelError(f"{block.name}: this family joins transposed experts, which is not supported here")
    return transposed


def open_skeleton(folder: str | os.PathLike[str]) -> Skeleton:
    """Open a checkpoint folder, dense or packed. Reads no weights and runs no code of it.

    Of a quantised checkpoint the shards are `StoredWeights`: its weights are read as matrices.

    Raises:
        CheckpointError: a file is missing, damaged or hostile, or config.json describes no model or another one, or the
            tensors contradict it.
        UnsupportedModelError: a model without experts that fit, or quantised in a way that is not known.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping

    from moesparse.packed.conversions import packed_conversions, plan_loading
    from moesparse.packed.quantizer import METHOD, MoESparseConfig, insert_packed

    folder = Path(folder)
    if not (folder / "config.json").exists():
        raise CheckpointError(f"MODEL must be a folder with a config.json, got {folder} without one")
    config = read_json(folder / "config.json")
    shards = Shards.open(folder)
    check_layer_counts(config, folder, len(shards.tensors))
    said = said_of(folder)
    packed = said is not None and said.get("quant_method") == METHOD
    try:
        packing = MoESparseConfig(**said) if said is not None and packed else None
    except MoESparseError:
        raise
    except Exception as error:  # whatever is said to a hostile entry
        raise CheckpointError(f"{folder / 'config.json'} must hold our packing, got {reason_of(error)}") from error
    model = bare_model(folder)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    conversions = get_model_conversion_mapping(model)
    blocks = find_moe_blocks(model) if packing is None else insert_packed(model, packing)
    if packing is not None:
        conversions = packed_conversions(conversions, packing.blocks)
    else:
        shards = StoredWeights.of_folder(folder, model.dtype)
    plan = plan_loading(model, conversions, {name: info.shape for name, info in shards.tensors.items()})
    if isinstance(shards, StoredWeights):
        shards.check_plain(name for name in shards.tensors if name not in plan.unexpected)
    return Skeleton(folder, config, shards, model, blocks, parameters, packing, conversions, plan)
