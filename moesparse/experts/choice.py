"""Remove whole experts from a model: score them on calibration text, choose what stays, cut, refit.

Experts are scored on the dense model in one pass, layer by layer; then the removal walks the layers again, so that each
refitted block is fitted to the inputs it will really get.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moesparse.calibration.layers import layerwise_statistics
from moesparse.calibration.statistics import ModelStatistics
from moesparse.errors import CalibrationError, UsageError
from moesparse.experts.criteria import (
    Criterion,
    check_criterion,
    dead_experts,
    expert_scores,
    stack_sums,
    super_experts,
)
from moesparse.experts.domains import DEFAULT_MIX, DomainReport, check_mix, mixed_scores, split_windows, survey
from moesparse.experts.refit import DEFAULT_RIDGE, RefitReport, check_refit, remove_and_refit
from moesparse.experts.selection import BUDGETS, choose_experts
from moesparse.experts.surgery import SurgeryReport, remove_experts, router_groups
from moesparse.experts.swaps import RefineReport, refine_choice
from moesparse.models.blocks import MoEBlock, decoder_layers, find_moe_blocks
from moesparse.models.fingerprint import model_fingerprint
from moesparse.models.stream import LayerStream
from moesparse.progress import Progress, silent

__all__ = [
    "Choice",
    "ExpertReport",
    "check_budget",
    "check_sums_suffice",
    "choose_from_domains",
    "choose_from_statistics",
    "choose_from_windows",
    "choose_rule",
    "prune_experts",
]

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
        mix: how several domains become one choice, one of moesparse.experts.domains.MIXES.
        budget: "per-layer"; "global" is refused, see `check_budget`.
        floor: of the global budget.
        protect_super: super-experts stay whatever their score, see moesparse.experts.criteria.super_experts.
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
    rule: dict[str, Any] = {"keep": keep, "remove": remove, "protect_super": protect_super, "mix": mix, "seed": seed}
    if isinstance(calibration, Mapping):
        check_sums_suffice(refit, refine, domains)
        choice = choose_from_domains(blocks, model_fingerprint(model), calibration, criterion, **rule)
    else:
        ids, mask = calibration if isinstance(calibration, tuple) else (calibration, None)
        stream = LayerStream(model, decoder_layers(model, blocks)[0], ids, mask, batch_size, device)
        by_window: dict[str, Tensor] = {}
        statistics = layerwise_statistics(model, stream, ids, mask, progress, by_window)
        choice = choose_from_windows(blocks, statistics, by_window, criterion, domains=domains, **rule)
    kept = choice.kept
    refined: list[RefineReport] = []
    if refine and not isinstance(calibration, Mapping):
        if mask is not None:
            raise UsageError("windows must be without padding to refine the choice, got an attention mask")
        kept, refined = refine_choice(model, kept, ids, protect=choice.protected, progress=progress)
    if isinstance(calibration, Mapping) or not refit:
        return choice.report(remove_experts(model, kept), [], refined)
    surgery, fits = remove_and_refit(
        model, kept, calibration, ridge=ridge, batch_size=batch_size, device=device, progress=progress
    )
    return choice.report(surgery, fits, refined)


@dataclass(frozen=True)
class Choice:
    """Which experts stay, and why.

    Attributes:
        kept: ids per block.
        criterion, dead, domains, protected, scores, tokens: see `ExpertReport`.
    """

    kept: list[Tensor]
    criterion: Criterion
    dead: list[list[int]]
    domains: DomainReport
    protected: list[tuple[int, int]]
    scores: Tensor
    tokens: Tensor

    def report(
        self, surgery: SurgeryReport, refit: list[RefitReport], refine: list[RefineReport] | None = None
    ) -> ExpertReport:
        """Of the choice once it was carried out."""
        return ExpertReport(
            self.criterion,
            surgery,
            self.dead,
            refit,
            refine or [],
            self.domains,
            self.protected,
            self.scores.cpu(),
            self.tokens,
        )


def choose_from_windows(
    blocks: Sequence[MoEBlock],
    statistics: ModelStatistics,
    by_window: Mapping[str, Tensor],
    criterion: Criterion,
    *,
    keep: int | None,
    remove: float | None,
    domains: Sequence[str] | None,
    mix: str,
    protect_super: bool,
    seed: int,
) -> Choice:
    """From a pass over windows; the arguments are those of `prune_experts`."""
    sums, scores = score_windows(statistics, by_window, criterion, domains=domains, mix=mix, seed=seed)
    return _choose(blocks, statistics, sums, scores, criterion, keep, remove, mix, protect_super, seed)


def choose_from_domains(
    blocks: Sequence[MoEBlock],
    fingerprint: str,
    parts: Mapping[str, ModelStatistics],
    criterion: Criterion,
    *,
    keep: int | None,
    remove: float | None,
    mix: str,
    protect_super: bool,
    seed: int,
) -> Choice:
    """From saved statistics by domain of the model with this fingerprint; the rest is that of `prune_experts`."""
    statistics = merged_statistics(fingerprint, parts)
    sums = {name: stack_sums(part, criterion) for name, part in parts.items()}
    scores = mixed_scores(sums, criterion, mix, seed=seed)
    return _choose(blocks, statistics, sums, scores, criterion, keep, remove, mix, protect_super, seed)


def _choose(
    blocks: Sequence[MoEBlock],
    statistics: ModelStatistics,
    sums: Mapping[str, Mapping[str, Tensor]],
    scores: Tensor,
    criterion: Criterion,
    keep: int | None,
    remove: float | None,
    mix: str,
    protect_super: bool,
    seed: int,
) -> Choice:
    protected = super_experts(statistics) if protect_super else []
    choose = choose_rule(blocks, keep=keep, remove=remove, protect=protected)
    found = survey(sums, criterion, choose, mix, seed=seed)
    tokens = torch.stack([each.tokens.cpu() for each in statistics.blocks.values()])
    return Choice(choose(scores), criterion, dead_experts(statistics), found, protected, scores, tokens)


def check_sums_suffice(refit: bool, refine: bool, domains: Sequence[str] | None) -> None:
    """Refuse what needs the tokens themselves where there are only statistics."""
    if refit or refine:
        what = "refit the experts that stay" if refit else "refine the choice"
        raise CalibrationError(
            f"calibration must be windows to {what}, got statistics: they are sums, and it needs the tokens; pass "
            "the windows, or remove without it (update='none')"
        )
    if domains is not None:
        raise UsageError("domains must be left out with statistics, which name their own")


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


def merged_statistics(fingerprint: str, parts: Mapping[str, ModelStatistics]) -> ModelStatistics:
    """The statistics of all domains together, of the model with this fingerprint.

    Raises:
        CalibrationError: a domain's statistics come from another model; names it.
    """
    if not parts:
        raise UsageError("calibration must hold the statistics of at least one domain, got none")
    for name, part in parts.items():
        try:
            part.check_fingerprint(fingerprint)
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
