"""What pruning a checkpoint will take: the pass of calibration/plan.py with its solvers, files and removals on top."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from moesparse.calibration.plan import Plan, file_flops, plan_pass
from moesparse.calibration.statistics import memory_needed
from moesparse.errors import UsageError
from moesparse.experts.choice import choose_rule
from moesparse.experts.merging import memory_for_merging, merging_flops
from moesparse.experts.refit import MAX_TOKENS, memory_for_refit, refit_flops
from moesparse.experts.surgery import plan_removal, say_readers
from moesparse.models.blocks import ExpertMatrix, MoEBlock
from moesparse.models.layer_counts import PER_LAYER
from moesparse.pruning.recipe import Recipe
from moesparse.pruning.tuning import memory_for_tuning, tuning_flops
from moesparse.weights.mask_rules import COLUMN_RULES
from moesparse.weights.solvers import memory_for_solver
from moesparse.weights.weight_rules import parse_update, tunes

__all__ = ["any_choice", "check_counts", "plan_pruning", "plan_run"]

# a rule's products with the second moment: 2 * out * in^2 multiply-adds and times for a matrix [out, in]. An update's
# errors are three; of admm and the conjugate gradients what benchmarks/speed/bench_prune.py measured for 14336 x 4096
_PRODUCTS = {
    "admm": 40.0,
    "gated-admm": 40.0,
    "obs": 3.0,
    "least-squares": 15.0,
    "asymmetric": 15.0,
    # half for its error, and one for its scales
    "gptq": 1.5,
    "gated-gptq": 1.5,
}
_WALKS = ("sparsegpt", "gated-sparsegpt", "obs")
_VALUE_WALKS = ("gptq", "gated-gptq")
# what is bound by memory, as operations that a product does in that time. A column of a walk is taken off those up to
# 128 to its right, weight by weight: from 14336 x 4096 and 1792 x 4096 in bench_prune
_WALK_FLOPS = 8000
# a weight is scored, chosen, written and counted: from magnitude, which does nothing else, in bench_cost
_SELECT_FLOPS = 1500
# some thirty scales are tried: from rtn-mse and 1792 x 4096 in bench_prune
_SCALES_FLOPS = 6000


def plan_pruning(
    model: nn.Module,
    blocks: Sequence[MoEBlock],
    recipe: Recipe,
    *,
    windows: int,
    length: int,
    batch_size: int,
    processes: int = 1,
) -> Plan:
    """Plan a run that prunes weights, from shapes alone.

    Args:
        recipe: of the weights.

    The others are those of `plan_pass`.
    """
    sizes = {"windows": windows, "length": length, "batch_size": batch_size, "processes": processes}
    moments, update = recipe.moments, recipe.update if recipe.prunes_weights else "none"
    solver, rescale = parse_update(update)
    asymmetric, trains = solver == "asymmetric", tunes(update)
    base = plan_pass(model, blocks, moments, **sizes)
    matrices = [matrix.weight for block in blocks for matrix in block.matrices]
    rules = {recipe.saliency, solver} if recipe.prunes_weights else set()
    rules |= {recipe.value_rule} if recipe.values is not None else set()
    in_place = solver == "none" and recipe.saliency in COLUMN_RULES and recipe.values is None
    # the mask, the new weights, and a float32 target or what the mask rule has solved for
    beside = 4 * (solver in ("asymmetric", "obs")) + 1
    workspace = 0
    for weight in [] if in_place else matrices:
        E, out, size = math.ceil(len(weight) / processes), *weight.shape[1:]
        solves = moments != "none"
        needed = memory_for_solver(E, out, size, beside + weight.element_size()) if solves else 12 * E * out * size
        workspace = max(workspace, needed)
    tokens = min(windows * length, MAX_TOKENS)
    if trains:
        workspace = max(workspace, *(memory_for_tuning(block, tokens) for block in blocks))
    passes = 1 + rescale + recipe.propagate + asymmetric
    return dataclasses.replace(
        base,
        packed=sum(_packed_bytes(recipe, block.name, matrix) for block in blocks for matrix in block.matrices),
        moments=max(
            memory_needed([block], moments) + asymmetric * 8 * block.num_experts * block.intermediate_size**2
            for block in blocks
        ),
        workspace=workspace,
        flops={
            "forward": passes * base.flops["forward"],
            "moments": (1 + asymmetric) * base.flops["moments"],
            **_solver_flops(matrices, rules),
            "training": sum(tuning_flops(block, tokens) for block in blocks) if trains else 0.0,
            "files": file_flops(2 * base.weights, base.weights),
        },
        sums=0,
    )


def _packed_bytes(recipe: Recipe, block: str, matrix: ExpertMatrix) -> int:
    weight, pattern = matrix.weight, recipe.pattern_of(block, matrix.name)
    if recipe.stores_codes and (values := recipe.value_format) is not None:
        return values.bytes_of(weight.shape, pattern)
    return weight.nbytes if pattern is None else pattern.packed_bytes(weight.numel(), weight.element_size())


def _solver_flops(matrices: Sequence[Tensor], rules: set[str]) -> dict[str, float]:
    """Of the mask rule and the weight rule, over all matrices [E, out, in]."""
    # "obs" behind sparsegpt takes what that has found on its walk
    walks = bool(rules.intersection(_WALKS)) + bool(rules.intersection(_VALUE_WALKS))
    searches = bool(rules.intersection((*_VALUE_WALKS, "rtn-mse")))
    products = sum(_PRODUCTS.get(rule, 0.0) for rule in rules) + 0.5 * walks
    solve, select = 0.0, 0.0
    for weight in matrices:
        E, out, size = weight.shape
        # a factorisation is one in float64, which takes twice the time
        solve += 2.0 * products * E * out * size**2 + walks * E * (2 * size**3 / 3 + _WALK_FLOPS * out * size)
        select += float((_SELECT_FLOPS + searches * _SCALES_FLOPS) * E * out * size)
    return {"solvers": solve, "masks": select}


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
    counts = [len(ids) for ids in any_choice(blocks, recipe)]
    if len(set(counts)) > 1:
        check_counts(model, blocks, recipe)
    keep, share = max(counts), sum(counts) / sum(block.num_experts for block in blocks)
    scoring = plan_pass(model, blocks, "none", **sizes)
    if recipe.changes_weights:
        base = plan_pruning(model, blocks, recipe.without_experts(), **sizes)
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
        dense = sum(matrix.weight.nbytes for block in blocks for matrix in block.matrices)
        base = dataclasses.replace(scoring, packed=round(dense * share), flops=dict.fromkeys(scoring.flops, 0.0))
    # the kept part of the largest tensor is there twice while the others are cut out
    workspace = max(keep * matrix.weight[0].nbytes for block in blocks for matrix in block.matrices)
    passes, solve = 1, 0.0
    if recipe.refits_experts:
        workspace += max(memory_for_refit(block, keep, base.tokens) for block in blocks)
        passes += 3
        solve = sum(refit_flops(block, keep, base.tokens) for block in blocks)
    if recipe.forms_groups:
        workspace += max(memory_for_merging(block, base.tokens) for block in blocks)
        passes += 2
        solve += sum(merging_flops(block, base.tokens) for block in blocks)
    flops = dict(base.flops)
    flops["forward"] += passes * scoring.flops["forward"]
    flops["solvers"] += solve
    # read to be checked, recorded and cut
    flops["files"] += file_flops(3 * base.weights, share * base.weights)
    return dataclasses.replace(
        base,
        keep=round(sum(counts) / len(counts)),
        workspace=max(base.workspace, workspace),
        sums=scoring.sums,
        flops=flops,
    )


def any_choice(blocks: Sequence[MoEBlock], recipe: Recipe) -> list[Tensor]:
    """Ids per block that a recipe could leave: as many of them as it will, whichever they are.

    Raises:
        UsageError: a count or share that cannot be.
    """
    if recipe.plan is not None:
        return recipe.plan.tensors()
    return choose_rule(blocks, **recipe.expert_rule.count)(torch.zeros(len(blocks), blocks[0].num_experts))


def check_counts(model: nn.Module, blocks: Sequence[MoEBlock], recipe: Recipe) -> None:
    """Refuse what cannot be removed, by a choice of as many experts as the recipe leaves, whichever they are.

    Raises:
        UsageError: counts that cannot be, or that differ by layer and are not allowed to.
        UnsupportedModelError: experts that cannot be placed; named.
    """
    plan = plan_removal(model, any_choice(blocks, recipe), allow_non_uniform=True)
    if recipe.allow_non_uniform or len(set(plan.counts)) == 1:
        return
    wanted, got = "expert_budget must be 'per-layer', which keeps", "'global'"
    if recipe.plan is not None:
        wanted, got = "plan must keep", f"{min(plan.counts)} to {max(plan.counts)}"
    raise UsageError(
        f"{wanted} equally many experts in every layer, unless allow_non_uniform=True, got {got}: config.json then "
        f"says how many as {PER_LAYER}, {say_readers(plan.readers())}"
    )
