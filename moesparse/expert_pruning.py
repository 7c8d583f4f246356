"""Remove whole experts from a model: score them on calibration text, choose what stays, cut, refit.

Experts are scored on the dense model in one pass, layer by layer; then the removal walks the layers again, so that each
refitted block is fitted to the inputs it will really get.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moesparse.blocks import MoEBlock, decoder_layers, find_moe_blocks
from moesparse.domains import DEFAULT_MIX, DomainReport, check_mix, mixed_scores, split_windows, survey
from moesparse.errors import CalibrationError, UsageError
from moesparse.layerwise import LayerStream
from moesparse.progress import Progress, ProgressEvent, silent
from moesparse.recorder import Recorder, record, window_sums
from moesparse.refine import RefineReport, refine_choice
from moesparse.refit import DEFAULT_RIDGE, RefitReport, check_refit, remove_and_refit
from moesparse.residual import measure_angles
from moesparse.saliency.experts import (
    ANGLED_NORM_SUM,
    Criterion,
    check_criterion,
    dead_experts,
    expert_scores,
    stack_sums,
    super_experts,
)
from moesparse.selection import BUDGETS, choose_experts
from moesparse.statistics import ExpertStatistics, ModelStatistics, model_fingerprint, windows_hash
from moesparse.surgery import SurgeryReport, remove_experts, router_groups

__all__ = ["ExpertReport", "choose_from_statistics", "choose_rule", "layerwise_statistics", "prune_experts"]

ONE_DOMAIN = "all"
"""Name of the text in a report when its domains were not named."""


@dataclass
class ExpertReport:
    """What `prune_experts` did.

    Attributes:
        criterion: the experts were scored by.
        surgery: kept and removed experts per block, config keys, bytes.
        dead: per block the experts without calibration tokens; they went first.
        refit: per block, when the kept experts were refitted.
        refine: per block, when the choice was refined.
        domains: what each domain of the text would keep, their overlap, and how firm the choice is.
        protected: super-experts, (block, expert), that stayed whatever their score.
        scores: [blocks, E], larger means keep; -inf for an expert without tokens.
        tokens: [blocks, E], how many tokens the dense model sent to each.
    """

    criterion: Criterion
    surgery: SurgeryReport
    dead: list[list[int]]
    refit: list[RefitReport]
    refine: list[RefineReport]
    domains: DomainReport
    protected: list[tuple[int, int]]
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
            "domains": self.domains.to_dict(),
            "protected": [list(pair) for pair in self.protected],
            "scores": [[score if math.isfinite(score) else None for score in row] for row in self.scores.tolist()],
            "tokens": self.tokens.tolist(),
        }


def prune_experts(
    model: nn.Module,
    calibration: Tensor | tuple[Tensor, Tensor | None] | ModelStatistics | Mapping[str, ModelStatistics],
    criterion: Criterion = "reap",
    *,
    keep: int | None = None,
    remove: float | None = None,
    domains: Sequence[str] | None = None,
    mix: str = DEFAULT_MIX,
    budget: str = "per-layer",
    floor: int | None = None,
    protect_super: bool = False,
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
        calibration: windows [n, t], (windows, attention mask), or saved statistics of this model, or of its domains by
            name.
        criterion: as in `expert_scores`.
        keep: experts that stay in every block; or
        remove: the share that goes, in (0, 1).
        domains: of each window; None is one domain.
        mix: how several domains become one choice, one of moesparse.domains.MIXES.
        budget: "per-layer"; "global" is refused, see `check_budget`.
        floor: of the global budget.
        protect_super: super-experts stay whatever their score, see moesparse.saliency.experts.super_experts.
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
    check_mix(mix)
    blocks = find_moe_blocks(model)
    check_budget(model, budget, floor)
    choose = choose_rule(blocks, keep=keep, remove=remove)
    choose(torch.zeros(len(blocks), blocks[0].num_experts))
    if refit:
        check_refit(blocks, ridge)
    if isinstance(calibration, ModelStatistics):
        calibration = {ONE_DOMAIN: calibration}
    if isinstance(calibration, Mapping):
        if refit or refine:
            what = "refit the experts that stay" if refit else "refine the choice"
            raise CalibrationError(
                f"calibration must be windows to {what}, got statistics: they are sums, and it needs the tokens; pass "
                "the windows, or remove without it (update='none')"
            )
        if domains is not None:
            raise UsageError("domains must be left out with statistics, which name their own")
        statistics = merged_statistics(model, calibration)
        sums = {name: stack_sums(part, criterion) for name, part in calibration.items()}
        scores = mixed_scores(sums, criterion, mix, seed=seed)
    else:
        ids, mask = calibration if isinstance(calibration, tuple) else (calibration, None)
        stream = LayerStream(model, decoder_layers(model, blocks)[0], ids, mask, batch_size, device)
        by_window: dict[str, Tensor] = {}
        statistics = layerwise_statistics(model, stream, ids, mask, progress, by_window)
        sums, scores = score_windows(statistics, by_window, criterion, domains=domains, mix=mix, seed=seed)
    protected = super_experts(statistics) if protect_super else []
    choose = choose_rule(blocks, keep=keep, remove=remove, protect=protected)
    found = survey(sums, criterion, choose, mix, seed=seed)
    kept = choose(scores)
    dead = dead_experts(statistics)
    tokens = torch.stack([sums.tokens.cpu() for sums in statistics.blocks.values()])
    refined: list[RefineReport] = []
    if refine and not isinstance(calibration, Mapping):
        if mask is not None:
            raise UsageError("windows must be without padding to refine the choice, got an attention mask")
        kept, refined = refine_choice(model, kept, ids, protect=protected, progress=progress)
    if isinstance(calibration, Mapping) or not refit:
        return ExpertReport(
            criterion, remove_experts(model, kept), dead, [], refined, found, protected, scores.cpu(), tokens
        )
    surgery, fits = remove_and_refit(
        model, kept, calibration, ridge=ridge, batch_size=batch_size, device=device, progress=progress
    )
    return ExpertReport(criterion, surgery, dead, fits, refined, found, protected, scores.cpu(), tokens)


def score_windows(
    statistics: ModelStatistics,
    by_window: Mapping[str, Tensor],
    criterion: Criterion,
    *,
    domains: Sequence[str] | None = None,
    mix: str = DEFAULT_MIX,
    seed: int = 0,
) -> tuple[dict[str, dict[str, Tensor]], Tensor]:
    """The sums of each domain's windows, and one score per expert, [blocks, E], from `layerwise_statistics`."""
    stack_sums(statistics, criterion)  # names the sum that is missing
    sums = split_windows(by_window, domains or [ONE_DOMAIN] * len(next(iter(by_window.values()))))
    if mix == "pooled":
        # the sums of a pass, which those of its windows equal to rounding only
        return sums, expert_scores(statistics, criterion, seed=seed)
    totals = {name: {key: value.sum(0) for key, value in part.items()} for name, part in sums.items()}
    return sums, mixed_scores(totals, criterion, mix, seed=seed)


def check_budget(model: nn.Module, budget: str, floor: int | None) -> None:
    """Refuse a budget over all blocks together: the smaller model could not be saved.

    No config of transformers states another number of experts for every layer (HunYuan's code would read a list, its
    config takes an int). `choose_from_statistics` shows what a global budget would keep.
    """
    if budget not in BUDGETS:
        raise UsageError(f"budget must be one of {', '.join(BUDGETS)}, got {budget!r}")
    if budget == "global":
        raise UsageError(
            f"budget must be 'per-layer' for this model, got 'global': it keeps another number of experts in every "
            f"block, and {type(getattr(model, 'config', model)).__name__} states one for all; moesparse calibrate "
            "--budget global shows the choice"
        )
    if floor is not None:
        raise UsageError(f"floor must be left out with budget='per-layer', got {floor}")


def merged_statistics(model: nn.Module, parts: Mapping[str, ModelStatistics]) -> ModelStatistics:
    """The statistics of all domains together.

    Raises:
        CalibrationError: a domain's statistics come from another model; names it.
    """
    if not parts:
        raise UsageError("calibration must hold the statistics of at least one domain, got none")
    for name, part in parts.items():
        try:
            part.check_model(model)
        except CalibrationError as error:
            raise CalibrationError(str(error) if name == ONE_DOMAIN else f"domain {name!r}: {error}") from error
    first, *others = parts.values()
    for other in others:
        first = first + other
    return first


def choose_from_statistics(
    blocks: Sequence[MoEBlock],
    statistics: ModelStatistics,
    criterion: Criterion,
    *,
    keep: int | None = None,
    remove: float | None = None,
    budget: str = "per-layer",
    floor: int | None = None,
    protect_super: bool = False,
    seed: int = 0,
) -> list[Tensor]:
    """Kept ids per block, by a criterion, within what the blocks' routers allow; the budgets of `choose_experts`."""
    protect = super_experts(statistics) if protect_super else []
    choose = choose_rule(blocks, keep=keep, remove=remove, budget=budget, floor=floor, protect=protect)
    return choose(expert_scores(statistics, criterion, seed=seed))


def choose_rule(
    blocks: Sequence[MoEBlock],
    *,
    keep: int | None = None,
    remove: float | None = None,
    budget: str = "per-layer",
    floor: int | None = None,
    protect: Sequence[tuple[int, int]] = (),
) -> Callable[[Tensor], list[Tensor]]:
    """`choose_experts` with all but the scores fixed: top_k and groups are those of the blocks' routers."""
    counts = {block.num_experts for block in blocks}
    if len(counts) != 1:
        raise UsageError(f"every block must have the same number of experts, got {sorted(counts)}")
    groups = next((group for group in map(router_groups, blocks) if group is not None), None)
    top_k = max(block.top_k or 1 for block in blocks)
    return partial(
        choose_experts,
        keep=keep,
        remove=remove,
        top_k=top_k,
        groups=groups,
        budget=budget,
        floor=floor,
        protect=protect,
    )


def layerwise_statistics(
    model: nn.Module,
    stream: LayerStream,
    windows: Tensor,
    mask: Tensor | None,
    progress: Progress = silent,
    by_window: dict[str, Tensor] | None = None,
    *,
    moments: str = "none",
    visit: Callable[[MoEBlock, ExpertStatistics, Sequence[Tensor]], None] | None = None,
) -> ModelStatistics:
    """What `calibrate` gives, one layer on the device at a time; the stream is used up.

    Args:
        model: the model the stream was made from.
        stream: over `windows`.
        windows: [n, t] token ids.
        mask: [n, t], 0 where there is padding, or None.
        progress: called after every layer.
        by_window: a dict to fill with the expert sums of every window, as in `calibrate`.
        moments: second moments to collect for `visit`; they are gone from the result.
        visit: called with each block, its statistics and the hidden states behind its layer, batch by batch, while the
            layer is on the device.
    """
    blocks = find_moe_blocks(model)
    positions = {id(layer): position for position, layer in enumerate(stream.layers)}
    at = [positions[id(model.get_submodule(block.layer))] for block in blocks]
    found: dict[str, ExpertStatistics] = {}
    done: list[Recorder] = []
    for position in range(max(at) + 1):
        progress(ProgressEvent("score experts", position, max(at) + 1, "layer"))
        here = [block for block, where in zip(blocks, at, strict=True) if where == position]
        with stream.on_device(position), ExitStack() as stack:
            recorders = stack.enter_context(record(here, moments))
            if by_window is not None:
                for recorder in recorders:
                    recorder.window_sums = {}
            stack.enter_context(measure_angles(model, recorders))

            def aim(number: int, recorders: Sequence[Any] = recorders) -> None:
                for recorder in recorders:
                    recorder.token_mask = stream.token_masks[number]
                    recorder.first_window, recorder.window_length = stream.first_window[number], stream.length

            for _ in stream.run(position, keep=True, before=aim):
                pass
            for recorder in recorders:
                if visit is not None:
                    visit(recorder.block, recorder.statistics, stream.hidden)
                recorder.statistics.moment.clear()
                recorder.statistics.gated_moment.clear()
        found |= {recorder.block.name: recorder.statistics.to("cpu") for recorder in recorders}
        done += recorders
    if not all(ANGLED_NORM_SUM in statistics.extra for statistics in found.values()):
        for statistics in found.values():
            statistics.extra.pop(ANGLED_NORM_SUM, None)
    if by_window is not None:
        by_window |= window_sums(done, len(windows))
    tokens = windows.numel() if mask is None else int(mask.sum())
    return ModelStatistics(found, model_fingerprint(model), windows_hash(windows, mask), None, tokens)
