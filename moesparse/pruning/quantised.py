"""What cannot be done to a quantised checkpoint, refused by name before any work."""

from __future__ import annotations

from moesparse.errors import UnsupportedModelError
from moesparse.experts.surgery import plan_removal
from moesparse.models.formats.expert_names import check_expert_names
from moesparse.models.on_disk import LayersOnDisk
from moesparse.pruning.plan import any_choice
from moesparse.pruning.recipe import Recipe

__all__ = ["check_plain_routers", "check_quantised"]


def check_quantised(layers: LayersOnDisk, recipe: Recipe) -> None:
    """Refuse what config.json alone says that a recipe would leave wrong, before any work.

    Args:
        layers: of any checkpoint.
        recipe: all of it.

    Raises:
        UnsupportedModelError: the folder names single experts, of which some would go, by patterns.
    """
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
    plan = plan_removal(layers.model, any_choice(layers.blocks, recipe))
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
