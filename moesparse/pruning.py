"""Prune a model in memory: experts removed, weights pruned, and the report of both."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from moesparse._version import __version__
from moesparse.budget import DENSE, matrix_sizes, packed_bytes
from moesparse.calibration.statistics import ModelStatistics
from moesparse.calibration.windows import check_windows
from moesparse.errors import CalibrationError
from moesparse.experts.choice import prune_experts
from moesparse.layer_pruning import BlockReport, TensorReport, prune_block, prune_layerwise
from moesparse.models.blocks import MoEBlock, decoder_layers, find_moe_blocks
from moesparse.models.fingerprint import model_fingerprint
from moesparse.models.look import check_dense, check_finite
from moesparse.models.stream import LayerStream
from moesparse.progress import Progress, ProgressEvent, silent
from moesparse.recipe import DEFAULT_EXPERT_SALIENCY, DEFAULT_SALIENCY, DEFAULT_UPDATE, Recipe
from moesparse.system.processes import default_device

__all__ = [
    "DEFAULT_EXPERT_SALIENCY",
    "DEFAULT_SALIENCY",
    "DEFAULT_UPDATE",
    "BlockReport",
    "Recipe",
    "Report",
    "TensorReport",
    "expert_sizes",
    "prune",
]


@dataclass
class Report:
    """What `prune` did, ready for JSON; a checkpoint carries it as moesparse_report.json.

    Attributes:
        recipe: `Recipe.to_dict`.
        version: of moesparse.
        blocks: what was done to the weights, in forward order; empty when only experts were removed.
        calibration: windows, length and tokens, or the hash and tokens of the statistics.
        seconds: of the whole run.
        experts: `ExpertReport.to_dict` when experts were removed.
        fingerprint: `model_fingerprint` of the model before: statistics of it can be shown beside the result.
        sizes: see `expert_sizes`, before ("before") and after ("after").
        budget: `BudgetReport.to_dict` when bytes were given.
    """

    recipe: dict[str, Any]
    version: str
    blocks: list[BlockReport]
    calibration: dict[str, Any]
    seconds: float
    experts: dict[str, Any] | None = None
    fingerprint: str | None = None
    sizes: dict[str, dict[str, int]] = field(default_factory=dict)
    budget: dict[str, Any] | None = None

    @property
    def sparsity(self) -> float:
        """Share of exact zeros over all expert matrices that are left; 0 when only experts were removed."""
        tensors = [tensor for block in self.blocks for tensor in block.tensors]
        if not tensors:
            return 0.0
        sizes = [torch.Size(tensor.shape).numel() for tensor in tensors]
        return sum(t.sparsity * size for t, size in zip(tensors, sizes, strict=True)) / sum(sizes)

    @property
    def fallbacks(self) -> list[tuple[str, str, int]]:
        """(block, tensor, expert) for every expert that fell back to magnitude."""
        return [(b.name, t.name, expert) for b in self.blocks for t in b.tensors for expert in t.fallbacks]

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "sparsity": self.sparsity}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)


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
        from moesparse.budget_pruning import prune_to_budget

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


def expert_sizes(model: nn.Module, blocks: Sequence[MoEBlock], recipe: Recipe | None = None) -> dict[str, int]:
    """Bytes of a model, its buffers left out.

    Args:
        model: holds the blocks.
        blocks: its MoE blocks.
        recipe: whose patterns the expert matrices hold; None counts them dense.

    Returns:
        {"model": all parameters as they are in memory, "experts": the expert matrices among them, "packed": the expert
        matrices in the packed format, `Pattern.packed_bytes`}.
    """
    matrices = [matrix.weight for block in blocks for matrix in block.matrices]
    experts = sum(weight.numel() * weight.element_size() for weight in matrices)
    packed = experts if recipe is None else sum(_packed_bytes(block, recipe) for block in blocks)
    whole = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return {"model": whole, "experts": experts, "packed": packed}


def _packed_bytes(block: MoEBlock, recipe: Recipe) -> int:
    found = {matrix.name: recipe.pattern_of(block.name, matrix.name) for matrix in block.matrices}
    named = {name: DENSE if pattern is None else str(pattern) for name, pattern in found.items()}
    return packed_bytes(matrix_sizes(block), named, block.num_experts)


def describe_calibration(calibration: Any) -> dict[str, Any]:
    """What the report says of the calibration data."""
    if isinstance(calibration, Mapping):
        return {
            "statistics": {name: part.text_hash for name, part in calibration.items()},
            "tokens": sum(part.tokens for part in calibration.values()),
        }
    if isinstance(calibration, ModelStatistics):
        return {"statistics": calibration.text_hash, "tokens": calibration.tokens}
    if calibration is None:
        return {"windows": 0, "length": 0, "tokens": 0}
    windows = calibration[0] if isinstance(calibration, tuple) else calibration
    return {"windows": len(windows), "length": windows.shape[1], "tokens": int(windows.numel())}


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


def check_needs_no_data(recipe: Recipe) -> None:
    """Refuse to prune without calibration what looks at more than the weights.

    Raises:
        CalibrationError: names the rules.
    """
    if not recipe.reads_weights_alone:
        raise CalibrationError(
            f"calibration must be windows or statistics for saliency={recipe.saliency!r}, update={recipe.update!r}, "
            "got None; only magnitude without an update needs no data"
        )


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
