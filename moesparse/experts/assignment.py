"""The linear assignment problem: give every row a column of its own so that the entries add up to the least.

By shortest augmenting paths with dual prices (Jonker and Volgenant 1987, Computing 38), started as they do by reducing
columns and rows. Exact, O(n^3) at worst; every step is one NumPy operation over a row.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from moesparse.errors import UsageError

__all__ = ["linear_assignment"]

_REDUCTIONS = 2


def linear_assignment(cost: Tensor) -> Tensor:
    """The assignment of least cost.

    Holds a float32 copy of the costs on the CPU; prices are float64.

    Args:
        cost: [n, n], any float dtype, on any device, finite; entries are rounded to float32.

    Returns:
        [n] int64 on the CPU: the column of every row. Of several that cost the same, always the same one.

    Raises:
        UsageError: not square, or not finite.
    """
    if cost.ndim != 2 or cost.shape[0] != cost.shape[1]:
        raise UsageError(f"cost must be square, got {list(cost.shape)}")
    values = cost.detach().to("cpu", torch.float32).numpy()
    if not np.isfinite(values).all():
        raise UsageError("cost must be finite, got NaN or infinity")
    return torch.from_numpy(_Prices(values).solve())


class _Prices:
    """Prices of the columns and the assignment so far; -1 is none. Reduced costs cost - u - v are never negative."""

    def __init__(self, cost: np.ndarray) -> None:
        self.cost, n = cost, len(cost)
        self.v = cost.min(axis=0).astype(np.float64) if n else np.zeros(0)
        self.column_of, self.row_of = np.full(n, -1), np.full(n, -1)

    def solve(self) -> np.ndarray:
        free = list(range(len(self.cost)))
        for _ in range(_REDUCTIONS):
            free = self._reduce(free)
        u = np.array([(row - self.v).min() for row in self.cost])
        for row in free:
            self._augment(row, u)
        return self.column_of

    def _reduce(self, free: list[int]) -> list[int]:
        """Give every free row its cheapest column, at a price that keeps it the cheapest; gives those left without."""
        if len(self.cost) == 1:
            self.column_of[0] = self.row_of[0] = 0
            return []
        waiting, left, tries = free[::-1], list[int](), 4 * len(free)
        while waiting:
            row, tries = waiting.pop(), tries - 1
            reduced = self.cost[row] - self.v
            first, second = np.argpartition(reduced, 1)[:2]
            if reduced[first] > reduced[second]:
                first, second = second, first
            gain, column = reduced[second] - reduced[first], first
            if gain > 0:
                self.v[first] -= gain
            elif self.row_of[first] >= 0:
                column = second
            owner = self.row_of[column]
            self.row_of[column], self.column_of[row] = row, column
            if owner >= 0:
                self.column_of[owner] = -1
                # at once, unless prices creep by less than their rounding
                (waiting if gain > 0 and tries > 0 else left).append(int(owner))
        return left

    def _augment(self, start: int, u: np.ndarray) -> None:
        """Find the shortest path of reduced costs from a free row to a free column, and shift the owners along it."""
        n = len(self.cost)
        shortest, before = np.full(n, np.inf), np.full(n, -1)
        done = np.zeros(n, dtype=bool)
        rows, row, lowest = [start], start, 0.0
        while True:
            reduced = lowest + (self.cost[row] - u[row] - self.v)
            closer = (reduced < shortest) & ~done
            shortest[closer], before[closer] = reduced[closer], row
            column = int(np.where(done, np.inf, shortest).argmin())
            lowest = shortest[column]
            done[column] = True
            if self.row_of[column] < 0:
                break
            row = int(self.row_of[column])
            rows.append(row)
        u[start] += lowest
        others = np.array(rows[1:], dtype=np.int64)
        u[others] += lowest - shortest[self.column_of[others]]
        self.v[done] -= lowest - shortest[done]
        while column >= 0:
            row = int(before[column])
            self.row_of[column] = row
            self.column_of[row], column = column, int(self.column_of[row])
            if row == start:
                break
