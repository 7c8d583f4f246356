"""What a quantised checkpoint asks of a run: what cannot be done is refused by name, and bytes are as on the disk."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from moesparse.calibration.plan import Plan, file_flops
from moesparse.checkpoints.edit import SourceFolder
from moesparse.errors import UnsupportedModelError
from moesparse.experts.surgery import plan_removal
from moesparse.models.formats.expert_names import check_expert_names
from moesparse.models.on_disk import LayersOnDisk
from moesparse.pruning.plan import any_choice
from moesparse.pruning.recipe import Recipe
from moesparse.system.shards import INDEX_FILE, SINGLE_FILE

__all__ = ["check_plain_routers", "check_quantised", "plan_quantised"]


def check_quantised(layers: LayersOnDisk, recipe: Recipe) -> None:
    """Refuse what config.json alone says that a recipe would leave wrong, before any work.

    Args:
        layers: of any checkpoint.
        recipe: all of it.

    Raises:
        UnsupportedModelError: the folder names single experts, of which some would go, by patterns; weights that would
            change are packed.
    """
    if layers.packed and (recipe.changes_weights or recipe.refits_experts or recipe.merges_experts):
        what = "its weights pruned" if recipe.prunes_weights else f"its experts refitted (update={recipe.update!r})"
        what = "its experts merged" if recipe.merges_experts else what
        what = what if recipe.prunes_weights or recipe.values is None else "its values rounded"
        raise UnsupportedModelError(
            f"{layers.folder} must be dense to have {what}, got packed n:m weights, in which what is no zero has its "
            "place: make it dense with `moesparse unpack`, or remove experts alone, without a refit (update='none')"
        )
    if layers.said is not None and layers.output_dtype is None and recipe.values is not None:
        raise UnsupportedModelError(
            f"{layers.folder} must be plain to have its values rounded, got a quantised checkpoint, whose formats they "
            "would be rounded to once more: give output_dtype='bfloat16'"
        )
    if layers.said is not None and layers.output_dtype is None and recipe.removes_experts:
        check_expert_names(layers.said, "quantization_config")


def check_plain_routers(layers: LayersOnDisk, recipe: Recipe) -> None:
    """Refuse a removal that would cut rows out of a quantised matrix other than those of the experts, before any work.

    Args:
        layers: opened.
        recipe: of a removal, or not.

    Raises:
        UnsupportedModelError: names the tensor.
    """
    stored = layers.shards.stored
    if not stored or not recipe.removes_experts:
        return
    plan = plan_removal(layers.model, any_choice(layers.blocks, recipe), allow_non_uniform=True)
    cut = {each.path for cuts in plan.cuts for each in cuts}
    for position in range(len(layers)):
        routers = {
            tensor.untyped_storage()._cdata
            for name, tensor in layers.state(position).items()
            if name in cut and tensor.ndim < 3
        }
        for key, view in layers.checkpoint_tensors(position).items():
            if key in stored and view.untyped_storage()._cdata in routers:
                raise UnsupportedModelError(
                    f"{key} must be plain for experts to be removed, got {stored[key].format.name}: rows are not cut "
                    "out of quantised routers"
                )


def plan_quantised(plan: Plan, layers: LayersOnDisk, recipe: Recipe) -> Plan:
    """A plan that knows the bytes on the disk; as it is for a plain checkpoint, or where there are no shards.

    Reads the headers of the shards. Where no text is run nothing is dequantised, and the plan says so.

    Args:
        plan: from the config.
        layers: not opened.
        recipe: of the run.

    Raises:
        CheckpointError: the folder is damaged, or contradicts itself.
    """
    if layers.said is None or not any((layers.folder / name).exists() for name in (SINGLE_FILE, INDEX_FILE)):
        return plan
    weights = layers.headers
    source = SourceFolder(layers.folder, layers.model, layers.model.config, weights, recipe.mtp)
    kept: dict[int, Sequence[int]] = {}
    if recipe.removes_experts:
        numbers = [int(block.layer.rpartition(".")[2]) for block in layers.blocks]
        kept = dict(zip(numbers, (ids.tolist() for ids in any_choice(layers.blocks, recipe)), strict=True))
    copies, _ = source.others((), kept)
    experts, after, largest = layers.blocks[0].num_experts, 0, 0
    for name in copies.values():
        info, ids = weights.raw.tensors[name], source.ids_of(name, kept)
        # what is there once for all experts of a layer
        stacked = ids is not None and ".experts." in name and info.shape[:1] == (experts,)
        after += info.nbytes * len(ids) // experts if stacked and ids is not None else info.nbytes
        largest = max(largest, info.nbytes if stacked else 0)
    known = dataclasses.replace(plan, formats=tuple(weights.formats), stored=weights.on_disk.nbytes, stored_after=after)
    copies_alone = recipe.reads_weights_alone and not recipe.scores_weights and not recipe.merges_experts
    if recipe.prunes_weights or recipe.output_dtype is not None or not copies_alone:
        return known
    plain_tensors = {key: info for key, info in weights.tensors.items() if key not in weights.stored}
    plain = [
        sum(plain_tensors[key].nbytes for key in layers.checkpoint_tensors(position) if key in plain_tensors)
        for position in range(len(layers))
    ]
    return dataclasses.replace(
        known,
        layer=max(plain),
        # all of the stack is read, and what stays of it taken out
        workspace=2 * largest,
        flops=dict.fromkeys(plan.flops, 0.0) | {"files": file_flops(after, after)},
    )
