"""What may be done with layers that predict tokens further ahead (MTP), refused by name before any work."""

from __future__ import annotations

import os
import re

from moesparse.checkpoints.edit import SourceFolder
from moesparse.errors import CalibrationError, UsageError
from moesparse.models.meta import bare_model, read_config
from moesparse.models.on_disk import LayersOnDisk
from moesparse.pruning.recipe import Recipe
from moesparse.system.shards import Shards

__all__ = ["check_in_memory", "check_kept_or_dropped", "prepare_next_token_layers"]


def prepare_next_token_layers(layers: LayersOnDisk, recipe: Recipe, *, saved: bool) -> None:
    """Refuse a choice that the folder does not allow; where they are to be pruned they are layers like others then.

    Reads headers alone.

    Args:
        layers: of a folder.
        recipe: for it.
        saved: saved statistics take the place of text.

    Raises:
        UsageError: it has no such layers, or none with experts; or its config cannot say two counts of experts.
        UnsupportedModelError: they cannot be pruned, or not by data; named.
        CalibrationError: saved statistics, which hold none of their sums.
    """
    if recipe.mtp is None:
        return
    shards = Shards.open(layers.folder)
    _check(SourceFolder(layers.folder, layers.model, layers.model.config, shards, recipe.mtp), recipe)
    if recipe.mtp != "prune":
        return
    if saved:
        raise CalibrationError(
            "calibration must be windows to prune layers that predict further tokens (mtp='prune'), got statistics: "
            "they hold no sums of such layers"
        )
    layers.add_next_token_layers(run=not recipe.reads_weights_alone)


def check_kept_or_dropped(folder: str | os.PathLike[str], recipe: Recipe) -> None:
    """The same for a model that is loaded as a whole from a folder: such layers are not loaded, and cannot be pruned.

    Raises:
        UsageError: as above, and for "prune".
    """
    check_in_memory(read_config(folder), recipe)
    if recipe.mtp is not None:
        _check(SourceFolder(folder, bare_model(folder), read_config(folder), mtp=recipe.mtp), recipe)


def check_in_memory(config: object, recipe: Recipe) -> None:
    """Refuse to prune what transformers did not load.

    Args:
        config: of the model.
        recipe: for it.

    Raises:
        UsageError: names the choice.
    """
    if recipe.mtp == "prune":
        raise UsageError(
            "mtp must be 'keep', 'drop' or left out where the whole model is loaded, got 'prune': transformers leaves "
            f"the layers of {type(config).__name__} that predict further tokens in the folder; prune it layer by layer "
            "(moesparse.prune_checkpoint)"
        )


def _check(source: SourceFolder, recipe: Recipe) -> None:
    names = [name for name in source.shards.tensors if source.is_next_token(name)]
    if not names:
        raise UsageError(
            f"mtp must be left out for {source.folder}, got {recipe.mtp!r}: it has no layers that predict further "
            "tokens"
        )
    with_experts = [name for name in names if re.search(r"\bexperts\b", name)]
    if recipe.mtp == "prune" and not with_experts:
        raise UsageError(
            f"mtp must be 'keep', 'drop' or left out for {source.folder}, got 'prune': its layers that predict further "
            f"tokens have no experts ({names[0]})"
        )
    removes = recipe.removes_experts or (recipe.target_bytes is not None and "drop" in recipe.choices)
    if recipe.mtp == "keep" and removes and with_experts and not source.counts_apart:
        raise UsageError(
            f"mtp must be 'prune' or 'drop' where experts are removed from {source.folder}, got 'keep': its "
            f"config.json has one count of experts for all layers, and {with_experts[0]} is of one that would keep more"
        )
