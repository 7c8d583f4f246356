"""Prune the weights of expert blocks: one matrix, one block, all the layers of a stream.

For each decoder layer in turn: run the calibration set through it once and keep per-expert sums, choose the masks,
solve for the kept weights, write them in place, and run the layer again so that the next layer sees what the pruned
model will feed it. One layer's sums are held at a time.

Source: one-shot block-wise pruning as in SparseGPT (Frantar & Alistarh 2023, arXiv 2301.00774) and MoE-Pruner (Xie et
al. 2024, arXiv 2410.12013).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moesparse.calibration.recorder import CrossMoment, Recorder, record
from moesparse.calibration.statistics import ExpertStatistics, memory_needed
from moesparse.models.blocks import ExpertMatrix, MoEBlock
from moesparse.models.stream import LayerStream
from moesparse.progress import Progress, ProgressEvent
from moesparse.pruning.budget import DENSE
from moesparse.pruning.recipe import Recipe
from moesparse.pruning.report import BlockReport, TensorReport
from moesparse.system.memory import peak_memory, reset_peak_memory
from moesparse.system.processes import Processes
from moesparse.weights.mask_rules import COLUMN_RULES, choose_masks, moments_needed, obs_gate, prune_in_place
from moesparse.weights.patterns import check_mask
from moesparse.weights.weight_rules import (
    PrunedInputs,
    Update,
    asymmetric_target,
    match_output,
    moments_of,
    output_energy,
    parse_update,
    rescale_factor,
    update_weights,
)

__all__ = ["prune_block", "prune_layerwise"]


def prune_layerwise(
    stream: LayerStream,
    model: nn.Module,
    blocks: Sequence[MoEBlock],
    recipe: Recipe,
    progress: Progress,
    *,
    start: int = 0,
    finish: Callable[[int, list[BlockReport]], None] | None = None,
) -> list[BlockReport]:
    """Prune the weights of a model whose hidden states a stream holds, layer by layer.

    Processes that share the stream add up their sums and prune the experts of a block between them; every one of them
    has the whole pruned layer in the end, and the reports.

    Args:
        stream: at the input of layer `start`.
        model: the model the stream runs.
        blocks: of the model, all of them.
        recipe: of the weights.
        progress: called after every batch.
        start: position of the first layer to prune; those before it are done.
        finish: called for each layer in order, while it is in memory and pruned, with the reports of its blocks.

    Returns:
        The reports of the blocks pruned, in forward order.
    """
    processes = stream.processes
    names = {id(layer): position for position, layer in enumerate(stream.layers)}
    at: dict[int, list[MoEBlock]] = {}
    for block in blocks:
        at.setdefault(names[id(model.get_submodule(block.layer))], []).append(block)
    last = max(at)
    # the factor is measured by running the pruned experts, which sees the loss in gate and up as well
    solver, rescale = parse_update(recipe.update)
    matches = solver == "asymmetric"
    moments = moments_needed(recipe.saliency, recipe.update)
    passes = sum(
        1 + matches * len(at[position]) + rescale + recipe.propagate if position in at else 1
        for position in range(start, last + 1)
    )
    total, done, tokens = passes * len(stream), 0, 0
    reports: list[BlockReport] = []
    memory = max(memory_needed(here, moments) for here in at.values())
    first = at[min(position for position in at if position >= start)][0]
    progress(ProgressEvent(f"calibrate {first.name}", 0, total, memory=memory))

    def run(position: int, stage: str, recorders: Sequence[Recorder] = (), **where: Any) -> None:
        nonlocal done, tokens

        def aim(number: int) -> None:
            for recorder in recorders:
                recorder.token_mask = stream.token_masks[number]
                recorder.first_window, recorder.window_length = stream.first_window[number], stream.length

        for count in stream.run(position, before=aim, **where):
            done, tokens = done + 1, tokens + count
            progress(ProgressEvent(stage, done, total, tokens=tokens))

    for position in range(start, last + 1):
        with stream.on_device(position):
            here = at.get(position)
            if here is None:
                run(position, f"layer {position}", keep=True)
                if finish is not None:
                    finish(position, [])
                continue
            started = time.perf_counter()
            reset_peak_memory()
            label = here[0].name
            # the dense layer's outputs are there only now; its inputs are needed again for rescaling
            dense_outputs = None if recipe.propagate else stream.hidden.fresh()
            # of the last block's output nothing is kept, unless one of these wants it
            read = rescale or dense_outputs is not None or len(here) > 1
            with record(here, moments, outputs=read) as recorders:
                run(position, f"calibrate {label}", recorders, outputs=dense_outputs)
            dense = [recorder.statistics for recorder in recorders]
            own = [statistics.combine(processes) for statistics in dense]

            def look_again(block: MoEBlock, up_before: torch.Tensor, at: int = position) -> Recorded:
                cross = CrossMoment(block, up_before)
                with record([block], moments, outputs=False) as (recorder,):
                    recorder.row_observer = cross
                    run(at, f"match {block.name}", [recorder])
                return recorder.statistics.combine(processes), processes.reduce(cross.total)

            measured = [
                prune_block(block, sums, recipe, solver, look_again if matches else None, processes)
                for block, sums in zip(here, own, strict=True)
            ]
            if rescale:
                with record(here) as recorders:
                    run(position, f"rescale {label}", recorders)
                for block, report, before, recorder in zip(here, measured, dense, recorders, strict=True):
                    recorder.statistics.combine(processes)
                    report.rescale = _rescale(block, before, recorder.statistics)
            if dense_outputs is not None:
                stream.hidden = dense_outputs
            elif position < last:
                run(position, f"propagate {label}", keep=True)
            else:
                done += len(stream)  # nothing after the last block needs its output
            for report in measured:
                report.seconds = (time.perf_counter() - started) / len(here)
                report.peak_bytes = peak_memory()
            reports += measured
            if finish is not None:
                finish(position, measured)
    return reports


Recorded = tuple[ExpertStatistics, torch.Tensor]
"""Sums of a block whose gate and up are pruned, and the cross moment of its activations with those before."""


def prune_block(
    block: MoEBlock,
    statistics: ExpertStatistics | None,
    recipe: Recipe,
    update: str,
    look_again: Callable[[MoEBlock, torch.Tensor], Recorded] | None = None,
    processes: Processes | None = None,
) -> BlockReport:
    """Prune the matrices of a block in place.

    Args:
        block: in memory.
        statistics: its sums; None for rules that look at the weights alone.
        recipe: of the weights.
        update: the solver.
        look_again: records the block with its pruned gate and up; for the asymmetric rule.
        processes: between which the experts are shared; `statistics` and what `look_again` gives are then of the own
            experts alone.
    """
    processes = processes or Processes()
    started = time.perf_counter()
    up, down = block.matrices
    tokens = None if statistics is None else statistics.tokens.tolist()
    if look_again is None:
        tensors = [_prune_matrix(block, matrix, statistics, recipe, update, processes) for matrix in block.matrices]
    else:
        assert statistics is not None
        name = f"{block.name}.{down.name}"
        mine = down.weight[processes.own(block.num_experts)]
        energy = output_energy(mine, moments_of(statistics, "activation", "gated", name))
        up_before = up.weight.clone()
        tensors = [_prune_matrix(block, up, statistics, recipe, "least-squares", processes)]
        # the second look takes their room
        statistics.moment.clear()
        statistics.gated_moment.clear()
        inputs = PrunedInputs(*look_again(block, up_before), energy)
        tensors.append(_prune_matrix(block, down, inputs.stats, recipe, update, processes, inputs))
    return BlockReport(
        name=block.name,
        experts=block.num_experts,
        tokens_per_expert=None if tokens is None else _joined(processes.gather(tokens)),
        tensors=tensors,
        rescale=None,
        seconds=time.perf_counter() - started,
        peak_bytes=peak_memory(),
    )


@dataclass(frozen=True)
class _Pruned:
    """What became of some experts of a matrix; the fields are those of `TensorReport`."""

    zeros: int
    holds: bool
    error_before: list[float] | None
    error_after: list[float] | None
    fallbacks: list[int]


@torch.no_grad()
def _prune_matrix(
    block: MoEBlock,
    matrix: ExpertMatrix,
    statistics: Any,
    recipe: Recipe,
    update: str,
    processes: Processes,
    inputs: PrunedInputs | None = None,
) -> TensorReport:
    weight = matrix.weight
    pattern = recipe.pattern_of(block.name, matrix.name)
    if pattern is None:
        zeros = 1 - int(weight.count_nonzero()) / max(weight.numel(), 1)
        return TensorReport(matrix.name, tuple(weight.shape), zeros, DENSE, True)  # type: ignore[arg-type]
    experts, mine = processes.own(len(weight)), None
    if experts.start < experts.stop:
        mine = _prune_experts(block, matrix, experts, statistics, recipe, update, inputs)
    processes.collect(matrix.parameter.detach())
    found = [each for each in processes.gather(mine) if each is not None]
    return TensorReport(
        name=matrix.name,
        shape=tuple(weight.shape),  # type: ignore[arg-type]
        sparsity=sum(each.zeros for each in found) / weight.numel(),
        pattern=str(pattern),
        holds=all(each.holds for each in found),
        error_before=_joined([each.error_before for each in found]),
        error_after=_joined([each.error_after for each in found]),
        fallbacks=_joined([each.fallbacks for each in found]) or [],
    )


def _prune_experts(
    block: MoEBlock,
    matrix: ExpertMatrix,
    experts: slice,
    statistics: Any,
    recipe: Recipe,
    update: str,
    inputs: PrunedInputs | None,
) -> _Pruned:
    """Prune some experts of a matrix in place, at least one; statistics and inputs are theirs."""
    name = f"{block.name}.{matrix.name}"
    weight = matrix.weight[experts]
    pattern = recipe.pattern_of(block.name, matrix.name)
    assert pattern is not None
    if update == "none" and recipe.saliency in COLUMN_RULES:
        fallback = prune_in_place(weight, recipe.saliency, pattern, statistics, matrix.input, name=name)
        result = Update(weight)
    else:
        target = weight if inputs is None else asymmetric_target(weight, inputs, name=name)
        options: dict[str, Any] = {"seed": recipe.seed, "keep_solved": update == "obs", "name": name}
        choice = choose_masks(
            target, recipe.saliency, pattern, statistics, matrix.input, first=experts.start, **options
        )
        fallback = choice.fallback
        if inputs is not None:
            result = match_output(weight, target, choice.mask, inputs, name=name)
        else:
            gate = obs_gate(recipe.saliency)
            found: dict[str, Any] = {"gate": gate, "solved": choice.solved, "name": name}
            result = update_weights(weight, choice.mask, update, statistics, matrix.input, **found)
        weight.copy_(result.weight)
    # looked at after the cast to the model's dtype: what is written is what is claimed
    verdict = check_mask(weight, pattern)
    if not verdict.holds:
        raise AssertionError(f"{name}: pattern {pattern} does not hold after pruning")
    return _Pruned(
        zeros=verdict.zeros,
        holds=verdict.holds,
        error_before=None if result.error_before is None else result.error_before.tolist(),
        error_after=None if result.error_after is None else result.error_after.tolist(),
        fallbacks=[experts.start + expert for expert in fallback],
    )


def _joined(parts: Sequence[list[Any] | None]) -> list[Any] | None:
    """One list of the experts of all processes; None where one has none."""
    if any(part is None for part in parts):
        return None
    return [value for part in parts for value in part or []]


@torch.no_grad()
def _rescale(block: MoEBlock, dense: ExpertStatistics, pruned: ExpertStatistics) -> list[float]:
    factor = rescale_factor(dense.gated_norm_sq_sum, pruned.gated_norm_sq_sum)
    down = block.matrices[-1]
    down.weight.mul_(factor.to(down.weight).view(-1, 1, 1))
    return factor.tolist()
