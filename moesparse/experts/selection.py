"""From a score per expert to the experts that stay."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from moesparse.errors import UsageError
from moesparse.experts.router_groups import RouterGroups

__all__ = ["BUDGETS", "check_divisor", "choose_experts"]

BUDGETS = ("per-layer", "global")


def choose_experts(
    scores: Tensor,
    *,
    keep: int | None = None,
    remove: float | None = None,
    top_k: int,
    groups: RouterGroups | None = None,
    budget: str = "per-layer",
    floor: int | None = None,
    protect: Iterable[tuple[int, int]] = (),
    divisible_by: int | None = None,
) -> list[Tensor]:
    """Choose which experts stay.

    Args:
        scores: [blocks, E], larger means keep; -inf for experts that saw no tokens, which go first. Of equal scores the
            lower id stays.
        keep: experts that stay per block (on average, with the global budget).
        remove: share that goes, in (0, 1), instead of `keep`: round(remove * E) experts, halves to the even number;
            with router groups, that share of each group.
        top_k: experts a token uses; no block keeps fewer.
        groups: the router's groups; the same number stays in each.
        budget: "per-layer" keeps the same number in every block, as every loader needs. "global" ranks the experts of
            all blocks together, each block's scores divided by their sum, so the blocks differ in count: see
            moesparse.models.layer_counts.
        floor: fewest experts a block keeps under the global budget; top_k when None.
        protect: (block, expert) pairs that stay whatever their score, super-experts for example.
        divisible_by: the count that stays is a multiple of it, and of the router's groups: with `remove` the next one
            above what the share would leave, so that no more go than were asked for.

    Returns:
        For each block the kept ids, ascending int64.

    Raises:
        UsageError: counts or shares that cannot be; names the bound.
    """
    if scores.ndim != 2 or scores.isnan().any():
        what = "NaN" if scores.ndim == 2 else f"shape {list(scores.shape)}"
        raise UsageError(f"scores must be [blocks, E] and no NaN, got {what}")
    if budget not in BUDGETS:
        raise UsageError(f"budget must be one of {', '.join(BUDGETS)}, got {budget!r}")
    if (keep is None) == (remove is None):
        raise UsageError(f"exactly one of keep and remove must be given, got keep={keep}, remove={remove}")
    blocks, E = scores.shape
    protected = _protected(protect, blocks, E)
    ranked = scores.double().masked_fill(protected, torch.inf)
    check_divisor(divisible_by)
    if budget == "global":
        if divisible_by is not None:
            raise UsageError(f"divisible_by must be left out with budget='global', got {divisible_by}")
        if groups is not None:
            raise UsageError("budget must be 'per-layer' for a router with groups, got 'global'")
        least = max(top_k, floor or 0)
        total = _count(keep, remove, E, least, blocks)
        return _choose_global(ranked, protected, total, least)
    if floor is not None:
        raise UsageError(f"floor must be left out with budget='per-layer', got {floor}")
    parts = 1 if groups is None else groups.count
    least = top_k if groups is None else groups.minimum(top_k)
    count = _count(keep, remove, E, least, parts=parts, divisor=divisible_by)
    _check_protected(protected, count, parts)
    # stable, so that of equal scores the lower id comes first
    order = ranked.view(blocks, parts, E // parts).argsort(dim=-1, descending=True, stable=True)
    chosen = order[..., : count // parts] + torch.arange(parts, device=order.device)[:, None] * (E // parts)
    return list(chosen.flatten(1).sort(dim=1).values.cpu())


def check_divisor(divisible_by: int | None) -> None:
    """Raise UsageError for what no count can be a multiple of."""
    whole = isinstance(divisible_by, int) and not isinstance(divisible_by, bool)
    if divisible_by is not None and not (whole and divisible_by > 0):
        raise UsageError(f"divisible_by must be a positive number of experts, got {divisible_by!r}")


def _count(
    keep: int | None,
    remove: float | None,
    E: int,
    least: int,
    blocks: int = 1,
    parts: int = 1,
    divisor: int | None = None,
) -> int:
    """Experts to keep in `blocks` blocks of `E` together."""
    if keep is not None:
        if isinstance(keep, bool) or not isinstance(keep, int) or not 0 < keep <= E:
            raise UsageError(f"keep must be between 1 and the {E} experts of a block, got {keep}")
        if keep % parts:
            raise UsageError(f"keep must be a multiple of the router's {parts} groups, got {keep}")
        if divisor is not None and keep % divisor:
            raise UsageError(f"keep must be a multiple of divisible_by={divisor}, got {keep}")
        count = keep
    else:
        assert remove is not None
        if not 0 < remove < 1:
            raise UsageError(f"remove must be a share between 0 and 1, got {remove}")
        size = blocks * E // parts
        kept = parts * (size - round(remove * size))
        if blocks > 1:
            if kept < least * blocks:
                raise UsageError(f"remove must leave at least {least} of {E} experts per block, got {remove}")
            return kept
        count = kept if divisor is None else _next_multiple(kept, divisor, parts, E)
    if count < least:
        raise UsageError(
            f"at least {least} experts of a block must stay (top_k, and the router's groups), got "
            + (f"keep={keep}" if keep is not None else f"remove={remove}, which leaves {count} of {E}")
        )
    return count * blocks


def _next_multiple(kept: int, divisor: int, parts: int, E: int) -> int:
    """The least count from `kept` on that a divisor and the router's groups divide."""
    step = math.lcm(divisor, parts)
    count = -(-kept // step) * step
    if count >= E:
        of = f"{divisor}" if parts == 1 else f"{divisor} and of the router's {parts} groups"
        raise UsageError(
            f"divisible_by must divide a count from the {kept} experts that would stay up to {E - 1} of {E}, got "
            f"{divisor}: the next multiple of {of} is {count}; remove a larger share"
        )
    return count


def _protected(pairs: Iterable[tuple[int, int]], blocks: int, E: int) -> Tensor:
    mask = torch.zeros(blocks, E, dtype=torch.bool)
    for block, expert in pairs:
        if not (0 <= block < blocks and 0 <= expert < E):
            raise UsageError(f"protect must name (block, expert) below ({blocks}, {E}), got ({block}, {expert})")
        mask[block, expert] = True
    return mask


def _check_protected(protected: Tensor, count: int, parts: int) -> None:
    held = protected.view(len(protected), parts, -1).sum(-1)
    if int(held.max()) > count // parts:
        block = int(held.amax(1).argmax())
        where = f"block {block}" if parts == 1 else f"a router group of block {block}"
        raise UsageError(
            f"protect must name at most the {count // parts} experts kept in {where}, got {int(held.max())}"
        )


def _choose_global(ranked: Tensor, protected: Tensor, total: int, least: int) -> list[Tensor]:
    """The best `least` of every block, then the best of all blocks by their share of the block's sum."""
    E = ranked.shape[1]
    if least > E:
        raise UsageError(f"floor must be at most the {E} experts of a block, got {least}")
    if int(protected.sum()) > total:
        raise UsageError(f"protect must name at most the {total} experts kept in all, got {int(protected.sum())}")
    finite = ranked.masked_fill(~ranked.isfinite(), 0)
    share = finite / finite.sum(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    share = share.masked_fill(ranked.isinf(), -torch.inf).masked_fill(protected, torch.inf)
    order = ranked.argsort(dim=1, descending=True, stable=True)
    stays = torch.zeros_like(protected).scatter_(1, order[:, :least], True) | protected
    rest = share.masked_fill(stays, -torch.inf).flatten()
    # dead experts only when nothing else is left: among -inf, chosen ones must not count twice
    candidates = (~stays.flatten()).nonzero().flatten()
    best = candidates[rest[candidates].argsort(descending=True, stable=True)]
    stays.view(-1)[best[: max(0, total - int(stays.sum()))]] = True
    return [row.nonzero().flatten() for row in stays.cpu()]
