"""Carry a recipe out: one pipeline for a model in memory and for a checkpoint on the disk.

`Layers` says where layers come from, `Output` where finished ones go, `Calibration` where sums come from. The doors in
run.py choose them; nothing here knows which ones they are.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

from torch import nn

from moesparse._version import __version__
from moesparse.calibration.data import Calibration, FromText, Nothing, Saved
from moesparse.checkpoints.history import following
from moesparse.checkpoints.output import InPlace, Output
from moesparse.errors import CalibrationError, UnsupportedModelError
from moesparse.experts.criteria import aimer_scores
from moesparse.experts.origin import Origin
from moesparse.experts.plan_file import ExpertPlan
from moesparse.models.layers import Layers, LayersInMemory, RunOptions
from moesparse.models.look import Look
from moesparse.models.meta import quantization_of
from moesparse.pruning.recipe import Recipe
from moesparse.pruning.removal import check_removal, remove_experts
from moesparse.pruning.report import Report, expert_sizes
from moesparse.pruning.weights import prune_weights

__all__ = ["both_steps", "carry_out", "carry_out_in_place", "check_not_quantized", "check_work"]


def carry_out(layers: Layers, output: Output, calibration: Calibration, recipe: Recipe, options: RunOptions) -> Report:
    """One step of a recipe, experts or weights, on a model whose layers come one at a time.

    Args:
        layers: of the model.
        output: where finished layers go.
        calibration: where the sums come from.
        recipe: of one step: it removes experts, or it works on weights; see `check_work`.
        options: of the run.

    Raises:
        MoESparseError: a weight of an expert is not finite.
        CalibrationError: the model was pruned before, or statistics are of another one.
        UnsupportedModelError: text cannot be run through the model layer by layer.
    """
    started = time.perf_counter()
    score = aimer_scores if recipe.scores_weights else None
    reads = not isinstance(calibration, Nothing) or score is not None or recipe.merges_experts
    values = not recipe.removes_experts or reads
    look = Look(layers, options, dense=isinstance(calibration, FromText), values=values, score=score)
    stream = calibration.stream(layers, options, look, output.spill)
    before, fingerprint = expert_sizes(layers.model, layers.blocks), look.fingerprint if look.complete else None
    experts, blocks, plan = None, [], None
    if recipe.removes_experts:
        origin = Origin.of(layers.model, layers.blocks, look.routers)
        removed, plan = remove_experts(layers, output, stream, calibration, recipe, options, look, origin)
        layers.find_blocks()
        experts = removed.to_dict()
    else:
        if isinstance(calibration, Saved):
            calibration.only.check_fingerprint(look.fingerprint)
        blocks = prune_weights(layers, output, stream, calibration, recipe, options)
    return Report(
        recipe=recipe.to_dict(),
        version=__version__,
        blocks=blocks,
        calibration=calibration.describe(),
        seconds=time.perf_counter() - started,
        experts=experts,
        fingerprint=fingerprint,
        sizes={"before": before, "after": expert_sizes(layers.model, layers.blocks, recipe)},
        plan=plan,
    )


def carry_out_in_place(model: nn.Module, calibration: Calibration, recipe: Recipe, options: RunOptions) -> Report:
    """All of a recipe on a model in memory: experts first, and the weights are then scored on what is left."""
    layers = LayersInMemory(model)
    check_work(layers, calibration, recipe)
    steps = [recipe]
    if recipe.removes_experts and recipe.changes_weights:
        steps = [recipe.without_weights(), recipe.without_experts()]
    reports = [carry_out(layers, InPlace(layers), calibration, step, options) for step in steps]
    return reports[0] if len(reports) == 1 else both_steps(recipe, reports[0].to_dict(), reports[0].plan, reports[1])


def both_steps(recipe: Recipe, removed: dict[str, Any], plan: ExpertPlan | None, pruned: Report) -> Report:
    """The report of a recipe of two steps.

    Args:
        recipe: of both.
        removed: `Report.to_dict` of the removal.
        plan: of the removal.
        pruned: of the weights that are left.
    """
    found = following(removed, pruned.to_dict())
    joined = {name: found[name] for name in ("experts", "fingerprint", "sizes", "surplus")}
    joined |= {"seconds": pruned.seconds + removed["seconds"], "plan": plan}
    return dataclasses.replace(pruned, recipe=recipe.to_dict(), **joined)


def check_not_quantized(config: Any) -> None:
    """Refuse the config of a model that another method than ours quantised: packed experts are refused elsewhere.

    Raises:
        UnsupportedModelError: names the method.
    """
    from moesparse.packed.quantizer import METHOD

    method = quantization_of(config)
    if method not in (None, METHOD):
        raise UnsupportedModelError(
            f"the model must not be quantised, got one by {method!r}, also where it was loaded as bf16: its config "
            "would describe the pruned one wrongly; prune its folder layer by layer (moesparse.prune_checkpoint), in "
            "its format, or with output_dtype='bfloat16' into a plain one"
        )


def check_work(layers: Layers, calibration: Calibration, recipe: Recipe) -> None:
    """Refuse what a recipe cannot do with such a model and such a calibration, before anything is changed.

    Raises:
        UsageError: a pattern that does not divide a matrix, experts or a budget that cannot be; named.
        UnsupportedModelError: experts that cannot be placed or refitted; a model loaded from quantised weights, whose
            config would describe the result wrongly.
        CalibrationError: there is no text, or none of the sums that it takes.
    """
    check_not_quantized(getattr(layers.model, "config", None))
    if isinstance(calibration, Saved) and recipe.changes_weights:
        if recipe.removes_experts:
            raise CalibrationError(
                "calibration must be windows to remove experts and then prune weights, got statistics: the weights "
                "are scored on what the smaller model computes; pass the windows, or remove experts alone "
                "(weights=None)"
            )
        if not calibration.alone:
            raise CalibrationError(
                "calibration must be windows, or statistics of one text, to prune weights, got statistics by domain"
            )
    recipe.check_blocks(layers.blocks)
    if recipe.removes_experts:
        check_removal(layers, calibration, recipe)
    elif not isinstance(calibration, FromText | Saved):
        recipe.check_needs_no_data()
