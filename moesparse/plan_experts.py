"""What calibrating a checkpoint or removing its experts layer by layer will take, known before a weight is read."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from moesparse.calibration.statistics import input_sizes, memory_needed
from moesparse.experts.choice import choose_rule
from moesparse.experts.refit import memory_for_refit, refit_flops
from moesparse.models.blocks import MoEBlock
from moesparse.plan import Plan, file_flops, head_size, plan_pruning
from moesparse.recipe import Recipe

__all__ = ["any_choice", "plan_calibration", "plan_run", "without_experts"]

# of a window or of all text, in every block, for every expert: float64
_SUMS = 8


def plan_run(
    model: nn.Module,
    blocks: Sequence[MoEBlock],
    recipe: Recipe,
    *,
    windows: int,
    length: int,
    batch_size: int,
    processes: int = 1,
) -> Plan:
    """`plan_pruning` for recipes that may remove experts first.

    Args and result are its own; bytes are the most of both steps, operations their sum.
    """
    sizes = {"windows": windows, "length": length, "batch_size": batch_size, "processes": processes}
    if not recipe.removes_experts:
        return plan_pruning(model, blocks, recipe, **sizes)
    keep = len(any_choice(blocks, recipe)[0])
    share = keep / blocks[0].num_experts
    if recipe.prunes_weights:
        base = plan_pruning(model, blocks, without_experts(recipe), **sizes)
        base = dataclasses.replace(
            base,
            packed=round(base.packed * share),
            moments=round(base.moments * share),
            workspace=round(base.workspace * share),
            flops={
                name: count * (1 if name in ("forward", "moments") else share) for name, count in base.flops.items()
            },
        )
    else:
        base = _nothing(plan_pruning(model, blocks, Recipe(saliency="magnitude", update="none"), **sizes), blocks)
        base = dataclasses.replace(base, packed=round(base.packed * share))
    # the kept part of the largest tensor is there twice while the others are cut out
    workspace = max(keep * matrix.weight[0].nbytes for block in blocks for matrix in block.matrices)
    passes, solve = 1, 0.0
    if recipe.refits_experts:
        workspace += max(memory_for_refit(block, keep, base.tokens) for block in blocks)
        passes += 3
        solve = sum(refit_flops(block, keep, base.tokens) for block in blocks)
    flops = dict(base.flops)
    flops["forward"] += 2.0 * passes * base.tokens * (base.active_parameters - head_size(model))
    flops["solvers"] += solve
    # read to be checked, recorded and cut
    flops["files"] += file_flops(3 * base.weights, share * base.weights)
    return dataclasses.replace(
        base, keep=keep, workspace=max(base.workspace, workspace), sums=_sums(blocks, windows), flops=flops
    )


def plan_calibration(
    model: nn.Module,
    blocks: Sequence[MoEBlock],
    moments: str,
    *,
    windows: int,
    length: int,
    batch_size: int,
    processes: int = 1,
) -> Plan:
    """The plan of `calibrate_checkpoint`.

    Args:
        model: its tensors may all be on the meta device.
        blocks: its MoE blocks.
        moments: second moments to collect.
        windows: of the calibration set, of `length` tokens.
        length: tokens of a window.
        batch_size: windows in one forward.
        processes: that share the work.
    """
    rules = Recipe(saliency="magnitude", update="none")
    sizes = {"windows": windows, "length": length, "batch_size": batch_size, "processes": processes}
    base = plan_pruning(model, blocks, rules, **sizes)
    kinds = {"none": 0, "plain": 1, "gated": 1, "both": 2}[moments]
    products = sum(
        2.0 * kinds * base.tokens * (block.top_k or block.num_experts) * size**2
        for block in blocks
        for size in input_sizes(block).values()
    )
    passed = base.active_parameters - head_size(model)
    flops = {"forward": 2.0 * base.tokens * passed, "moments": products, "files": file_flops(2 * base.weights, 0)}
    return dataclasses.replace(
        base,
        packed=0,
        workspace=0,
        moments=max(memory_needed([block], moments) for block in blocks),
        sums=_sums(blocks, windows),
        flops={**base.flops, "solvers": 0.0, "masks": 0.0} | flops,
    )


def any_choice(blocks: Sequence[MoEBlock], recipe: Recipe) -> list[Tensor]:
    """Ids per block that a recipe could leave: as many of them as it will, whichever they are.

    Raises:
        UsageError: a count or share that cannot be.
    """
    choose = choose_rule(blocks, keep=recipe.keep_experts, remove=recipe.experts)
    return choose(torch.zeros(len(blocks), blocks[0].num_experts))


def without_experts(recipe: Recipe) -> Recipe:
    """What is left of a recipe once its experts are removed."""
    return dataclasses.replace(recipe, experts=None, keep_experts=None, refine_experts=False)


def _nothing(plan: Plan, blocks: Sequence[MoEBlock]) -> Plan:
    """A plan in which no weight is pruned: the experts stay dense."""
    dense = sum(matrix.weight.nbytes for block in blocks for matrix in block.matrices)
    return dataclasses.replace(plan, packed=dense, moments=0, workspace=0, flops=dict.fromkeys(plan.flops, 0.0))


def _sums(blocks: Sequence[MoEBlock], windows: int) -> int:
    """Bytes of what is kept of all blocks: seven sums and a maximum, and the sums of every window."""
    return sum(_SUMS * block.num_experts * (8 + 7 * windows) for block in blocks)
