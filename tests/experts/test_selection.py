"""Choosing experts: counts, ties, groups, budgets, and every argument that cannot be."""

from __future__ import annotations

import pytest
import torch

from moesparse.errors import UsageError
from moesparse.experts.router_groups import RouterGroups
from moesparse.experts.selection import choose_experts

SCORES = torch.tensor([[0.1, 0.9, 0.5, 0.5, 0.2, 0.8, 0.3, 0.4], [8.0, 7, 6, 5, 4, 3, 2, -torch.inf]])


def choose(**arguments):
    return [ids.tolist() for ids in choose_experts(SCORES, **({"top_k": 2} | arguments))]


def test_the_best_stay_in_ascending_order_and_ties_go_to_the_lower_id():
    assert choose(keep=3) == [[1, 2, 5], [0, 1, 2]]
    assert choose(keep=4) == [[1, 2, 3, 5], [0, 1, 2, 3]]


@pytest.mark.parametrize(
    ("remove", "kept"),
    # 8 * 0.25 = 2; 8 * 0.3 = 2.4 rounds to 2; 8 * 0.3125 = 2.5 to the even 2; 8 * 0.4375 = 3.5 to the even 4
    [(0.25, 6), (0.3, 6), (0.3125, 6), (0.4375, 4), (0.5, 4), (0.75, 2)],
)
def test_a_share_is_rounded_to_the_nearest_count(remove, kept):
    assert [len(ids) for ids in choose(remove=remove)] == [kept, kept]


def test_dead_experts_go_first():
    assert 7 not in choose(keep=7)[1]
    assert choose(keep=8)[1] == list(range(8))


def test_every_router_group_keeps_as_many():
    assert choose(keep=4, groups=RouterGroups(2, 1, 2)) == [[1, 2, 5, 7], [0, 1, 4, 5]]
    # 4 experts a group, 0.3 * 4 = 1.2: one goes in each
    assert [len(ids) for ids in choose(remove=0.3, groups=RouterGroups(2, 1, 2))] == [6, 6]


@pytest.mark.parametrize("groups", [None, RouterGroups(2, 1, 1), RouterGroups(3, 3, 1)], ids=["", "2", "3"])
@pytest.mark.parametrize("divisor", [1, 2, 4, 5, 8])
def test_a_share_leaves_the_next_count_that_divides(divisor, groups):
    scores, parts = torch.rand(2, 24, generator=torch.Generator().manual_seed(0)), groups.count if groups else 1
    for remove in (0.1, 0.25, 0.4, 0.7):
        plain = len(choose_experts(scores, remove=remove, top_k=1, groups=groups)[0])
        fits = [count for count in range(plain, 24) if count % divisor == 0 and count % parts == 0]
        if not fits:
            with pytest.raises(UsageError, match=f"divisible_by must divide a count from the {plain} .* got {divisor}"):
                choose_experts(scores, remove=remove, top_k=1, groups=groups, divisible_by=divisor)
            continue
        kept = choose_experts(scores, remove=remove, top_k=1, groups=groups, divisible_by=divisor)
        assert [ids.tolist() for ids in kept] == [
            ids.tolist() for ids in choose_experts(scores, keep=fits[0], top_k=1, groups=groups)
        ]


def test_protected_experts_stay():
    assert choose(keep=2, protect=[(0, 0), (1, 7)]) == [[0, 1], [0, 7]]


def test_a_global_budget_moves_experts_between_blocks():
    scores = torch.tensor([[1.0, 1, 1, 1], [1.0, 0.1, 0.05, 0.01]])
    kept = choose_experts(scores, keep=3, top_k=1, budget="global")
    assert [ids.tolist() for ids in kept] == [[0, 1, 2, 3], [0, 1]]
    floored = choose_experts(scores, keep=3, top_k=1, budget="global", floor=3)
    assert [len(ids) for ids in floored] == [3, 3]
    # a block's scale must not matter: shares are compared
    assert [
        len(ids) for ids in choose_experts(scores * torch.tensor([[1.0], [1e6]]), keep=3, top_k=1, budget="global")
    ] == [4, 2]
    shared = choose_experts(scores, remove=0.25, top_k=1, budget="global", protect=[(1, 3)])
    assert sum(map(len, shared)) == 6
    assert 3 in shared[1].tolist()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"keep": 0}, "keep must be between 1 and the 8 experts of a block, got 0"),
        ({"keep": 9}, "keep must be between 1 and the 8 experts of a block, got 9"),
        ({"keep": 1}, "at least 2 experts of a block must stay .*, got keep=1"),
        ({"remove": 0.9}, "at least 2 experts .* got remove=0.9, which leaves 1 of 8"),
        ({"remove": 1.0}, "remove must be a share between 0 and 1, got 1.0"),
        ({"remove": 0.0}, "remove must be a share between 0 and 1, got 0.0"),
        ({}, "exactly one of keep and remove must be given, got keep=None, remove=None"),
        ({"keep": 4, "remove": 0.5}, "exactly one of keep and remove"),
        ({"keep": 5, "groups": RouterGroups(2, 1, 2)}, "multiple of the router's 2 groups, got 5"),
        ({"keep": 4, "groups": RouterGroups(2, 1, 3)}, "at least 6 experts of a block must stay"),
        ({"keep": 4, "budget": "both"}, "budget must be one of per-layer, global, got 'both'"),
        (
            {"keep": 4, "budget": "global", "groups": RouterGroups(2, 1, 2)},
            "must be 'per-layer' for a router with groups",
        ),
        ({"remove": 0.9, "budget": "global"}, "remove must leave at least 2 of 8 experts per block, got 0.9"),
        ({"keep": 4, "floor": 3}, "floor must be left out with budget='per-layer'"),
        ({"keep": 2, "protect": [(0, 1), (0, 2), (0, 3)]}, "at most the 2 experts kept in block 0, got 3"),
        ({"keep": 6, "divisible_by": 4}, "keep must be a multiple of divisible_by=4, got 6"),
        ({"keep": 4, "divisible_by": 0}, "divisible_by must be a positive number of experts, got 0"),
        ({"keep": 4, "divisible_by": True}, "divisible_by must be a positive number of experts, got True"),
        ({"remove": 0.5, "divisible_by": 16}, "from the 4 experts that would stay up to 7 of 8, got 16: .* is 16"),
        (
            {"remove": 0.5, "divisible_by": 3, "groups": RouterGroups(4, 4, 1)},
            "next multiple of 3 and of the router's 4 groups is 12",
        ),
        ({"keep": 4, "budget": "global", "divisible_by": 2}, "must be left out with budget='global', got 2"),
        ({"keep": 4, "protect": [(2, 0)]}, r"below \(2, 8\), got \(2, 0\)"),
    ],
)
def test_what_cannot_be_is_named(arguments, message):
    with pytest.raises(UsageError, match=message):
        choose(**arguments)


def test_nan_scores_are_refused():
    with pytest.raises(UsageError, match=r"scores must be .* got NaN"):
        choose_experts(torch.full((1, 4), torch.nan), keep=2, top_k=1)
