"""Round the weights of one block in place, once masks, weight rules and training are done with them."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from moesparse.calibration.statistics import ExpertStatistics
from moesparse.models.blocks import ExpertMatrix, MoEBlock
from moesparse.pruning.block import in_parts, joined, key_of, sums_of
from moesparse.pruning.recipe import Recipe
from moesparse.pruning.report import BlockReport, ValuesReport
from moesparse.system.pieces import Pieces
from moesparse.system.processes import Processes
from moesparse.weights.patterns import check_mask
from moesparse.weights.solvers import expert_slices
from moesparse.weights.value_formats import Scales
from moesparse.weights.value_rules import choose_values

__all__ = ["quantise_block"]


@torch.no_grad()
def quantise_block(
    block: MoEBlock,
    statistics: ExpertStatistics | None,
    recipe: Recipe,
    report: BlockReport,
    processes: Processes | None = None,
    pieces: Pieces | None = None,
) -> list[Scales] | None:
    """Round the matrices of a block to the values of a recipe; nothing where it names none.

    The weights become the values that their codes stand for, in the model's dtype. Zeros stay, and so do patterns,
    which is checked.

    Args:
        block: in memory.
        statistics: its sums, those that its weights were solved with; None for rules that look at the weights alone.
        recipe: of the values.
        report: of the block, which is told.
        processes: between which the experts are shared; `statistics` are then of the own experts alone.
        pieces: of the layer.

    Returns:
        The scales of every matrix, [E, ...] on its device, where they will be stored with codes; None elsewhere.
    """
    if recipe.values is None:
        return None
    found = []
    for matrix, tensor in zip(block.matrices, report.tensors, strict=True):
        tensor.values, scales = _quantise_matrix(
            block, matrix, statistics, recipe, processes or Processes(), pieces or Pieces(None)
        )
        tensor.sparsity = 1 - int(matrix.weight.count_nonzero()) / max(matrix.weight.numel(), 1)
        found += [] if scales is None else [scales]
    return found or None


def _quantise_matrix(
    block: MoEBlock,
    matrix: ExpertMatrix,
    statistics: ExpertStatistics | None,
    recipe: Recipe,
    processes: Processes,
    pieces: Pieces,
) -> tuple[ValuesReport, Scales | None]:
    name, weight, format = f"{block.name}.{matrix.name}", matrix.weight, recipe.value_format
    assert format is not None
    pattern, beside = recipe.pattern_of(block.name, matrix.name), None
    if recipe.stores_codes:
        beside = weight.new_empty((len(weight), format.scale_bytes(weight.shape)), dtype=torch.uint8)

    def work(part: slice, experts: slice) -> dict[str, Any]:
        mine = weight[experts]
        choice = choose_values(mine, recipe.value_rule, format, sums_of(statistics, part), matrix.input, name=name)
        for expert in range(len(mine)):
            mine[expert].copy_(choice.quantised[expert].dequantise())
        if beside is not None and choice.quantised.scales is not None:
            beside[experts] = choice.quantised.scales.to_bytes()
        # looked at after the cast to the model's dtype: what is written is what is claimed
        if pattern is not None and not check_mask(mine, pattern).holds:
            raise AssertionError(f"{name}: pattern {pattern} does not hold after rounding")
        return {
            "error": choice.error.tolist(),
            "output_error": None if choice.output_error is None else choice.output_error.tolist(),
            "fallbacks": [experts.start + expert for expert in choice.fallback],
        }

    def key(part: slice, experts: slice) -> str:
        bits = weight[experts].contiguous().view(-1).view(torch.uint8).cpu().numpy().data
        return f"{key_of(sums_of(statistics, part), matrix.input, None)} {hashlib.sha256(bits).hexdigest()}"

    parts = expert_slices(weight[processes.own(len(weight))])
    notes = in_parts(matrix, f"{name}.values", parts, processes, pieces, key, work, beside)
    report = ValuesReport(
        format=str(format),
        rule=recipe.value_rule,
        bits=format.bits_of(weight.shape, pattern),
        error=joined([note["error"] for note in notes]) or [],
        output_error=joined([note["output_error"] for note in notes]),
        fallbacks=joined([note["fallbacks"] for note in notes]) or [],
    )
    return report, None if beside is None else format.scales_from(beside, weight.shape)
