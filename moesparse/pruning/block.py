"""Prune the weights of one block in place: masks chosen, kept weights solved for, what was written checked."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from moesparse.calibration.statistics import ExpertStatistics
from moesparse.models.blocks import ExpertMatrix, MoEBlock
from moesparse.pruning.budget import DENSE
from moesparse.pruning.recipe import Recipe
from moesparse.pruning.report import BlockReport, TensorReport
from moesparse.system.memory import peak_memory
from moesparse.system.pieces import BESIDE, Pieces
from moesparse.system.processes import Processes
from moesparse.weights.mask_rules import COLUMN_RULES, choose_masks, moments_needed, obs_gate, prune_in_place
from moesparse.weights.patterns import check_mask
from moesparse.weights.solvers import expert_slices
from moesparse.weights.weight_rules import (
    PrunedInputs,
    Statistics,
    Update,
    asymmetric_target,
    match_output,
    moments_of,
    output_energy,
    update_weights,
)

__all__ = ["Recorded", "in_parts", "joined", "key_of", "prune_block", "sums_of"]


Recorded = tuple[ExpertStatistics, torch.Tensor]
"""Sums of a block whose gate and up are pruned, and the cross moment of its activations with those before."""


def prune_block(
    block: MoEBlock,
    statistics: ExpertStatistics | None,
    recipe: Recipe,
    update: str,
    look_again: Callable[[MoEBlock, torch.Tensor], Recorded] | None = None,
    processes: Processes | None = None,
    pieces: Pieces | None = None,
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
        pieces: of the layer, where experts are looked for before they are solved, and kept when they are.
    """
    processes, pieces = processes or Processes(), pieces or Pieces(None)
    started = time.perf_counter()
    up, down = block.matrices
    tokens = None if statistics is None else statistics.tokens.tolist()
    if look_again is None:
        tensors = [
            _prune_matrix(block, matrix, statistics, recipe, update, processes, pieces) for matrix in block.matrices
        ]
    else:
        assert statistics is not None
        name = f"{block.name}.{down.name}"
        mine = down.weight[processes.own(block.num_experts)]
        energy = output_energy(mine, moments_of(statistics, "activation", "gated", name))
        up_before = up.weight.clone()
        tensors = [_prune_matrix(block, up, statistics, recipe, "least-squares", processes, pieces)]
        # the second look takes their room
        statistics.moment.clear()
        statistics.gated_moment.clear()
        inputs = PrunedInputs(*look_again(block, up_before), energy)
        tensors.append(_prune_matrix(block, down, inputs.stats, recipe, update, processes, pieces, inputs))
    return BlockReport(
        name=block.name,
        experts=block.num_experts,
        tokens_per_expert=None if tokens is None else joined(processes.gather(tokens)),
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
    pieces: Pieces,
    inputs: PrunedInputs | None = None,
) -> TensorReport:
    weight = matrix.weight
    pattern = recipe.pattern_of(block.name, matrix.name)
    if pattern is None:
        zeros = 1 - int(weight.count_nonzero()) / max(weight.numel(), 1)
        return TensorReport(matrix.name, tuple(weight.shape), zeros, DENSE, True)  # type: ignore[arg-type]

    def beside(part: slice) -> PrunedInputs | None:
        return None if inputs is None else _inputs_of(inputs, part)

    def work(part: slice, experts: slice) -> dict[str, Any]:
        sums = sums_of(statistics, part)
        return asdict(_prune_experts(block, matrix, experts, sums, recipe, update, beside(part)))

    def key(part: slice, experts: slice) -> str:
        return key_of(sums_of(statistics, part), matrix.input, beside(part))

    parts = _slices(weight[processes.own(len(weight))], recipe)
    notes = in_parts(matrix, f"{block.name}.{matrix.name}", parts, processes, pieces, key, work)
    found = [_Pruned(**note) for note in notes]
    return TensorReport(
        name=matrix.name,
        shape=tuple(weight.shape),  # type: ignore[arg-type]
        sparsity=sum(each.zeros for each in found) / weight.numel(),
        pattern=str(pattern),
        holds=all(each.holds for each in found),
        error_before=joined([each.error_before for each in found]),
        error_after=joined([each.error_after for each in found]),
        fallbacks=joined([each.fallbacks for each in found]) or [],
    )


def in_parts(
    matrix: ExpertMatrix,
    name: str,
    parts: Iterable[slice],
    processes: Processes,
    pieces: Pieces,
    key: Callable[[slice, slice], str],
    work: Callable[[slice, slice], dict[str, Any]],
    beside: torch.Tensor | None = None,
) -> list[dict[str, Any]]:
    """Work on a matrix in place, every process on its own experts; a part that was kept is not done again.

    Args:
        matrix: of a block.
        name: of its pieces.
        parts: of the process's own experts.
        processes: between which the experts are shared.
        pieces: of the layer.
        key: of all that the result for a part depends on beside the recipe and the source.
        work: does a part and gives a note of it, JSON. Both are called with the part of the own experts, and with the
            same experts as the matrix counts them.
        beside: [E, ...] that `work` fills in too, and that goes where the matrix goes.

    Returns:
        The notes of all processes, in the order of the experts.
    """
    weight = matrix.weight
    own = processes.own(len(weight))
    mine = []
    for part in parts:
        experts = slice(own.start + part.start, own.start + part.stop)
        piece, depends = f"{name}.{experts.start}-{experts.stop}", key(part, experts)
        held = pieces.find(piece, depends)
        with_it = None if beside is None else pieces.find(piece + BESIDE, depends)
        if held is None or (with_it is None and beside is not None):
            note = work(part, experts)
            pieces.keep(piece, depends, weight[experts], note)
            if beside is not None:
                pieces.keep(piece + BESIDE, depends, beside[experts], None)
        else:
            weight[experts] = held[0].to(weight)
            note = held[1]
            if beside is not None and with_it is not None:
                beside[experts] = with_it[0].to(beside)
        mine.append(note)
    processes.collect(matrix.parameter.detach())
    if beside is not None:
        processes.collect(beside)
    return [each for found in processes.gather(mine) for each in found]


def _slices(weight: torch.Tensor, recipe: Recipe) -> Iterable[slice]:
    """The experts of [E, out, in] that are pruned at a time: as many as the solvers hold, or all without a solver."""
    if moments_needed(recipe.saliency, recipe.update) == "none":
        return [slice(0, len(weight))] if len(weight) else []
    return expert_slices(weight)


@dataclass(eq=False)
class Sums:
    """What the rules read of the statistics of some experts: `weight_rules.Statistics`."""

    tokens: torch.Tensor
    energy: dict[str, torch.Tensor]
    gated_energy: dict[str, torch.Tensor]
    moment: dict[str, torch.Tensor]
    gated_moment: dict[str, torch.Tensor]


_NAMED_SUMS = ("energy", "gated_energy", "moment", "gated_moment")


def sums_of(statistics: Statistics | None, experts: slice) -> Sums | None:
    """The sums of some experts, as views."""
    if statistics is None:
        return None
    named = {name: {key: each[experts] for key, each in getattr(statistics, name).items()} for name in _NAMED_SUMS}
    return Sums(statistics.tokens[experts], **named)


def _inputs_of(inputs: PrunedInputs, experts: slice) -> PrunedInputs:
    sums = sums_of(inputs.stats, experts)
    assert sums is not None
    return PrunedInputs(sums, inputs.cross[experts], inputs.energy[experts])


def key_of(sums: Sums | None, input: str, inputs: PrunedInputs | None) -> str:
    """Of what the result for some experts depends on beside the recipe and the source: the bits of their sums.

    Of second moments the sums of the rows stand for all: the same text gives the same, and another one does not.
    """
    read = [] if sums is None else [sums.tokens, *(getattr(sums, name).get(input) for name in _NAMED_SUMS)]
    read += [] if inputs is None else [inputs.cross, inputs.energy]
    digest = hashlib.sha256()
    for tensor in read:
        if tensor is not None:
            short = tensor.sum(-1) if tensor.ndim == 3 else tensor
            digest.update(short.cpu().contiguous().numpy().data)
    return digest.hexdigest()


def _prune_experts(
    block: MoEBlock,
    matrix: ExpertMatrix,
    experts: slice,
    statistics: Any,
    recipe: Recipe,
    update: str,
    inputs: PrunedInputs | None,
) -> _Pruned:
    """Prune some experts of a matrix in place, at least one; statistics and inputs are of these."""
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


def joined(parts: Sequence[list[Any] | None]) -> list[Any] | None:
    """One list of the experts of all processes; None where one has none."""
    if any(part is None for part in parts):
        return None
    return [value for part in parts for value in part or []]
