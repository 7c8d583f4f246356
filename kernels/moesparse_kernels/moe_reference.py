"""The expert layer and its routing in plain torch: the CPU path, and what the kernels are compared with.

One expert at a time, and only experts that have rows: a packed weight is unpacked into a scratch the size of one
dense expert, so the memory in use stays near the packed size. Matrix products are torch's (fp32 accumulation, result
in the dtype of x); activation, gates and the sum over a token's experts are fp32.

On a GPU this waits for the device, to learn how many rows each expert has.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .layout import NMWeight

__all__ = [
    "ACTIVATIONS",
    "Routing",
    "Routings",
    "activate_torch",
    "block_bound",
    "down_reference",
    "route_torch",
    "routing_sizes",
    "up_reference",
]

_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "none": lambda x: x,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}


ACTIVATIONS = tuple(_ACTIVATIONS)


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


class Routings:
    """The routings of one call, made when first asked for: one for each block size, or one for all."""

    def __init__(self, top_k_index: torch.Tensor, num_experts: int) -> None:
        self._top_k_index = top_k_index
        self._num_experts = num_experts
        self._made: dict[int, Routing] = {}

    def blocks(self, block_m: int) -> Routing:
        """The routing with blocks of block_m rows, by the kernels of route.py."""
        if block_m not in self._made:
            from .routing import route

            self._made[block_m] = route(self._top_k_index, self._num_experts, block_m)
        return self._made[block_m]

    def rows(self) -> Routing:
        """Any routing: for those who read its rows and offsets and not its blocks."""
        if not self._made:
            if self._top_k_index.device.type == "cuda":
                return self.blocks(64)
            self._made[64] = route_torch(self._top_k_index, self._num_experts, 64)
        return next(iter(self._made.values()))


def activate_torch(x: torch.Tensor, activation: str, gated: bool) -> torch.Tensor:
    """act(gate) * up of x = [gate | up], or act(x) when not gated; fp32, rounded once to the dtype of x."""
    function = _ACTIVATIONS[activation]
    if not gated:
        return x if activation == "none" else function(x.float()).to(x.dtype)
    gate, up = x.chunk(2, dim=-1)
    return function(gate.float()).mul_(up).to(x.dtype)


def _experts_with_rows(weight: NMWeight | torch.Tensor, offsets: torch.Tensor, rows: int) -> list[tuple[slice, int]]:
    if rows == 0:
        return []
    bounds = offsets.tolist()
    return [(slice(bounds[e], bounds[e + 1]), e) for e in range(weight.shape[0]) if bounds[e] < bounds[e + 1]]


def _dense_expert(weight: NMWeight | torch.Tensor, expert: int, scratch: torch.Tensor | None) -> torch.Tensor:
    if isinstance(weight, NMWeight):
        return weight.unpack_expert(expert, out=scratch)
    return weight[expert]


def _scratch(weight: NMWeight | torch.Tensor) -> torch.Tensor | None:
    if isinstance(weight, NMWeight):
        return torch.empty(weight.shape[1:], dtype=weight.dtype, device=weight.values.device)
    return None


def up_reference(
    x: torch.Tensor,
    routing: Routing,
    weight: NMWeight | torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    gated: bool,
) -> torch.Tensor:
    """First projection and activation of every row.

    Args:
        x: (T, H).
        routing: from `route`, any block_m.
        weight: (E, N, H), packed or dense; N = 2 * I, [gate; up], when gated.
        bias: (E, N) or None.
        activation: one of ACTIVATIONS.
        gated: multiply the activated first half by the second.

    Returns:
        (R, I) when gated, else (R, N), expert-sorted. Rows of dropped slots are not written.
    """
    R, top_k = routing.slot_of.numel(), routing.row_of.shape[1]
    out = torch.empty(R, weight.shape[1] // (2 if gated else 1), dtype=x.dtype, device=x.device)
    scratch = _scratch(weight)
    for rows, expert in _experts_with_rows(weight, routing.offsets, R):
        token = torch.div(routing.slot_of[rows], top_k, rounding_mode="floor")
        projected = F.linear(
            x.index_select(0, token), _dense_expert(weight, expert, scratch), None if bias is None else bias[expert]
        )
        out[rows] = activate_torch(projected, activation, gated)
    return out


def down_reference(
    rows: torch.Tensor,
    routing: Routing,
    top_k_weights: torch.Tensor,
    weight: NMWeight | torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Second projection, gates, and the sum over each token's experts.

    Args:
        rows: (R, I), expert-sorted.
        routing: from `route`, any block_m.
        top_k_weights: (T, top_k), any float dtype.
        weight: (E, H, I), packed or dense.
        bias: (E, H) or None.

    Returns:
        (T, H) in the dtype of rows; the sum is fp32 and rounded once.
    """
    T, top_k = routing.row_of.shape
    out = torch.zeros(T, weight.shape[1], dtype=torch.float32, device=rows.device)
    gates = top_k_weights.reshape(-1)
    scratch = _scratch(weight)
    for span, expert in _experts_with_rows(weight, routing.offsets, rows.shape[0]):
        dense = _dense_expert(weight, expert, scratch)
        projected = F.linear(rows[span], dense, None if bias is None else bias[expert])
        slot = routing.slot_of[span]
        weighted = projected.float().mul_(gates.index_select(0, slot).float().unsqueeze(-1))
        out.index_add_(0, torch.div(slot, top_k, rounding_mode="floor"), weighted)
    return out.to(rows.dtype)
