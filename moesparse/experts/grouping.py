"""Which experts of a block become one: groups by how alike the experts are, as three papers form them.

A group is a list of expert ids, first the one that stays: its place and its router row are the merged expert's. Where
a router chooses among groups of experts first (`RouterGroups`), experts are merged within those alone, so that each
keeps as many.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["GROUP_SIZE", "cluster", "cosines", "nearest", "pseudo_prune"]

GROUP_SIZE = 16
"""C of REAM (arXiv 2604.04356): experts in a group at most, the one that stays among them."""


def cosines(rows: Tensor) -> Tensor:
    """[E, E] float64: cosine of every two rows [E, n]; 0 with a row of zeros."""
    rows = rows.double()
    unit = rows / rows.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    return unit @ unit.T


def pseudo_prune(
    similarity: Tensor, scores: Tensor, kept: Tensor, parts: int = 1, size: int = GROUP_SIZE
) -> list[list[int]]:
    """The groups of REAM (Jha et al. 2026, arXiv 2604.04356): the best experts that stay take in the others first.

    From the expert of the highest score on, each one that stays takes in the most similar of those that do not and are
    still alone, until its group has `size`. Most stay as they are.

    Args:
        similarity: [E, E], larger is more alike.
        scores: [E] of the experts.
        kept: [K] ids of those that stay.
        parts: router groups, which are equal runs of ids.
        size: at most, in a group; more where K groups of that size would not hold all.
    """
    E = len(similarity)
    size = max(size, -(-E // len(kept)))
    order = kept[scores[kept].argsort(descending=True, stable=True)].tolist()
    alone = sorted(set(range(E)) - set(order))
    groups = []
    for expert in order:
        near = [other for other in alone if _part(other, E, parts) == _part(expert, E, parts)]
        near.sort(key=lambda other: -float(similarity[expert, other]))
        taken = near[: size - 1]
        alone = [other for other in alone if other not in taken]
        groups.append([expert, *taken])
    return sorted(groups)


def nearest(similarity: Tensor, kept: Tensor, parts: int = 1) -> list[list[int]]:
    """The groups of M-SMoE (Li et al. 2024, arXiv 2310.01334): who goes joins the most similar that stays.

    Args are those of `pseudo_prune`.
    """
    E = len(similarity)
    groups = {expert: [expert] for expert in sorted(kept.tolist())}
    for other in sorted(set(range(E)) - groups.keys()):
        near = [expert for expert in groups if _part(expert, E, parts) == _part(other, E, parts)]
        groups[max(near, key=lambda expert: float(similarity[expert, other]))].append(other)
    return list(groups.values())


def cluster(points: Tensor, scores: Tensor, count: int, parts: int = 1) -> list[list[int]]:
    """The groups of HC-SMoE (Chen et al. 2025, arXiv 2410.08589): hierarchical clustering with average linkage.

    From every expert alone, the two groups join whose members lie nearest to one another on average, by the Euclidean
    distance of their points, until `count` are left. The one that stays is that of the highest score.

    Args:
        points: [E, H], the mean output of every expert.
        scores: [E] of the experts.
        count: groups in all; a multiple of `parts`.
        parts: router groups, which are equal runs of ids; each is clustered by itself.
    """
    E = len(points)
    groups = []
    for part in range(parts):
        ids = range(part * E // parts, (part + 1) * E // parts)
        for members in _linked(points[ids.start : ids.stop].double().cpu(), count // parts):
            members = [ids[member] for member in members]
            groups.append(sorted(members, key=lambda expert: (-float(scores[expert]), expert)))
    return sorted(groups)


def _linked(points: Tensor, count: int) -> list[list[int]]:
    distance = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
    members: list[list[int]] = [[number] for number in range(len(points))]
    distance.fill_diagonal_(torch.inf)
    while len(members) > count:
        one, other = divmod(int(distance.argmin()), len(members))
        one, other = min(one, other), max(one, other)
        # the mean over all pairs of the joined group, from those of its two parts (Lance and Williams 1967)
        a, b = len(members[one]), len(members[other])
        joined = (a * distance[one] + b * distance[other]) / (a + b)
        distance[one], distance[:, one] = joined, joined
        distance[one, one] = torch.inf
        left = [number for number in range(len(members)) if number != other]
        distance = distance[left][:, left]
        members[one] += members.pop(other)
    return members


def _part(expert: int, experts: int, parts: int) -> int:
    return expert * parts // experts
