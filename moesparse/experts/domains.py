"""Calibration text of several kinds: how far their choices of experts agree, one choice for all, and how firm it is.

A domain is a named part of the calibration text. Each is scored by itself. The one choice comes from the sums of all
text together ("pooled"), or from the mean of the domains' scores, each normalised to sum 1 in every block ("equal"):
then a domain counts the same however loud its activations or however much text it has. A few demonstrations are enough
where experts specialise (EASY-EP, arXiv 2504.06792: 5 to 25); whether they were enough here is measured by drawing the
windows again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from moesparse.errors import CalibrationError, UsageError
from moesparse.experts.criteria import Criterion, Stability, Sums, jaccard, resample, score_sums, sums_needed
from moesparse.experts.criteria import mix as mix_scores

__all__ = ["DEFAULT_MIX", "MIXES", "DomainReport", "check_mix", "mixed_scores", "split_windows", "survey"]

MIXES = ("pooled", "equal")
DEFAULT_MIX = "pooled"

Choose = Callable[[Tensor], Sequence[Tensor]]
"""Scores [blocks, E] -> ids that stay in each block."""


@dataclass(frozen=True)
class DomainReport:
    """What each domain would keep, and how far that agrees.

    Attributes:
        mix: how the domains became one choice, one of MIXES.
        windows: domain -> calibration windows; None for statistics from a file.
        scores: domain -> [blocks, E] float64, -inf for experts without tokens there.
        kept: domain -> for each block the ids that domain alone would keep.
        overlap: (domain, domain) -> Jaccard overlap of what they keep, [blocks].
        stability: of the one choice when the windows of every domain are drawn again; None with one window or sums.
    """

    mix: str
    windows: dict[str, int | None]
    scores: dict[str, Tensor]
    kept: dict[str, list[list[int]]]
    overlap: dict[tuple[str, str], list[float]]
    stability: Stability | None

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON; scores of experts without tokens are None."""
        return {
            "mix": self.mix,
            "windows": self.windows,
            "scores": {
                name: [[None if value == -torch.inf else value for value in row] for row in score.tolist()]
                for name, score in self.scores.items()
            },
            "kept": self.kept,
            "overlap": [{"domains": list(pair), "blocks": values} for pair, values in self.overlap.items()],
            "stability": None if self.stability is None else self.stability.to_dict(),
        }


def check_mix(mix: str, name: str = "mix") -> None:
    """Raise UsageError unless `mix` is one of MIXES."""
    if mix not in MIXES:
        raise UsageError(f"{name} must be one of {', '.join(MIXES)}, got {mix!r}")


def mixed_scores(domains: Mapping[str, Sums], criterion: Criterion, mix: str = DEFAULT_MIX, *, seed: int = 0) -> Tensor:
    """One score per expert from the sums of several domains.

    Args:
        domains: domain -> name of a sum -> [blocks, E].
        criterion: as in `expert_scores`.
        mix: one of MIXES.
        seed: of "random".

    Returns:
        [blocks, E] float64; -inf for experts without tokens in any domain.
    """
    check_mix(mix)
    if mix == "equal":
        return mix_scores({name: score_sums(sums, criterion, seed=seed) for name, sums in domains.items()})
    first = next(iter(domains.values()))
    pooled = {name: torch.stack([sums[name] for sums in domains.values()]).sum(0) for name in first}
    return score_sums(pooled, criterion, seed=seed)


def split_windows(sums: Sums, domains: Sequence[str]) -> dict[str, dict[str, Tensor]]:
    """Cut sums by window [n, blocks, E] into domain -> the same of its windows, domains in order of the alphabet."""
    count = len(next(iter(sums.values())))
    if len(domains) != count:
        raise UsageError(f"domains must name the domain of each of the {count} windows, got {len(domains)}")
    return {
        name: {key: value[torch.tensor([domain == name for domain in domains])] for key, value in sums.items()}
        for name in sorted(set(domains))
    }


def survey(
    domains: Mapping[str, Sums], criterion: Criterion, choose: Choose, mix: str = DEFAULT_MIX, *, seed: int = 0
) -> DomainReport:
    """Score every domain by itself, compare what they would keep, and draw the windows again.

    Args:
        domains: domain -> name of a sum -> [windows, blocks, E], or [blocks, E] where windows were added up already.
        criterion: as in `expert_scores`.
        choose: scores -> kept ids, as `choose_experts` with its other arguments fixed.
        mix: one of MIXES.
        seed: of the draws and of "random".

    Raises:
        CalibrationError: a domain without a window, or without a token.
    """
    check_mix(mix)
    names = sums_needed(criterion)
    needed = {domain: {name: sums[name] for name in names} for domain, sums in domains.items()}
    counts = {domain: len(sums["tokens"]) if sums["tokens"].ndim == 3 else None for domain, sums in needed.items()}
    totals = {
        domain: sums if counts[domain] is None else {name: value.sum(0) for name, value in sums.items()}
        for domain, sums in needed.items()
    }
    for domain, sums in totals.items():
        if not bool(sums["tokens"].any()):
            raise CalibrationError(f"domain {domain!r} must hold text, got no token")
    scores = {domain: score_sums(sums, criterion, seed=seed) for domain, sums in totals.items()}
    kept = {domain: list(choose(score)) for domain, score in scores.items()}
    drawable = None not in counts.values() and sum(count or 0 for count in counts.values()) > 1
    stability = (
        resample(needed, lambda drawn: choose(mixed_scores(drawn, criterion, mix, seed=seed)), seed=seed)
        if drawable and criterion != "random"
        else None
    )
    return DomainReport(
        mix=mix,
        windows=counts,
        scores=scores,
        kept={domain: [ids.tolist() for ids in choice] for domain, choice in kept.items()},
        overlap={(a, b): jaccard(kept[a], kept[b]).tolist() for a, b in combinations(kept, 2)},
        stability=stability,
    )
