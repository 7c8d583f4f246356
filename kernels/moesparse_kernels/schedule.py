"""Expert-sorted rows and the schedule of row blocks over them: what `route` makes and the grouped GEMMs read.

The plain-torch way of making it is here; the Triton kernels are in routing.py, and ops.py chooses between them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

__all__ = ["Route", "Routing", "Routings", "block_bound", "route_torch", "routing_sizes"]


@dataclass(frozen=True, eq=False)
class Routing:
    """Expert-sorted rows and the block schedule over them; every tensor is int32 and on one device.

    Slots whose expert id is outside 0..E-1 (sentinels of expert parallelism) are dropped: they sort behind all rows,
    belong to no block and have row_of = -1.

    Attributes:
        slot_of: (R,) the slot, token * top_k + choice, of each row; rows from offsets[E] on are the dropped slots.
        row_of: (T, top_k) the row of each slot, -1 when dropped.
        offsets: (E + 1,) first row of each expert; offsets[E] is the number of rows.
        block_expert: (B,) expert of each block, -1 behind the last block; B = `block_bound`.
        block_row: (B,) first row of each block; its rows end at block_row + block_m or offsets[expert + 1].
        block_m: rows in a full block.
    """

    slot_of: torch.Tensor
    row_of: torch.Tensor
    offsets: torch.Tensor
    block_expert: torch.Tensor
    block_row: torch.Tensor
    block_m: int

    @classmethod
    def split(cls, buffer: torch.Tensor, shape: torch.Size, num_experts: int, block_m: int) -> Routing:
        """The routing of a (T, top_k) `shape` whose tensors lie in `buffer` one after the other."""
        sizes = routing_sizes(shape.numel(), num_experts, block_m)
        slot_of, row_of, offsets, block_expert, block_row = buffer.split(sizes)
        return cls(slot_of, row_of.view(shape), offsets, block_expert, block_row, block_m)


def routing_sizes(rows: int, num_experts: int, block_m: int) -> list[int]:
    """Lengths of the tensors of a `Routing`, in order."""
    num_blocks = block_bound(rows, num_experts, block_m)
    return [rows, rows, num_experts + 1, num_blocks, num_blocks]


def block_bound(rows: int, num_experts: int, block_m: int) -> int:
    """The most blocks that `rows` rows can fill: every touched expert may end in a block of a single row."""
    touched = min(rows, num_experts)
    return touched + (rows - touched) // block_m


def route_torch(top_k_index: torch.Tensor, num_experts: int, block_m: int) -> Routing:
    """`route` in plain torch: the CPU path and the oracle of the kernels. No host sync either."""
    slots = top_k_index.reshape(-1)
    dropped = (slots < 0) | (slots >= num_experts)
    bins = torch.where(dropped, num_experts, slots).to(torch.int64)
    sorted_bins, slot_of = torch.sort(bins, stable=True)
    row_of = torch.empty_like(slot_of)
    row_of[slot_of] = torch.arange(slots.numel(), device=slots.device)
    experts = torch.arange(num_experts + 1, device=slots.device)
    offsets = torch.searchsorted(sorted_bins, experts)
    last_block = ((offsets.diff() + block_m - 1) // block_m).cumsum(0)
    block = torch.arange(block_bound(slots.numel(), num_experts, block_m), device=slots.device)
    expert = torch.searchsorted(last_block, block, right=True)
    real = expert < num_experts
    owner = expert.clamp(max=num_experts - 1)
    first_block = last_block - (offsets.diff() + block_m - 1) // block_m
    row = offsets[owner] + (block - first_block[owner]) * block_m
    return Routing(
        slot_of=slot_of.to(torch.int32),
        row_of=row_of.masked_fill(dropped, -1).view(top_k_index.shape).to(torch.int32),
        offsets=offsets.to(torch.int32),
        block_expert=expert.where(real, -1).to(torch.int32),
        block_row=row.where(real, 0).to(torch.int32),
        block_m=block_m,
    )


Route = Callable[[torch.Tensor, int, int], Routing]
"""From (T, top_k) expert ids, the number of experts and the rows of a block to the routing."""


class Routings:
    """The routings of one call, made when first asked for: one for each block size, or one for all."""

    def __init__(self, top_k_index: torch.Tensor, num_experts: int, route: Route) -> None:
        """Args:
        top_k_index: (T, top_k), as for `route`.
        num_experts: E.
        route: makes a routing whose blocks are wanted, on the device of top_k_index.
        """
        self._top_k_index = top_k_index
        self._num_experts = num_experts
        self._route = route
        self._made: dict[int, Routing] = {}

    def blocks(self, block_m: int) -> Routing:
        """The routing with blocks of block_m rows."""
        if block_m not in self._made:
            self._made[block_m] = self._route(self._top_k_index, self._num_experts, block_m)
        return self._made[block_m]

    def rows(self) -> Routing:
        """Any routing: for those who read its rows and offsets and not its blocks."""
        if not self._made:
            if self._top_k_index.device.type == "cuda":
                return self.blocks(64)
            self._made[64] = route_torch(self._top_k_index, self._num_experts, 64)
        return next(iter(self._made.values()))
