"""Which experts stay: from the sums of a pass over text, or of saved ones, by a criterion and over domains."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moesparse.calibration.data import ONE_DOMAIN
from moesparse.calibration.statistics import ModelStatistics
from moesparse.errors import CalibrationError, UsageError
from moesparse.experts.criteria import (
    Criterion,
    check_sums,
    dead_experts,
    expert_scores,
    stack_sums,
    super_experts,
)
from moesparse.experts.domains import DEFAULT_MIX, DomainReport, mixed_scores, split_windows, survey
from moesparse.experts.plan_file import ExpertPlan
from moesparse.experts.refit import RefitReport
from moesparse.experts.router_groups import router_groups
from moesparse.experts.selection import choose_experts
from moesparse.experts.surgery import SurgeryReport
from moesparse.experts.swaps import RefineReport
from moesparse.models.blocks import MoEBlock
from moesparse.models.layer_counts import check_equal_counts

__all__ = [
    "Choice",
    "ExpertReport",
    "Rule",
    "check_sums_suffice",
    "choose_from_domains",
    "choose_from_plan",
    "choose_from_scores",
    "choose_from_statistics",
    "choose_from_windows",
    "choose_rule",
    "score_windows",
]


# parameters of `choose_experts` -> the fields of a recipe that they come from
_FIELDS = {"keep": "keep_experts", "remove": "experts", "budget": "expert_budget", "floor": "expert_floor"}
_COUNTS = re.compile(rf"\b({'|'.join(_FIELDS)})(?= must |=)")


@dataclass(frozen=True)
class Rule:
    """How experts are judged and how many stay.

    Attributes:
        criterion: as in `expert_scores`.
        keep: experts that stay in every block; or
        remove: the share that goes, in (0, 1).
        mix: how several domains become one choice, one of moesparse.experts.domains.MIXES.
        protect_super: super-experts stay whatever their score, see moesparse.experts.criteria.super_experts.
        seed: of the "random" criterion.
        divisible_by: the count that stays is a multiple of it, as in `choose_experts`.
        budget: "per-layer" or "global", as there.
        floor: fewest experts of a block under the global budget.
    """

    criterion: Criterion = "reap"
    keep: int | None = None
    remove: float | None = None
    mix: str = DEFAULT_MIX
    protect_super: bool = False
    seed: int = 0
    divisible_by: int | None = None
    budget: str = "per-layer"
    floor: int | None = None

    @property
    def count(self) -> dict[str, Any]:
        """How many stay, as `choose_rule` takes it."""
        return {name: getattr(self, name) for name in ("keep", "remove", "divisible_by", "budget", "floor")}


@dataclass(frozen=True)
class Choice:
    """Which experts stay, and why.

    Attributes:
        kept: ids per block.
        criterion: the experts were scored by.
        dead: per block the experts without calibration tokens; they went first.
        domains: what each domain of the text would keep, their overlap, and how firm the choice is; None where no text
            made the choice.
        protected: super-experts, (block, expert), that stayed whatever their score.
        scores: [blocks, E], larger means keep; -inf for an expert without tokens. None where the choice was a plan.
        tokens: [blocks, E], how many tokens the dense model sent to each; None where no text made the choice.
    """

    kept: list[Tensor]
    criterion: Criterion
    dead: list[list[int]]
    domains: DomainReport | None
    protected: list[tuple[int, int]]
    scores: Tensor | None
    tokens: Tensor | None


@dataclass
class ExpertReport:
    """What a removal of experts did.

    Attributes:
        choice: the first one, before any swaps.
        surgery: kept and removed experts per block, config keys, bytes.
        refit: per block, when the kept experts were refitted.
        refine: per block, when the choice was refined.
        method: what became of the others, one of moesparse.experts.merging.METHODS.
    """

    choice: Choice
    surgery: SurgeryReport
    refit: list[RefitReport]
    refine: list[RefineReport]
    method: str = "remove"

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON; a score of -inf becomes None, and what is not known is left out."""
        choice, more = self.choice, dict[str, Any]()
        if choice.scores is not None:
            rows = choice.scores.tolist()
            more["scores"] = [[score if math.isfinite(score) else None for score in row] for row in rows]
        if choice.tokens is not None:
            more["tokens"] = choice.tokens.tolist()
        if self.method != "remove":
            more["method"] = self.method
        return {
            "criterion": choice.criterion,
            **self.surgery.to_dict(),
            "dead": choice.dead,
            "refit": [report.to_dict() for report in self.refit],
            "refine": [report.to_dict() for report in self.refine],
            "domains": None if choice.domains is None else choice.domains.to_dict(),
            "protected": [list(pair) for pair in choice.protected],
            **more,
        }


def choose_from_windows(
    blocks: Sequence[MoEBlock],
    statistics: ModelStatistics,
    by_window: Mapping[str, Tensor],
    rule: Rule,
    domains: Sequence[str] | None = None,
) -> Choice:
    """From a pass over windows.

    Args:
        blocks: of the dense model.
        statistics: of the pass.
        by_window: the sums of every window, [windows, blocks, E] each.
        rule: of the choice.
        domains: of each window; None is one domain.
    """
    sums, scores = score_windows(statistics, by_window, rule, domains)
    return _choose(blocks, statistics, sums, scores, rule)


def choose_from_domains(
    blocks: Sequence[MoEBlock], fingerprint: str, parts: Mapping[str, ModelStatistics], rule: Rule
) -> Choice:
    """From saved statistics by domain of the model with this fingerprint.

    Raises:
        CalibrationError: statistics of another model, or that lack what the criterion reads.
    """
    statistics = merged_statistics(fingerprint, parts)
    sums = {name: stack_sums(part, rule.criterion) for name, part in parts.items()}
    return _choose(blocks, statistics, sums, mixed_scores(sums, rule.criterion, rule.mix, seed=rule.seed), rule)


def choose_from_plan(plan: ExpertPlan) -> Choice:
    """What a file says; see `ExpertPlan.check` first."""
    dead: list[list[int]] = [[] for _ in plan.kept]
    return Choice(plan.tensors(), plan.criterion, dead, None, [], None, None)


def choose_from_scores(blocks: Sequence[MoEBlock], scores: Tensor, rule: Rule) -> Choice:
    """From scores that are there: of a file, see `ExpertScores.check` first, or of the weights.

    Args:
        blocks: of the dense model.
        scores: [blocks, E] float64, larger means keep; -inf for what goes first.
        rule: of the choice.

    Raises:
        UsageError: counts that cannot be.
    """
    choose = choose_rule(blocks, **rule.count)
    dead = [(row == -math.inf).nonzero().flatten().tolist() for row in scores]
    return Choice(choose(scores), rule.criterion, dead, None, [], scores, None)


def _choose(
    blocks: Sequence[MoEBlock],
    statistics: ModelStatistics,
    sums: Mapping[str, Mapping[str, Tensor]],
    scores: Tensor,
    rule: Rule,
) -> Choice:
    protected = super_experts(statistics) if rule.protect_super else []
    choose = choose_rule(blocks, **rule.count, protect=protected)
    found = survey(sums, rule.criterion, choose, rule.mix, seed=rule.seed)
    tokens = torch.stack([each.tokens.cpu() for each in statistics.blocks.values()])
    return Choice(choose(scores), rule.criterion, dead_experts(statistics), found, protected, scores, tokens)


def check_sums_suffice(refit: bool, refine: bool, merge: bool = False) -> None:
    """Refuse what needs the tokens themselves where there are only statistics."""
    if refit or refine or merge:
        what = "refit the experts that stay" if refit else "refine the choice" if refine else "merge experts"
        raise CalibrationError(
            f"calibration must be windows to {what}, got statistics: they are sums, and it needs the tokens; pass "
            "the windows, or remove without it (update='none')"
        )


def score_windows(
    statistics: ModelStatistics,
    by_window: Mapping[str, Tensor],
    rule: Rule,
    domains: Sequence[str] | None = None,
) -> tuple[dict[str, dict[str, Tensor]], Tensor]:
    """The sums of each domain's windows, and one score per expert, [blocks, E], from a pass over windows."""
    check_sums(statistics, rule.criterion)
    sums = split_windows(by_window, domains or [ONE_DOMAIN] * len(next(iter(by_window.values()))))
    if rule.mix == "pooled":
        # the sums of a pass, which those of its windows equal to rounding only
        return sums, expert_scores(statistics, rule.criterion, seed=rule.seed)
    totals = {name: {key: value.sum(0) for key, value in part.items()} for name, part in sums.items()}
    return sums, mixed_scores(totals, rule.criterion, rule.mix, seed=rule.seed)


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
    divisible_by: int | None = None,
) -> Callable[[Tensor], list[Tensor]]:
    """`choose_experts` with all but the scores fixed: top_k and groups are those of the blocks' routers.

    What it refuses is named as the fields of a recipe are.
    """
    check_equal_counts(blocks)
    groups = next((group for group in map(router_groups, blocks) if group is not None), None)
    top_k = max(block.top_k or 1 for block in blocks)
    how: dict[str, Any] = {
        "keep": keep,
        "remove": remove,
        "budget": budget,
        "floor": floor,
        "divisible_by": divisible_by,
    }

    def choose(scores: Tensor) -> list[Tensor]:
        try:
            return choose_experts(scores, top_k=top_k, groups=groups, protect=protect, **how)
        except UsageError as error:
            # who calls gave the fields of a recipe
            text = _COUNTS.sub(lambda found: _FIELDS[found[1]], str(error))
            raise UsageError(text) from error

    return choose
