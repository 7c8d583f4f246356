"""The linear assignment: against all permutations, and against a planted one."""

import itertools

import pytest
import torch

from moesparse.errors import UsageError
from moesparse.experts.assignment import linear_assignment


def costs(kind, n):
    generator = torch.Generator().manual_seed(n)
    found = torch.rand(n, n, generator=generator)
    return {
        "any": found,
        # many of equal cost: prices that do not move
        "ties": (3 * found).floor(),
        "none": torch.zeros(n, n),
        "below zero": found - 5,
        # every row wants the same column first
        "contested": found + 4 * torch.arange(n),
    }[kind]


@pytest.mark.parametrize("kind", ["any", "ties", "none", "below zero", "contested"])
@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_no_permutation_costs_less(kind, n):
    cost = costs(kind, n)
    found = linear_assignment(cost)
    assert found.dtype == torch.int64 and sorted(found.tolist()) == list(range(n))
    least = min(
        sum(float(cost[row, column]) for row, column in enumerate(order)) for order in itertools.permutations(range(n))
    )
    assert float(cost[range(n), found].sum()) == pytest.approx(least, rel=1e-6, abs=1e-6)


def test_neurons_in_another_order_are_found_again():
    generator = torch.Generator().manual_seed(0)
    rows, order = torch.randn(200, 32, generator=generator), torch.randperm(200, generator=generator)
    noisy = rows[order] + 0.1 * torch.randn(200, 32, generator=generator)
    assert torch.equal(linear_assignment(torch.cdist(rows, noisy)), order.argsort())


def test_the_dual_prices_prove_it():
    """Of a size that no loop over permutations reaches, by the sum of what rows and columns pay (weak duality)."""
    cost = costs("contested", 60) + costs("any", 60)
    found = linear_assignment(cost).tolist()
    # prices by Bellman-Ford over exchanges: none of them may gain
    price = torch.zeros(60, dtype=torch.float64)
    exchange = (cost - cost[range(60), found][:, None]).double()
    for _ in range(60):
        through = (price[:, None] + exchange[:, found]).amin(0)
        price = torch.minimum(price, through)
    assert ((price[:, None] + exchange[:, found]).amin(0) >= price - 1e-5).all()


@pytest.mark.parametrize(
    ("cost", "message"),
    [
        (torch.zeros(2, 3), r"cost must be square, got \[2, 3\]"),
        (torch.tensor([[1.0, torch.inf], [0.0, 1.0]]), "cost must be finite, got NaN or infinity"),
    ],
)
def test_what_is_no_cost_is_refused(cost, message):
    with pytest.raises(UsageError, match=message):
        linear_assignment(cost)


def test_no_rows():
    assert linear_assignment(torch.zeros(0, 0)).tolist() == []
