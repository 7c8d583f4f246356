"""Prune a model in memory: experts removed, weights pruned, and the report of both."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from moesparse._version import __version__
from moesparse.calibration.statistics import ModelStatistics
from moesparse.calibration.windows import check_windows
from moesparse.errors import CalibrationError
from moesparse.experts.choice import prune_experts
from moesparse.models.blocks import MoEBlock, decoder_layers, find_moe_blocks
from moesparse.models.fingerprint import model_fingerprint
from moesparse.models.look import check_dense, check_finite
from moesparse.models.stream import LayerStream
from moesparse.progress import Progress, ProgressEvent, silent
from moesparse.pruning.block import prune_block, prune_layerwise
from moesparse.pruning.recipe import (
    Recipe,
    check_needs_no_data,
)
from moesparse.pruning.report import BlockReport, Report, describe_calibration, expert_sizes
from moesparse.system.processes import default_device

__all__ = ["prune"]


def prune(
    model: nn.Module,
    calibration: torch.Tensor
    | tuple[torch.Tensor, torch.Tensor | None]
    | ModelStatistics
    | Mapping[str, ModelStatistics]
    | None,
    recipe: Recipe | None = None,
    *,
    domains: Sequence[str] | None = None,
    batch_size: int = 8,
    device: torch.device | str | None = None,
    progress: Progress = silent,
    allow_pruned: bool = False,
) -> Report:
    """Prune every expert matrix of a transformers MoE model, in place.

    Holds besides the model: the hidden states of the calibration set on the CPU, one layer's sums (with second moments
    8 * E * (H^2 + I^2) bytes) and one matrix in fp32 with its mask.

    Args:
        model: a transformers causal language model, on the CPU or a GPU.
        calibration: (n, t) int64 windows, or (windows, attention mask), or saved statistics of this very model, or
            None where the recipe looks at weights alone (magnitude, no update). To remove experts alone, also saved
            statistics by domain.
        recipe: what to do; the default is 2:4 by the rules measured best.
        domains: of each window, for the choice of experts; None is one domain.
        batch_size: windows in one forward.
        device: where the layer at work goes; None takes the GPU when there is one.
        progress: called with every step.
        allow_pruned: accept a model that already carries pruned experts.

    Returns:
        Report: per tensor sparsity, pattern, residual; per block tokens, time and peak memory.

    Raises:
        UnsupportedModelError: no experts, or experts this package cannot handle; named.
        UsageError: the pattern does not divide a matrix; raised before anything is changed.
        CalibrationError: the windows or statistics do not fit this model.
    """
    recipe = recipe or Recipe()
    if recipe.target_bytes is not None:
        from moesparse.pruning.to_budget import prune_to_budget

        return prune_to_budget(
            model,
            calibration,
            recipe,
            domains=domains,
            batch_size=batch_size,
            device=device,
            progress=progress,
            allow_pruned=allow_pruned,
        )
    if isinstance(calibration, Mapping) and recipe.prunes_weights:
        raise CalibrationError(
            "calibration must be windows, or statistics of one text, to prune weights, got statistics by domain"
        )
    blocks = find_moe_blocks(model)
    for block in blocks:
        for matrix in block.matrices:
            pattern = recipe.pattern_of(block.name, matrix.name)
            if pattern is not None:
                pattern.check_matrix(f"{block.name}.{matrix.name}", matrix.weight.shape[-1])
    check_finite(blocks)
    started = time.perf_counter()
    fingerprint, before = model_fingerprint(model), expert_sizes(model, blocks)
    removed = None
    if recipe.removes_experts:
        removed = _remove_experts(
            model, blocks, calibration, recipe, domains, batch_size, device, progress, allow_pruned
        )
        blocks = find_moe_blocks(model)
    if not recipe.prunes_weights:
        reports: list[BlockReport] = []
        source = describe_calibration(calibration)
    elif isinstance(calibration, ModelStatistics):
        reports, source = _prune_from_statistics(model, blocks, calibration, recipe, progress)
    elif calibration is None:
        reports, source = _prune_from_weights(blocks, recipe, progress)
    else:
        if not allow_pruned:
            check_dense(blocks)
        vocabulary = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
        assert not isinstance(calibration, Mapping)  # refused above
        windows, mask = check_windows(calibration, vocabulary)
        home = torch.device(device) if device is not None else default_device()
        stream = LayerStream(model, decoder_layers(model, blocks)[0], windows, mask, batch_size, home)
        reports = prune_layerwise(stream, model, blocks, recipe, progress)
        source = describe_calibration(windows)
    sizes = {"before": before, "after": expert_sizes(model, blocks, recipe)}
    seconds = time.perf_counter() - started
    return Report(recipe.to_dict(), __version__, reports, source, seconds, removed, fingerprint, sizes)


def _remove_experts(
    model: nn.Module,
    blocks: Sequence[MoEBlock],
    calibration: Any,
    recipe: Recipe,
    domains: Sequence[str] | None,
    batch_size: int,
    device: torch.device | str | None,
    progress: Progress,
    allow_pruned: bool,
) -> dict[str, Any]:
    """Experts first, on the dense model: the weights are then scored on what is left."""
    if calibration is None:
        raise CalibrationError("calibration must be windows or statistics to choose experts, got None")
    if isinstance(calibration, ModelStatistics | Mapping):
        if recipe.prunes_weights:
            raise CalibrationError(
                "calibration must be windows to remove experts and then prune weights, got statistics: the weights "
                "are scored on what the smaller model computes; pass the windows, or remove experts alone "
                "(weights=None)"
            )
    else:
        if not allow_pruned:
            check_dense(blocks)
        calibration = check_windows(calibration, model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
    report = prune_experts(
        model,
        calibration,
        recipe.expert_saliency,
        keep=recipe.keep_experts,
        domains=domains,
        mix=recipe.expert_mix,
        budget=recipe.expert_budget,
        floor=recipe.expert_floor,
        protect_super=recipe.protect_experts,
        remove=recipe.experts,
        refit=recipe.refits_experts,
        refine=recipe.refine_experts,
        seed=recipe.seed,
        batch_size=batch_size,
        device=torch.device(device) if device is not None else default_device(),
        progress=progress,
    )
    return report.to_dict()


def _prune_from_weights(
    blocks: Sequence[MoEBlock], recipe: Recipe, progress: Progress
) -> tuple[list[BlockReport], dict[str, Any]]:
    check_needs_no_data(recipe)
    reports = []
    for done, block in enumerate(blocks):
        progress(ProgressEvent(f"prune {block.name}", done, len(blocks)))
        reports.append(prune_block(block, None, recipe, "none"))
    return reports, describe_calibration(None)


def _prune_from_statistics(
    model: nn.Module, blocks: Sequence[MoEBlock], statistics: ModelStatistics, recipe: Recipe, progress: Progress
) -> tuple[list[BlockReport], dict[str, Any]]:
    statistics.check_model(model)
    reports = []
    for done, block in enumerate(blocks):
        progress(ProgressEvent(f"prune {block.name}", done, len(blocks)))
        reports.append(prune_block(block, statistics.blocks[block.name], recipe, recipe.update))
    return reports, describe_calibration(statistics)
