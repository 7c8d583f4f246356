"""Routers that choose groups of experts first, and what a removal may leave of the groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moesparse.errors import UsageError
from moesparse.experts.twins import GROUP_KEYS
from moesparse.models.blocks import MoEBlock

__all__ = ["RouterGroups", "groups_left", "router_groups"]


@dataclass(frozen=True)
class RouterGroups:
    """A router that first chooses groups of experts, then experts in them (DeepSeek-V3, arXiv 2412.19437).

    Attributes:
        count: groups; expert e of E is in group e // (E // count).
        top: groups a token may use.
        ranked_by: experts whose scores rank a group, so the fewest it may hold.
    """

    count: int
    top: int
    ranked_by: int

    def minimum(self, top_k: int) -> int:
        """The fewest experts a block may keep: every group equally many, and top_k in the groups a token uses."""
        return self.count * max(self.ranked_by, -(-top_k // self.top))

    def left(self, kept: Tensor, num_experts: int, top_k: int, name: str) -> int:
        """How many groups a block has once only `kept` stay.

        Args:
            kept: ids of its experts.
            num_experts: it had.
            top_k: a token uses.
            name: of the block, for the error.

        Raises:
            UsageError: unequal counts in the groups that stay, or fewer than the router needs.
        """
        counts = torch.bincount(kept // (num_experts // self.count), minlength=self.count)
        staying = counts[counts > 0]
        where = f"kept of {name}, whose router chooses {self.top} of {self.count} groups first,"
        if (staying != staying[0]).any():
            raise UsageError(f"{where} must hold equally many of each group, got {counts.tolist()}")
        if len(staying) < self.top:
            raise UsageError(f"{where} must leave at least {self.top} groups, got {len(staying)}")
        least = RouterGroups(len(staying), self.top, self.ranked_by).minimum(top_k)
        if len(kept) < least:
            raise UsageError(f"{where} must hold at least {least} experts, got {len(kept)}")
        return len(staying)


def router_groups(block: MoEBlock) -> RouterGroups | None:
    """The groups a block's router is limited to; None when it chooses among all experts at once."""
    router = block.router
    count = next((getattr(router, key) for key in GROUP_KEYS if isinstance(getattr(router, key, None), int)), 1)
    # DeepSeek-V2 has the numbers in its config and uses them with one of its methods only
    if count <= 1 or getattr(router, "topk_method", None) == "greedy":
        return None
    top = getattr(router, "topk_group", None)
    ranked_by = 1 if hasattr(router, "topk_method") else 2
    return RouterGroups(count, top if isinstance(top, int) else count, ranked_by)


def groups_left(blocks: Sequence[MoEBlock], kept: Sequence[Tensor]) -> dict[int, int]:
    """Groups of the router before -> after; equal counts in every group that stays, or a UsageError."""
    left: dict[int, int] = {}
    for block, ids in zip(blocks, kept, strict=True):
        groups = router_groups(block)
        if groups is None or len(ids) == block.num_experts:
            continue
        staying = groups.left(ids, block.num_experts, block.top_k or 1, block.name)
        if left.setdefault(groups.count, staying) != staying:
            raise UsageError(f"kept of {block.name} must leave as many groups as the other blocks, got {staying}")
    return {before: after for before, after in left.items() if before != after}
