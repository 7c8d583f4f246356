"""Routing inside a grouped GEMM: a program of few slots finds the rows of its block itself, without a launch before.

Rows stay where the slots are: row r of what lies between the two GEMMs is slot r = token * top_k + choice. There are as
many blocks as `block_bound` says at most, numbered so that a program looks at its own expert alone:

    R <= E     block b is opened by slot b, where that is the first of its expert or a BLOCK_M-th behind it
    R > E      block b < E holds the first slots of expert b, those behind them what is left of the experts in order
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .routing import experts_of
from .schedule import Routing

__all__ = ["MOST_SLOTS", "own_slots", "padded_experts", "routed_by"]

MOST_SLOTS = 128
"""Every program reads the experts of all slots."""
_SLOTS = tl.constexpr(MOST_SLOTS)


@triton.jit
def own_slots(top_k_index_ptr, block, R, E, BLOCK_M: tl.constexpr, EXPERTS: tl.constexpr):
    """The expert of a block, -1 where it is none, its slots (BLOCK_M,) int32, and how many they are.

    top_k_index_ptr: (R,) int32 or int64, R <= MOST_SLOTS. Slots of no expert are in no block. EXPERTS: of
    `padded_experts`.
    """
    slot = tl.arange(0, _SLOTS)
    ids = experts_of(top_k_index_ptr, slot, R, E)
    if EXPERTS == 0:
        expert = tl.load(top_k_index_ptr + block).to(tl.int32)
        expert = tl.where(expert < E, expert, -1)
        rank = tl.cumsum((ids == expert).to(tl.int32), axis=0) - 1
        first = tl.sum(tl.where(slot == block, rank, 0), axis=0)
        expert = tl.where(first % BLOCK_M == 0, tl.maximum(expert, -1), -1)
    else:
        offs_e = tl.arange(0, EXPERTS)
        counts = tl.sum((ids[:, None] == offs_e[None, :]).to(tl.int32), axis=0)
        # blocks behind an expert's first one
        more = tl.maximum((counts + BLOCK_M - 1) // BLOCK_M - 1, 0)
        end = tl.cumsum(more, axis=0)
        mine = (end > block - E) & (end - more <= block - E)
        later = tl.sum(tl.where(mine, offs_e + 1, 0), axis=0) - 1
        expert = tl.where(block < E, block, later)
        first = tl.where(block < E, 0, (block - E + 1 - tl.sum(tl.where(mine, end - more, 0), axis=0)) * BLOCK_M)
        rank = tl.cumsum((ids == expert).to(tl.int32), axis=0) - 1
    own = ids == expert
    # of another block: a place that is nobody's
    place = tl.where(own, rank - first, -1)
    row = tl.arange(0, BLOCK_M)
    slots = tl.sum(tl.where(place[None, :] == row[:, None], slot[None, :], 0), axis=1)
    count = tl.minimum(tl.sum(own.to(tl.int32), axis=0) - first, BLOCK_M)
    return tl.where(count > 0, expert, -1), slots, count


def padded_experts(rows: int, num_experts: int) -> int:
    """EXPERTS for so many slots: 0, or the size of a table of the experts."""
    return 0 if rows <= num_experts else triton.next_power_of_2(num_experts)


def routed_by(routing: Routing | None, top_k_index: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What a grouped GEMM is given of a routing; of none, where it reads the experts of the slots alone."""
    if routing is None:
        return (top_k_index,) * 4
    return routing.slot_of, routing.offsets, routing.block_expert, routing.block_row
