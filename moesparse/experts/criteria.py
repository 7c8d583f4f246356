"""How much each expert matters: every published criterion from one set of saved sums, and one from the weights alone.

Most criteria are members of one family (arXiv 2606.15716):

    S_j(b, a, B) = N_j^-b * sum over the tokens t routed to expert j of g_jt^a * |f_jt|^B

with g the weight the model combines the expert with, f its output before that weight, |f| the Euclidean norm over H and
N_j the number of its tokens. Changing the criterion never runs the model again. Larger means keep.

`aimer` needs no sums and no text: see `aimer_scores`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moesparse.calibration.statistics import ANGLED_NORM_SUM, ExpertStatistics, ModelStatistics
from moesparse.errors import CalibrationError, UsageError
from moesparse.models.blocks import MoEBlock

__all__ = [
    "EXPERT_CRITERIA",
    "FAMILY",
    "NAMED_CRITERIA",
    "STABLE_OVERLAP",
    "WEIGHT_CRITERION",
    "Stability",
    "Sums",
    "aimer_scores",
    "bootstrap_stability",
    "check_criterion",
    "check_from_sums",
    "check_sums",
    "dead_experts",
    "expert_scores",
    "jaccard",
    "mix",
    "recommend",
    "resample",
    "score_sums",
    "stack_sums",
    "sums_needed",
    "super_experts",
]

FAMILY: dict[str, tuple[float, float, float]] = {
    "frequency": (0, 0, 0),
    "gate-sum": (0, 1, 0),
    "ean": (0, 0, 1),
    "reap": (1, 1, 1),
    "man": (1, 0, 1),
    "msan": (1, 0, 2),
    "gated-norm": (0, 1, 1),
    "gated-energy": (0, 2, 2),
}
"""Name -> (b, a, B). frequency: tokens routed; gate-sum: soft count (SEER-MoE, arXiv 2404.05089); ean: summed norm of
the output; reap: mean gated norm (arXiv 2510.13999); man and msan: mean (squared) norm, gated-norm, gated-energy: arXiv
2606.15716."""

EXPERT_CRITERIA = (*FAMILY, "easy-ep", "random")
"""Every criterion with a name that reads sums of a pass over text. easy-ep (arXiv 2504.06792): sum of
g * |f| * max(0, 1 - cos(h, h + r)), h the residual before the experts and r what they add to it together; random: the
floor every other must beat."""

WEIGHT_CRITERION = "aimer"
"""The one that reads the weights alone (arXiv 2603.18492): `aimer_scores`."""

NAMED_CRITERIA = (*EXPERT_CRITERIA, WEIGHT_CRITERION)
"""Every criterion with a name."""


# (a, B) -> the sum that holds it.
_SUMS = {
    (0.0, 0.0): "tokens",
    (1.0, 0.0): "gate_sum",
    (0.0, 1.0): "norm_sum",
    (0.0, 2.0): "norm_sq_sum",
    (1.0, 1.0): "gated_norm_sum",
    (2.0, 2.0): "gated_norm_sq_sum",
}

STABLE_OVERLAP = 0.8
"""Mean overlap under resampling, in the least stable block, below which a choice is called unstable: with 8 kept
experts, one of them differs in every draw (7 / 9)."""

_RECOMMENDED = {
    "paper": {"task-agnostic": "man", "task-specific": "gated-norm"},
    "measured": {"task-agnostic": "reap", "task-specific": "gated-energy"},
}

Criterion = str | tuple[float, float, float]
Sums = Mapping[str, Tensor]
"""Name of a sum -> [blocks, E] float64 (or [windows, blocks, E]); see `sums_needed`."""


def expert_scores(statistics: ModelStatistics, criterion: Criterion, *, seed: int = 0) -> Tensor:
    """Score every expert of a model.

    Args:
        statistics: of the dense model, live or loaded from a file.
        criterion: one of EXPERT_CRITERIA, or (b, a, B) with any b and an (a, B) whose sum the statistics hold.
        seed: of "random".

    Returns:
        [blocks, E] float64 on the CPU, blocks in forward order; larger means keep. Experts that saw no token have -inf:
        they go first under every criterion.

    Raises:
        UsageError: an unknown criterion, one that reads the weights alone, or an (a, B) that no sum holds.
        CalibrationError: the statistics lack the sum of easy-ep, or their blocks differ in the number of experts.
    """
    check_from_sums(criterion)
    return score_sums(stack_sums(statistics, criterion), criterion, seed=seed)


def recommend(objective: str = "task-agnostic", evidence: str = "paper") -> str:
    """The criterion for an objective, by one of two kinds of evidence, which do not agree.

    "paper", the principle of arXiv 2606.15716: to keep a model general, judge an expert by its mean output, however
    rarely it is used and whatever its gate (b = 1, a = 0: man, msan); to keep what one task needs, by its summed gated
    output there (b = 0, gate kept: gated-norm, gated-energy). "measured", what kept most of the embedded model in the
    tables of docs/experts.md: reap on a mixture of texts, gated-energy on the text of one domain. That is one small
    model.

    Args:
        objective: "task-agnostic" or "task-specific".
        evidence: "paper" or "measured".

    Raises:
        UsageError: another objective or evidence.
    """
    if evidence not in _RECOMMENDED:
        raise UsageError(f"evidence must be one of {', '.join(_RECOMMENDED)}, got {evidence!r}")
    found = _RECOMMENDED[evidence]
    if objective not in found:
        raise UsageError(f"objective must be one of {', '.join(found)}, got {objective!r}")
    return found[objective]


@torch.no_grad()
def aimer_scores(block: MoEBlock) -> Tensor:
    """Score the experts of a block by their weights: rms(w) / mean |w|, the inverse of AIMER (arXiv 2603.18492).

    w is all weights of an expert's matrices, gate, up and down, as one vector; biases are left out. The paper removes
    the experts of the largest mean |w| / rms(w), those with their weights spread most evenly; here larger means keep.
    1 where all weights are of one size, sqrt(n) where only one of n is not zero; no scale of the weights changes it.

    Holds one matrix of one expert in float32; sums are float32 over the inputs of an output row, float64 over rows.

    Args:
        block: whose weights are in memory.

    Returns:
        [E] float64 on the CPU; 0 for an expert of zeros.
    """
    scores = torch.zeros(block.num_experts, dtype=torch.float64)
    for expert in range(block.num_experts):
        absolute, squared, count = 0.0, 0.0, 0
        for matrix in block.matrices:
            weight = matrix.weight[expert].float()
            absolute += float(weight.abs().sum(dim=1).double().sum())
            squared += float(weight.square().sum(dim=1).double().sum())
            count += weight.numel()
        if absolute > 0:
            scores[expert] = (squared * count) ** 0.5 / absolute
    return scores


def dead_experts(statistics: ModelStatistics) -> list[list[int]]:
    """For each block the experts that saw no token of the calibration text."""
    return [(block.tokens == 0).nonzero().flatten().tolist() for block in statistics.blocks.values()]


def super_experts(statistics: ModelStatistics) -> list[tuple[int, int]]:
    """Experts with extreme outputs, (block, expert), which carry the massive activations of a model.

    After Su et al. (arXiv 2507.23279): the largest output over all calibration tokens lies above the 99.5% quantile of
    all experts and above a tenth of the largest. Here it must also be ten times the median of all experts, so that a
    model without outliers has none; and any block may hold one.

    Raises:
        CalibrationError: the statistics hold no maxima.
    """
    maxima = [block.maxima.get("output") for block in statistics.blocks.values()]
    if any(each is None for each in maxima):
        raise CalibrationError(
            "statistics must hold the largest outputs to find super-experts, got none: calibrate again"
        )
    largest = [each.double().cpu() for each in maxima if each is not None]
    together = torch.cat(largest)
    least = max(float(together.quantile(0.995)), 0.1 * float(together.max()), 10 * float(together.median()))
    # >=, because among fewer than 200 experts the quantile is next to the largest itself
    return (
        [
            (block, expert)
            for block, values in enumerate(largest)
            for expert in (values >= least).nonzero().flatten().tolist()
        ]
        if least > 0
        else []
    )


def jaccard(kept_a: Sequence[Tensor], kept_b: Sequence[Tensor]) -> Tensor:
    """Overlap of two choices in each block: experts in both over experts in either, [blocks] float64."""
    if len(kept_a) != len(kept_b):
        raise UsageError(f"choices to compare must cover the same blocks, got {len(kept_a)} and {len(kept_b)}")
    pairs = [(set(a.tolist()), set(b.tolist())) for a, b in zip(kept_a, kept_b, strict=True)]
    return torch.tensor([len(a & b) / len(a | b) for a, b in pairs], dtype=torch.float64)


def mix(scores: Mapping[str, Tensor], weights: Mapping[str, float] | None = None) -> Tensor:
    """One score from the scores of several domains, each domain normalised to sum 1 in every block.

    Args:
        scores: domain -> [blocks, E], all by one criterion. An expert that is dead in a domain adds nothing there.
        weights: domain -> its share, any positive scale; None weighs all alike.

    Returns:
        [blocks, E] float64; -inf for experts that are dead in every domain.
    """
    if not scores:
        raise UsageError("scores must hold at least one domain, got none")
    if weights is not None and (weights.keys() != scores.keys() or min(weights.values()) <= 0):
        raise UsageError(f"weights must be positive, one for each of {', '.join(scores)}, got {dict(weights)}")
    shares = dict.fromkeys(scores, 1.0) if weights is None else weights
    first = next(iter(scores.values()))
    total = torch.zeros_like(first, dtype=torch.float64)
    alive = torch.zeros_like(first, dtype=torch.bool)
    for name, score in scores.items():
        if score.shape != first.shape:
            raise UsageError(f"scores must have one shape, got {list(first.shape)} and {list(score.shape)} ({name})")
        here = score > -torch.inf
        amount = score.double().masked_fill(~here, 0)
        total += shares[name] * amount / amount.sum(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
        alive |= here
    return (total / sum(shares.values())).masked_fill(~alive, -torch.inf)


@dataclass(frozen=True)
class Stability:
    """How much a choice depends on which demonstrations were drawn.

    Attributes:
        demonstrations: how many there are.
        overlap: [blocks], Jaccard overlap of the choice from all demonstrations with that from a resample, mean.
        kept: [blocks, E], share of resamples in which the expert stays.
    """

    demonstrations: int
    overlap: Tensor
    kept: Tensor

    @property
    def stable(self) -> bool:
        """Whether every block keeps at least STABLE_OVERLAP of its choice on average."""
        return bool(self.overlap.min() >= STABLE_OVERLAP)

    def describe(self) -> str:
        """One sentence for a report."""
        verdict = "" if self.stable else "the choice is unstable, give more text: "
        return (
            f"{verdict}resampling the {self.demonstrations} demonstrations keeps "
            f"{100 * float(self.overlap.mean()):.0f}% of the choice on average, "
            f"{100 * float(self.overlap.min()):.0f}% in the least stable block"
        )

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "demonstrations": self.demonstrations,
            "overlap": self.overlap.tolist(),
            "kept": self.kept.tolist(),
            "stable": self.stable,
            "summary": self.describe(),
        }


def bootstrap_stability(
    demonstrations: Sequence[ModelStatistics],
    criterion: Criterion,
    choose: Callable[[Tensor], Sequence[Tensor]],
    *,
    samples: int = 100,
    seed: int = 0,
) -> Stability:
    """Draw the demonstrations again with replacement, and see how much of the choice stays (Efron 1979).

    Args:
        demonstrations: statistics of one demonstration each, all of one model.
        criterion: as in `expert_scores`.
        choose: scores [blocks, E] -> kept ids per block, as `choose_experts` with its other arguments fixed.
        samples: resamples.
        seed: of the draws.
    """
    if len(demonstrations) < 2:
        raise UsageError(f"demonstrations must be at least 2 to be drawn again, got {len(demonstrations)}")
    check_from_sums(criterion)
    parts = [stack_sums(one, criterion) for one in demonstrations]
    sums = {name: torch.stack([part[name] for part in parts]) for name in parts[0]}
    return resample(
        {"all": sums},
        lambda drawn: choose(score_sums(drawn["all"], criterion, seed=seed)),
        samples=samples,
        seed=seed,
    )


def resample(
    groups: Mapping[str, Sums],
    choose: Callable[[Mapping[str, Sums]], Sequence[Tensor]],
    *,
    samples: int = 100,
    seed: int = 0,
) -> Stability:
    """Draw the demonstrations of every group again with replacement, as many as it has.

    Args:
        groups: group -> name of a sum -> [demonstrations, blocks, E].
        choose: the groups' sums, [blocks, E] each -> kept ids per block.
        samples: resamples.
        seed: of the draws.
    """

    def total(rows: Mapping[str, Tensor | slice]) -> dict[str, Sums]:
        return {
            group: {name: value[rows[group]].sum(0) for name, value in sums.items()} for group, sums in groups.items()
        }

    counts = {group: len(sums["tokens"]) for group, sums in groups.items()}
    everything = choose(total(dict.fromkeys(groups, slice(None))))
    generator = torch.Generator().manual_seed(seed)
    overlap = torch.zeros(samples, len(everything), dtype=torch.float64)
    kept = torch.zeros(next(iter(groups.values()))["tokens"].shape[1:], dtype=torch.float64)
    for sample in range(samples):
        choice = choose(total({g: torch.randint(n, (n,), generator=generator) for g, n in counts.items()}))
        overlap[sample] = jaccard(everything, choice)
        for block, ids in enumerate(choice):
            kept[block, ids] += 1 / samples
    return Stability(sum(counts.values()), overlap.mean(0), kept)


def check_criterion(criterion: Criterion, name: str = "criterion") -> None:
    """Raise UsageError, listing what there is, unless `expert_scores` knows the criterion."""
    if isinstance(criterion, str):
        if criterion not in NAMED_CRITERIA:
            raise UsageError(f"{name} must be one of {', '.join(NAMED_CRITERIA)}, got {criterion!r}")
        return
    if len(criterion) != 3 or tuple(map(float, criterion[1:])) not in _SUMS:
        held = ", ".join(f"({a:g}, {B:g})" for a, B in _SUMS)
        raise UsageError(f"{name} (b, a, B) must have (a, B) among {held}, got {criterion}")


def check_from_sums(criterion: Criterion, name: str = "criterion") -> None:
    """The same, and refuse the criterion that reads no sums."""
    check_criterion(criterion, name)
    if criterion == WEIGHT_CRITERION:
        raise UsageError(
            f"{name} must be one that reads the sums of a text, {', '.join(EXPERT_CRITERIA)}, got {criterion!r}, which "
            "reads the weights alone"
        )


def sums_needed(criterion: Criterion) -> tuple[str, ...]:
    """Names of the sums a criterion reads; the token counts always, they say who is dead."""
    if criterion == "random":
        return ("tokens",)
    if criterion == "easy-ep":
        return ("tokens", ANGLED_NORM_SUM)
    _, a, B = FAMILY[criterion] if isinstance(criterion, str) else criterion
    return tuple(dict.fromkeys(("tokens", _SUMS[float(a), float(B)])))


def check_sums(statistics: ModelStatistics, criterion: Criterion) -> None:
    """Refuse statistics that lack a sum which the criterion reads; CalibrationError names it."""
    stack_sums(statistics, criterion)


def stack_sums(statistics: ModelStatistics, criterion: Criterion) -> dict[str, Tensor]:
    """The sums a criterion needs by name, [blocks, E] float64 each."""
    blocks = statistics.blocks
    counts = sorted({block.num_experts for block in blocks.values()})
    if len(counts) != 1:
        raise CalibrationError(f"every block must have the same number of experts, got {counts}")
    return {
        name: torch.stack([_sum_of(block, name, where).double().cpu() for where, block in blocks.items()])
        for name in sums_needed(criterion)
    }


def _sum_of(block: ExpertStatistics, name: str, where: str) -> Tensor:
    if name != ANGLED_NORM_SUM:
        return getattr(block, name)
    found = block.extra.get(name)
    if found is None:
        raise CalibrationError(
            f"easy-ep needs the angle by which the experts turn the residual, which the statistics of {where} lack: in "
            "this model the layer's output is not its residual plus the MoE module's output, or angles were not "
            "recorded; choose gated-norm, which differs by that factor only"
        )
    return found


def score_sums(sums: Sums, criterion: Criterion, *, seed: int = 0) -> Tensor:
    """`expert_scores` from the sums of `stack_sums`."""
    tokens = sums["tokens"]
    if criterion == "random":
        generator = torch.Generator().manual_seed(seed)
        score = torch.rand(tokens.shape, generator=generator, dtype=torch.float64)
    elif criterion == "easy-ep":
        score = sums[ANGLED_NORM_SUM]
    else:
        b, a, B = FAMILY[criterion] if isinstance(criterion, str) else criterion
        score = sums[_SUMS[float(a), float(B)]] * tokens.clamp_min(1).pow(-float(b))
    return score.masked_fill(tokens == 0, -torch.inf)
