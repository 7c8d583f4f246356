"""Remove whole experts from a model: score them on calibration text, choose what stays, cut, refit.

Experts are scored on the dense model in one pass, layer by layer; then the removal walks the layers again, so that each
refitted block is fitted to the inputs it will really get.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moesparse.blocks import MoEBlock, decoder_layers, find_moe_blocks
from moesparse.calibration import record
from moesparse.errors import CalibrationError, UsageError
from moesparse.layerwise import LayerStream
from moesparse.progress import Progress, ProgressEvent, silent
from moesparse.refine import RefineReport, refine_choice
from moesparse.refit import DEFAULT_RIDGE, RefitReport, check_refit, remove_and_refit
from moesparse.residual import measure_angles
from moesparse.saliency.experts import ANGLED_NORM_SUM, Criterion, check_criterion, dead_experts, expert_scores
from moesparse.selection import choose_experts
from moesparse.statistics import ExpertStatistics, ModelStatistics, model_fingerprint, windows_hash
from moesparse.surgery import SurgeryReport, remove_experts, router_groups

__all__ = ["ExpertReport", "choose_from_statistics", "layerwise_statistics", "prune_experts"]


@dataclass
class ExpertReport:
    """What `prune_experts` did.

    Attributes:
        criterion: the experts were scored by.
        surgery: kept and removed experts per block, config keys, bytes.
        dead: per block the experts without calibration tokens; they went first.
        refit: per block, when the kept experts were refitted.
        refine: per block, when the choice was refined.
        scores: [blocks, E], larger means keep; -inf for an expert without tokens.
        tokens: [blocks, E], how many tokens the dense model sent to each.
    """

    criterion: Criterion
    surgery: SurgeryReport
    dead: list[list[int]]
    refit: list[RefitReport]
    refine: list[RefineReport]
    scores: Tensor
    tokens: Tensor

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON; a score of -inf becomes None."""
        return {
            "criterion": self.criterion,
            **self.surgery.to_dict(),
            "dead": self.dead,
            "refit": [report.to_dict() for report in self.refit],
            "refine": [report.to_dict() for report in self.refine],
            "scores": [[score if math.isfinite(score) else None for score in row] for row in self.scores.tolist()],
            "tokens": self.tokens.tolist(),
        }


def prune_experts(
    model: nn.Module,
    calibration: Tensor | tuple[Tensor, Tensor | None] | ModelStatistics,
    criterion: Criterion = "reap",
    *,
    keep: int | None = None,
    remove: float | None = None,
    refit: bool = True,
    refine: bool = False,
    ridge: float = DEFAULT_RIDGE,
    seed: int = 0,
    batch_size: int = 8,
    device: torch.device | None = None,
    progress: Progress = silent,
) -> ExpertReport:
    """Remove the experts that matter least from every block, in place.

    Args:
        model: a dense transformers causal language model.
        calibration: windows [n, t], (windows, attention mask), or saved statistics of this model.
        criterion: as in `expert_scores`.
        keep: experts that stay in every block; or
        remove: the share that goes, in (0, 1).
        refit: re-solve the kept down projections; needs windows.
        refine: swap experts after the first choice while the block's error falls; needs windows without padding.
        ridge: of the refit.
        seed: of the "random" criterion.
        batch_size: windows in one forward.
        device: where the layer at work goes; None leaves it.
        progress: called with every step.

    Raises:
        UsageError: a count, share or criterion that cannot be. UnsupportedModelError: what cannot be placed.
        CalibrationError: statistics of another model, or a refit without windows. Nothing is changed by any of them.
    """
    check_criterion(criterion)
    blocks = find_moe_blocks(model)
    empty = torch.zeros(len(blocks), blocks[0].num_experts)
    _choose(blocks, empty, keep, remove)
    if refit:
        check_refit(blocks, ridge)
    if isinstance(calibration, ModelStatistics):
        if refit or refine:
            what = "refit the experts that stay" if refit else "refine the choice"
            raise CalibrationError(
                f"calibration must be windows to {what}, got statistics: they are sums, and it needs the tokens; pass "
                "the windows, or remove without it (update='none')"
            )
        calibration.check_model(model)
        statistics = calibration
    else:
        ids, mask = calibration if isinstance(calibration, tuple) else (calibration, None)
        stream = LayerStream(model, decoder_layers(model, blocks)[0], ids, mask, batch_size, device)
        statistics = layerwise_statistics(model, stream, ids, mask, progress)
    scores = expert_scores(statistics, criterion, seed=seed)
    kept = _choose(blocks, scores, keep, remove)
    dead = dead_experts(statistics)
    tokens = torch.stack([sums.tokens.cpu() for sums in statistics.blocks.values()])
    refined: list[RefineReport] = []
    if refine and not isinstance(calibration, ModelStatistics):
        if mask is not None:
            raise UsageError("windows must be without padding to refine the choice, got an attention mask")
        kept, refined = refine_choice(model, kept, ids, progress=progress)
    if isinstance(calibration, ModelStatistics) or not refit:
        return ExpertReport(criterion, remove_experts(model, kept), dead, [], refined, scores.cpu(), tokens)
    surgery, fits = remove_and_refit(
        model, kept, calibration, ridge=ridge, batch_size=batch_size, device=device, progress=progress
    )
    return ExpertReport(criterion, surgery, dead, fits, refined, scores.cpu(), tokens)


def choose_from_statistics(
    blocks: Sequence[MoEBlock],
    statistics: ModelStatistics,
    criterion: Criterion,
    *,
    keep: int | None = None,
    remove: float | None = None,
    seed: int = 0,
) -> list[Tensor]:
    """Kept ids per block, by a criterion, within what the blocks' routers allow."""
    return _choose(blocks, expert_scores(statistics, criterion, seed=seed), keep, remove)


def layerwise_statistics(
    model: nn.Module, stream: LayerStream, windows: Tensor, mask: Tensor | None, progress: Progress = silent
) -> ModelStatistics:
    """What `calibrate` gives, one layer on the device at a time; the stream is used up.

    Args:
        model: the model the stream was made from.
        stream: over `windows`.
        windows: [n, t] token ids.
        mask: [n, t], 0 where there is padding, or None.
        progress: called after every layer.
    """
    blocks = find_moe_blocks(model)
    positions = {id(layer): position for position, layer in enumerate(stream.layers)}
    at = [positions[id(model.get_submodule(block.layer))] for block in blocks]
    found: dict[str, ExpertStatistics] = {}
    for position in range(max(at) + 1):
        progress(ProgressEvent("score experts", position, max(at) + 1, "layer"))
        here = [block for block, where in zip(blocks, at, strict=True) if where == position]
        with stream.on_device(position), ExitStack() as stack:
            recorders = stack.enter_context(record(here))
            stack.enter_context(measure_angles(model, recorders))

            def aim(number: int, recorders: Sequence[Any] = recorders) -> None:
                for recorder in recorders:
                    recorder.token_mask = stream.token_masks[number]
                    recorder.first_window, recorder.window_length = stream.first_window[number], stream.length

            for _ in stream.run(position, keep=True, before=aim):
                pass
        found |= {recorder.block.name: recorder.statistics.to("cpu") for recorder in recorders}
    if not all(ANGLED_NORM_SUM in statistics.extra for statistics in found.values()):
        for statistics in found.values():
            statistics.extra.pop(ANGLED_NORM_SUM, None)
    tokens = windows.numel() if mask is None else int(mask.sum())
    return ModelStatistics(found, model_fingerprint(model), windows_hash(windows, mask), None, tokens)


def _choose(blocks: Sequence[MoEBlock], scores: Tensor, keep: int | None, remove: float | None) -> list[Tensor]:
    counts = {block.num_experts for block in blocks}
    if len(counts) != 1:
        raise UsageError(f"every block must have the same number of experts, got {sorted(counts)}")
    groups = [router_groups(block) for block in blocks]
    limited = next((group for group in groups if group is not None), None)
    top_k = max(block.top_k or 1 for block in blocks)
    return choose_experts(scores, keep=keep, remove=remove, top_k=top_k, groups=limited)
