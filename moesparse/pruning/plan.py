"""What pruning a checkpoint will take, known before a weight is read: memory, bytes and time."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moesparse.calibration.statistics import input_sizes, memory_needed
from moesparse.experts.choice import choose_rule
from moesparse.experts.refit import memory_for_refit, refit_flops
from moesparse.models.blocks import MoEBlock, decoder_layers
from moesparse.pruning.recipe import Recipe
from moesparse.system.cpu_products import fast_products
from moesparse.weights.mask_rules import COLUMN_RULES, moments_needed
from moesparse.weights.solvers import memory_for_solver
from moesparse.weights.weight_rules import parse_update

__all__ = [
    "Plan",
    "any_choice",
    "file_flops",
    "gemm_rate",
    "head_size",
    "plan_calibration",
    "plan_pruning",
    "plan_run",
    "without_experts",
]

# of a window or of all text, in every block, for every expert: float64
_SUMS = 8

# a rule's products with the second moment: 2 * out * in^2 multiply-adds and times for a matrix [out, in]. An update's
# errors are three; of admm and the conjugate gradients what benchmarks/bench_prune.py measured for 14336 x 4096
_PRODUCTS = {
    "admm": 40.0,
    "gated-admm": 40.0,
    "obs": 3.0,
    "least-squares": 15.0,
    "asymmetric": 15.0,
}
_WALKS = ("sparsegpt", "gated-sparsegpt", "obs")
# what is bound by memory, as operations that a product does in that time. A column of a walk is taken off those up to
# 128 to its right, weight by weight: from 14336 x 4096 and 1792 x 4096 in bench_prune
_WALK_FLOPS = 8000
# a weight is scored, chosen, written and counted; a byte of the checkpoint is read and copied into its layer, or hashed
# and written: from magnitude, which does nothing else, in benchmarks/bench_cost.py
_SELECT_FLOPS = 1500
_READ_FLOPS = 115
_WRITE_FLOPS = 130
# compiled products and buffers that torch's CPU libraries keep, see moesparse.system.memory
_KEPT_BY_LIBRARIES = 64 * 2**20


@dataclass(frozen=True)
class Plan:
    """Bytes unless said otherwise.

    Attributes:
        layers: decoder layers; `blocks` of them hold experts.
        experts: of a block.
        tokens: of the calibration set.
        parameters: of the model; `active_parameters` work on one token.
        weights: the model's, in its dtype.
        output: the expert matrices of the result, packed (`packed`) and dense.
        outside: what lies outside of the decoder layers, in memory all the time.
        layer: the largest decoder layer.
        moments: second moments of the largest block, with the cross moment of the asymmetric rule.
        workspace: the largest matrix while it is pruned, or block while it is refitted: fp32 copies and factors; none
            where it is done in place.
        activations: of one batch in the widest part.
        hidden_states: of the calibration set between two layers, as far as one process holds them.
        flops: multiply-adds times two: forward passes, second moments, solvers; masks and files as much as takes the
            same time.
        keep: experts of a block that stay; None for all.
        sums: of all experts and windows, to choose by, in memory all the time.
        processes: that share the work; what is in memory is in that of each.
    """

    layers: int
    blocks: int
    experts: int
    tokens: int
    parameters: int
    active_parameters: int
    weights: int
    packed: int
    outside: int
    layer: int
    moments: int
    workspace: int
    activations: int
    hidden_states: int
    flops: dict[str, float]
    keep: int | None = None
    sums: int = 0
    processes: int = 1

    @property
    def peak(self) -> int:
        """Bytes in memory at most with the hidden states in a file: but for `sums` it does not grow with the layers."""
        held = _KEPT_BY_LIBRARIES + self.outside + self.sums + self.layer + self.moments
        return held + max(self.workspace, self.activations)

    @property
    def peak_in_memory(self) -> int:
        """The same with the hidden states in memory."""
        return self.peak + self.hidden_states

    def seconds(self, flops_per_second: float, forward: float | None = None) -> float:
        """An estimate, good to a factor of two or three; `gemm_rate` gives the rates, of one process.

        Args:
            flops_per_second: of float32.
            forward: of the model's dtype, in which it is run; None where that is the same.
        """
        others = sum(flops for name, flops in self.flops.items() if name != "forward")
        seconds = self.flops["forward"] / (forward or flops_per_second) + others / flops_per_second
        return seconds / self.processes

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "peak": self.peak, "peak_in_memory": self.peak_in_memory}


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
    """Plan a run from shapes alone.

    Args:
        model: its tensors may all be on the meta device.
        blocks: its MoE blocks.
        recipe: of the weights.
        windows: of the calibration set, of `length` tokens.
        length: tokens of a window.
        batch_size: windows in one forward.
        processes: that share the work.
    """
    layers, _ = decoder_layers(model, list(blocks))
    sizes = [_bytes(layer) for layer in layers]
    whole = _bytes(model)
    moments = moments_needed(recipe.saliency, recipe.update)
    solver, _ = parse_update(recipe.update)
    crosses = solver == "asymmetric"
    matrices = [matrix.weight for block in blocks for matrix in block.matrices]
    tokens = windows * length
    experts = sum(weight.numel() for weight in matrices)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    routed = sum(
        matrix.weight[0].numel() * (block.top_k or block.num_experts) for block in blocks for matrix in block.matrices
    )
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    active = parameters - experts + routed - embedding.weight.numel()
    hidden, item = embedding.weight.shape[1], embedding.weight.element_size()
    workspace = 0
    in_place = solver == "none" and recipe.saliency in COLUMN_RULES
    for block in [] if in_place else blocks:
        for matrix in block.matrices:
            E, out, size = matrix.weight.shape
            E = math.ceil(E / processes)
            needed = 12 * E * out * size
            if moments != "none":
                # the mask, the new weights, and a float32 target or what the mask rule has solved for
                kept = 1 + matrix.weight.element_size() + 4 * (solver in ("asymmetric", "obs"))
                needed = memory_for_solver(E, out, size, kept)
            workspace = max(workspace, needed)
    held = min(windows, math.ceil(windows / batch_size / processes) * batch_size)
    widest = max(max(input_sizes(block).values()) * (block.top_k or 1) for block in blocks)
    return Plan(
        layers=len(layers),
        blocks=len(blocks),
        experts=blocks[0].num_experts,
        tokens=tokens,
        parameters=parameters,
        active_parameters=active,
        weights=whole,
        packed=sum(recipe.pattern.packed_bytes(weight.numel(), weight.element_size()) for weight in matrices),
        outside=whole - sum(sizes),
        layer=max(sizes),
        moments=max(
            memory_needed([block], moments) + crosses * 8 * block.num_experts * block.intermediate_size**2
            for block in blocks
        ),
        workspace=workspace,
        activations=batch_size * length * (6 * hidden + 4 * widest) * max(item, 4),
        hidden_states=held * length * hidden * item,
        flops={
            **_flops(blocks, recipe, tokens, active - head_size(model), moments),
            "files": file_flops(2 * whole, whole),
        },
        processes=processes,
    )


def _flops(blocks: Sequence[MoEBlock], recipe: Recipe, tokens: int, passed: int, moments: str) -> dict[str, float]:
    solver, rescale = parse_update(recipe.update)
    rules = {recipe.saliency, solver}
    # "obs" behind sparsegpt takes what that has found on its walk
    walks = bool(rules.intersection(_WALKS))
    asymmetric = solver == "asymmetric"
    passes = 1 + rescale + recipe.propagate + asymmetric
    kinds = {"none": 0, "plain": 1, "gated": 1, "both": 2}[moments] * (1 + asymmetric)
    products = sum(_PRODUCTS.get(rule, 0.0) for rule in rules) + 0.5 * walks
    sums, solve, select = 0.0, 0.0, 0.0
    for block in blocks:
        sums += (
            2.0 * kinds * tokens * (block.top_k or block.num_experts) * sum(s**2 for s in input_sizes(block).values())
        )
        for matrix in block.matrices:
            E, out, size = matrix.weight.shape
            # a factorisation is one in float64, which takes twice the time
            solve += 2.0 * products * E * out * size**2 + walks * E * (2 * size**3 / 3 + _WALK_FLOPS * out * size)
            select += float(_SELECT_FLOPS * E * out * size)
    return {"forward": 2.0 * passes * tokens * passed, "moments": sums, "solvers": solve, "masks": select}


def file_flops(read: float, written: float) -> float:
    """What reading and writing so many bytes takes, as operations."""
    return _READ_FLOPS * read + _WRITE_FLOPS * written


def head_size(model: nn.Module) -> int:
    """Parameters of a head of its own: calibration computes no logits."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()  # type: ignore[operator]
    return 0 if head is None or head.weight is embedding.weight else head.weight.numel()


def _bytes(module: nn.Module) -> int:
    tensors = {id(tensor): tensor for tensor in module.state_dict(keep_vars=True).values()}
    return sum(tensor.nbytes for tensor in tensors.values())


def gemm_rate(
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Multiply-adds times two a second of a product of 1024 x 1024 on a device, measured now in about 0.1 s.

    In half precision it is measured as layers are run, see moesparse.system.cpu_products.
    """
    layer = nn.Linear(1024, 1024, bias=False, device=device, dtype=dtype)
    x = torch.randn(1024, 1024, device=device).to(dtype)
    count, seconds = 0, 0.0
    with torch.no_grad(), fast_products(layer):
        for _ in range(2):
            layer(x)
        while seconds < 0.1:
            started = clock()
            product = layer(x)
            float(product[0, 0])  # waits for a GPU
            seconds += clock() - started
            count += 1
    return 2 * 1024**3 * count / seconds


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
