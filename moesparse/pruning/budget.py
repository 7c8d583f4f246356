"""Fit the experts of a model into a number of bytes: how many stay, and which n:m pattern every block's matrices get.

The search is over what a packed checkpoint can say: one count of experts for all blocks (a config holds one number),
and in each block either dense matrices or one pattern for each of its two. Bytes are those of the packed format, n/m of
the values and one bit per weight that says where they were, in the model's dtype.

What a choice costs is estimated from sums over the calibration text, in nats per token, as the squared error it adds to
a block's output over the squared norm of the hidden states behind that layer:

- a pattern: sum_j r_j e_j, with e_j = sum_t g_jt^2 |f_jt|^2 what expert j gives and r_j = tr(D M D^T) / tr(W M W^T) the
  share of its matrix's output that is off after the weight rule, exact for the gated second moment M; what is off
  behind gate and up is counted as if it reached the output in the same share;
- a removed expert: e_j, times DROP_WEIGHT, because it is missing everywhere and not noise.

For every count the best patterns within the target are found exactly, by dynamic programming over bytes.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import reduce
from itertools import product
from typing import Any

import torch
from torch import Tensor

from moesparse.errors import UsageError
from moesparse.models.blocks import MoEBlock
from moesparse.system.sizes import parse_size
from moesparse.weights.patterns import Pattern

__all__ = [
    "DEFAULT_CHOICES",
    "DENSE",
    "DROP",
    "BlockCosts",
    "BudgetPlan",
    "BudgetSearch",
    "check_choices",
    "check_target",
    "matrix_sizes",
    "packed_bytes",
    "search",
    "target_in_bytes",
]

DENSE, DROP = "dense", "drop"
DEFAULT_CHOICES = (DROP, "2:4", "3:8", "4:8", "5:8", "6:8", DENSE)

TOLERANCE = 0.01
"""A plan meets a target when it takes at most this share of it less; it never takes more."""

DROP_WEIGHT = 2.0
"""Loss of an error by removal over that of the same error by a pattern. With 2 the estimate for removed experts came
within 14% of what was measured, refit included (benchmarks/studies/budget.py, docs/budgets.md)."""

# levels of bytes the search tells apart when the blocks' sizes have no large common divisor
_LEVELS = 1 << 16


def check_target(target: float | str) -> float | int:
    """A share of the dense experts' bytes, in (0, 1), or bytes.

    Args:
        target: 0.4 or "0.4", a share; or a number with a unit, "3.2GB" (10^9) or "3GiB" (2^30).

    Raises:
        UsageError: neither.
    """
    wanted = "must be a share of the dense experts' bytes between 0 and 1, or bytes with a unit such as 3.2GB or 3GiB"
    text = str(target)
    try:
        share = float(text)
    except ValueError:
        with contextlib.suppress(ValueError, OverflowError):
            return parse_size(text)
    else:
        if 0 < share < 1:
            return share
    raise UsageError(f"target_bytes {wanted}, got {target!r}")


def target_in_bytes(target: float | str, dense: int) -> int:
    """The most bytes the packed experts may take.

    Args:
        target: see `check_target`.
        dense: bytes of the dense experts.

    Raises:
        UsageError: no target, or more than the dense experts take.
    """
    value = check_target(target)
    count = int(value * dense) if isinstance(value, float) else value
    if count >= dense:
        raise UsageError(f"target_bytes must be below the {dense} bytes of the dense experts, got {target}")
    return count


def check_choices(choices: Sequence[str]) -> tuple[str, ...]:
    """The choices in their usual spelling.

    Raises:
        UsageError: one that is neither drop, dense nor n:m, or none that saves anything.
    """
    found = []
    for choice in choices:
        name = str(choice).strip()
        if name not in (DENSE, DROP):
            pattern = Pattern.parse(name) if ":" in name else None
            if pattern is None:
                raise UsageError(f"choices must be {DROP}, {DENSE} or n:m such as 2:4, got {name!r}")
            name = str(pattern)
        found.append(name)
    if not set(found) - {DENSE}:
        raise UsageError(f"choices must hold {DROP} or a pattern n:m, got {', '.join(found) or 'none'}")
    return tuple(dict.fromkeys(found))


def matrix_sizes(block: MoEBlock) -> dict[str, tuple[int, int]]:
    """Matrix name -> (weights of one expert, bytes of a weight)."""
    return {matrix.name: (matrix.weight[0].numel(), matrix.weight.element_size()) for matrix in block.matrices}


def packed_bytes(sizes: Mapping[str, tuple[int, int]], patterns: Mapping[str, str], experts: int) -> int:
    """Bytes of a block's matrices; all dense unless every one has a pattern, as checkpoints are packed.

    Args:
        sizes: see `matrix_sizes`.
        patterns: matrix -> n:m or "dense".
        experts: in the block.
    """
    packed = all(patterns[name] != DENSE for name in sizes)
    return sum(
        Pattern.parse(patterns[name]).packed_bytes(experts * numel, size) if packed else experts * numel * size
        for name, (numel, size) in sizes.items()
    )


@dataclass(frozen=True, eq=False)
class BlockCosts:
    """What the choices would cost in one block.

    Attributes:
        name: of the block.
        sizes: matrix -> (weights of one expert, bytes of a weight).
        residual: sum over the calibration tokens of the squared norm of the hidden states behind the layer.
        energy: [E] float64, sum_t g^2 |f|^2 of every expert.
        errors: matrix -> pattern -> [E] float64, the share of its output's energy that is off.
    """

    name: str
    sizes: dict[str, tuple[int, int]]
    residual: float
    energy: Tensor
    errors: dict[str, dict[str, Tensor]]

    def bytes(self, patterns: Mapping[str, str], experts: int) -> int:
        """See `packed_bytes`."""
        return packed_bytes(self.sizes, patterns, experts)

    def drop_loss(self, kept: Tensor) -> float:
        """Estimated nats per token of removing all but `kept`."""
        gone = self.energy.sum() - self.energy[kept].sum()
        return DROP_WEIGHT * max(float(gone), 0.0) / self.residual

    def pattern_loss(self, kept: Tensor, patterns: Mapping[str, str]) -> float:
        """Estimated nats per token of the patterns, matrix -> n:m or dense, on the experts that stay."""
        pruned = [self.errors[name][pattern] for name, pattern in patterns.items() if pattern != DENSE]
        return sum(float((error[kept] * self.energy[kept]).sum()) for error in pruned) / self.residual


@dataclass(frozen=True)
class BudgetPlan:
    """How a model meets a number of bytes.

    Attributes:
        keep: experts that stay in every block.
        patterns: block -> matrix -> n:m or "dense".
        bytes: of the experts, packed.
        drop_loss: block -> estimated nats per token of the removed experts.
        pattern_loss: block -> the same of its patterns.
    """

    keep: int
    patterns: dict[str, dict[str, str]]
    bytes: int
    drop_loss: dict[str, float]
    pattern_loss: dict[str, float]

    @property
    def loss(self) -> float:
        """Estimated nats per token in all."""
        return sum(self.drop_loss.values()) + sum(self.pattern_loss.values())

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {**asdict(self), "loss": self.loss}


@dataclass(frozen=True)
class BudgetSearch:
    """The plan found for a target, and the uniform one beside it.

    Attributes:
        target: the most bytes of the packed experts.
        dense: bytes of the dense experts.
        experts: in every block before.
        choices: what was searched over.
        mixed: the best plan.
        uniform: the best plan that gives every block one and the same pattern, at no more bytes.
    """

    target: int
    dense: int
    experts: int
    choices: tuple[str, ...]
    mixed: BudgetPlan
    uniform: BudgetPlan

    @property
    def met(self) -> bool:
        """Whether the plan takes the target's bytes to within TOLERANCE."""
        return self.mixed.bytes >= (1 - TOLERANCE) * self.target

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        parts = {"target": self.target, "dense": self.dense, "experts": self.experts, "choices": list(self.choices)}
        return {**parts, "met": self.met, "mixed": self.mixed.to_dict(), "uniform": self.uniform.to_dict()}


def search(
    costs: Sequence[BlockCosts],
    target: int,
    counts: Sequence[int],
    keep: Callable[[int], Sequence[Tensor]],
    choices: Sequence[str] = DEFAULT_CHOICES,
) -> BudgetSearch:
    """The plan of least estimated loss among those that take at most `target` bytes.

    Where the blocks are few, the sizes they can have lie more than 1% apart, and spending the last bytes would mean
    removing experts to afford a denser pattern: then the plan takes less, and `BudgetSearch.met` is False.

    Args:
        costs: of every block.
        target: bytes.
        counts: of experts that may stay; the whole number of them among these.
        keep: count -> kept ids of every block.
        choices: as `check_choices` gives them; `counts` says whether experts may be dropped.

    Raises:
        UsageError: no choice is small enough; names the least.
    """
    experts = len(costs[0].energy)
    dense = sum(cost.bytes(dict.fromkeys(cost.sizes, DENSE), experts) for cost in costs)
    patterns = [choice for choice in choices if choice not in (DROP, DENSE)]
    if DENSE in choices or not patterns:
        patterns.append(DENSE)
    floor = min(_total(costs, dict.fromkeys(costs[0].sizes, pattern), min(counts)) for pattern in patterns)
    if floor > target:
        raise UsageError(
            f"target_bytes must be at least {floor} bytes, {floor / dense:.3f} of the dense experts, with the choices "
            f"{', '.join(choices)} and at least {min(counts)} experts, got {target}; allow a sparser one such as 1:4"
        )
    plans: list[BudgetPlan] = []
    uniform: list[BudgetPlan] = []
    for count in counts:
        kept = keep(count)
        chosen = _best_patterns(costs, kept, count, patterns, target)
        if chosen is not None:
            plans.append(_plan(costs, kept, count, chosen))
        for pattern in patterns:
            everywhere = _plan(costs, kept, count, [dict.fromkeys(cost.sizes, pattern) for cost in costs])
            if everywhere.bytes <= target:
                uniform.append(everywhere)
    return BudgetSearch(target, dense, experts, tuple(choices), min(plans, key=_rank), min(uniform, key=_rank))


def _rank(plan: BudgetPlan) -> tuple[float, int, int]:
    """Of equal losses the fewer bytes, then more experts."""
    return plan.loss, plan.bytes, -plan.keep


def _plan(
    costs: Sequence[BlockCosts], kept: Sequence[Tensor], count: int, chosen: Sequence[Mapping[str, str]]
) -> BudgetPlan:
    blocks = list(zip(costs, kept, chosen, strict=True))
    return BudgetPlan(
        keep=count,
        patterns={cost.name: dict(patterns) for cost, _, patterns in blocks},
        bytes=sum(cost.bytes(patterns, count) for cost, _, patterns in blocks),
        drop_loss={cost.name: cost.drop_loss(ids) for cost, ids, _ in blocks},
        pattern_loss={cost.name: cost.pattern_loss(ids, patterns) for cost, ids, patterns in blocks},
    )


def _total(costs: Sequence[BlockCosts], patterns: Mapping[str, str], count: int) -> int:
    return sum(cost.bytes(patterns, count) for cost in costs)


def _best_patterns(
    costs: Sequence[BlockCosts], kept: Sequence[Tensor], count: int, patterns: Sequence[str], most: int
) -> list[dict[str, str]] | None:
    """For each block its matrices' patterns, together of least loss in at most `most` bytes; None where none is."""
    options: list[list[tuple[int, float, dict[str, str]]]] = []
    sparse = [pattern for pattern in patterns if pattern != DENSE]
    for cost, ids in zip(costs, kept, strict=True):
        named = [dict(zip(cost.sizes, chosen, strict=True)) for chosen in product(sparse, repeat=len(cost.sizes))]
        named += [dict.fromkeys(cost.sizes, DENSE)] if DENSE in patterns else []
        options.append([(cost.bytes(each, count), cost.pattern_loss(ids, each), each) for each in named])
    unit = reduce(math.gcd, (size for block in options for size, _, _ in block))
    if most // unit > _LEVELS:
        # sizes are rounded up, so that no plan takes more than the target
        unit = -(-most // _LEVELS)
    levels = most // unit
    best = torch.full((levels + 1,), torch.inf, dtype=torch.float64)
    best[0] = 0
    picks = []
    for block in options:
        new = torch.full_like(best, torch.inf)
        pick = torch.full(best.shape, -1, dtype=torch.int64)
        for number, (size, loss, _) in enumerate(block):
            step = -(-size // unit)
            if step > levels:
                continue
            candidate = best[: levels + 1 - step] + loss
            better = candidate < new[step:]
            new[step:] = torch.where(better, candidate, new[step:])
            pick[step:] = torch.where(better, number, pick[step:])
        best = new
        picks.append(pick)
    level = int(best.argmin())
    if not math.isfinite(float(best[level])):
        return None
    chosen: list[dict[str, str]] = []
    for block, pick in zip(reversed(options), reversed(picks), strict=True):
        size, _, patterns_of = block[int(pick[level])]
        chosen.append(patterns_of)
        level -= -(-size // unit)
    return chosen[::-1]
