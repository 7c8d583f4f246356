"""Routing: from the experts each token chose to expert-sorted rows and a schedule of row blocks for grouped GEMMs.

Symbols: T tokens, TOP_K experts chosen by each, E experts, R = T * TOP_K slots (slot = token * TOP_K + choice). A
stable counting sort by expert; every slot becomes one row, so rows of an expert are neighbours and need no padding:

    row(slot) = #{slots of a smaller expert} + #{earlier slots of the same expert}

A block is at most block_m rows of one expert. How many blocks there are depends on the data, so the schedule is as
long as it can get and its tail is marked -1: nothing waits for the device, and a CUDA graph can hold the launch.

One launch up to `CHUNK` slots, two beyond: chunk histograms, then ranks from the histograms of the earlier chunks.
No atomics, so the order is the same in every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .schedule import routing_sizes

__all__ = ["CHUNK", "experts_of", "sort_slots"]

# slots ranked at a time by comparing every pair of them; fewer when there are many experts, or the tables of slots by
# experts do not fit the registers
_SUB = 64
_SUB_TIMES_EXPERTS = 8192
# slots one program sorts alone; more are cut into at most _MAX_CHUNKS pieces
CHUNK = 1024
_MAX_CHUNKS = 64


@triton.jit
def experts_of(top_k_index_ptr, slots, R, E):
    """Expert id of each slot as int32; -1 for sentinels, -2 behind the end."""
    ids = tl.load(top_k_index_ptr + slots, mask=slots < R, other=0)
    ids = tl.where((ids >= 0) & (ids < E), ids, -1).to(tl.int32)
    return tl.where(slots < R, ids, -2)


# what changes with the batch is no constant and no promise: one kernel for a number of experts
@triton.jit(do_not_specialize=("R", "E", "chunk_size"))
def _histogram_kernel(
    top_k_index_ptr,  # (R,) int32 or int64
    counts_ptr,  # (chunks, BLOCK_E) int32
    R,
    E,
    chunk_size,  # a multiple of SUB
    SUB: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Grid (chunks,): one program counts the slots of each expert in one chunk."""
    chunk = tl.program_id(0)
    offs_e = tl.arange(0, BLOCK_E)
    counts = tl.zeros((BLOCK_E,), dtype=tl.int32)
    for start in range(0, chunk_size, SUB):
        ids = experts_of(top_k_index_ptr, chunk * chunk_size + start + tl.arange(0, SUB), R, E)
        counts += tl.sum((ids[:, None] == offs_e[None, :]).to(tl.int32), axis=0)
    tl.store(counts_ptr + chunk * BLOCK_E + offs_e, counts)


@triton.jit(
    do_not_specialize=("R", "E", "num_blocks", "chunks", "chunk_size", "block_m"),
    do_not_specialize_on_alignment=("row_of_ptr", "offsets_ptr", "block_expert_ptr", "block_row_ptr"),
)
def _sort_kernel(
    top_k_index_ptr,  # (R,) int32 or int64
    counts_ptr,  # (chunks, BLOCK_E) int32; not read when there is one chunk
    slot_of_ptr,  # (R,) int32
    row_of_ptr,  # (R,) int32
    offsets_ptr,  # (E + 1,) int32
    block_expert_ptr,  # (num_blocks,) int32
    block_row_ptr,  # (num_blocks,) int32
    R,
    E,
    num_blocks,
    chunks,
    chunk_size,  # a multiple of SUB
    block_m,
    SUB: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Grid (chunks,): one program ranks one chunk and writes its share of the block schedule."""
    chunk = tl.program_id(0)
    offs_e = tl.arange(0, BLOCK_E)
    total = tl.zeros((BLOCK_E,), dtype=tl.int32)
    earlier = tl.zeros((BLOCK_E,), dtype=tl.int32)
    if chunks == 1:
        for start in range(0, chunk_size, SUB):
            ids = experts_of(top_k_index_ptr, start + tl.arange(0, SUB), R, E)
            total += tl.sum((ids[:, None] == offs_e[None, :]).to(tl.int32), axis=0)
    else:
        for other in range(chunks):
            counts = tl.load(counts_ptr + other * BLOCK_E + offs_e)
            total += counts
            earlier += tl.where(other < chunk, counts, 0)
    first_row = tl.cumsum(total, axis=0) - total
    kept = tl.sum(total, axis=0)
    if chunk == 0:
        tl.store(offsets_ptr + offs_e, first_row, mask=offs_e < E)
        tl.store(offsets_ptr + E, kept)

    next_row = first_row + earlier
    within = tl.arange(0, SUB)
    for start in range(0, chunk_size, SUB):
        slots = chunk * chunk_size + start + within
        ids = experts_of(top_k_index_ptr, slots, R, E)
        # ids of the same slots along the other axis: a second load is cheaper than moving them between threads
        others = experts_of(top_k_index_ptr, chunk * chunk_size + start + tl.arange(0, SUB), R, E)
        tied = (ids[:, None] == others[None, :]) & (within[None, :] < within[:, None])
        one_hot = ids[:, None] == offs_e[None, :]
        # dropped slots line up behind the kept ones: all earlier slots less the earlier kept ones
        next_dropped = kept + chunk * chunk_size + start - tl.sum(next_row - first_row, axis=0)
        base = tl.where(ids < 0, next_dropped, tl.sum(tl.where(one_hot, next_row[None, :], 0), axis=1))
        rows = base + tl.sum(tied.to(tl.int32), axis=1)
        tl.store(slot_of_ptr + rows, slots, mask=slots < R)
        tl.store(row_of_ptr + slots, tl.where(ids < 0, -1, rows), mask=slots < R)
        next_row += tl.sum(one_hot.to(tl.int32), axis=0)

    blocks = tl.where(offs_e < E, (total + block_m - 1) // block_m, 0)
    last_block = tl.cumsum(blocks, axis=0)
    first_block = last_block - blocks
    for start in range(chunk * SUB, num_blocks, chunks * SUB):
        block = start + within
        # experts whose blocks all lie before this one; at least E behind the last block
        expert = tl.sum((last_block[None, :] <= block[:, None]).to(tl.int32), axis=1)
        own = expert[:, None] == offs_e[None, :]
        row = tl.sum(tl.where(own, first_row[None, :] + (block[:, None] - first_block[None, :]) * block_m, 0), axis=1)
        tl.store(block_expert_ptr + block, tl.where(expert < E, expert, -1), mask=block < num_blocks)
        tl.store(block_row_ptr + block, tl.where(expert < E, row, 0), mask=block < num_blocks)


def sort_slots(top_k_index: torch.Tensor, num_experts: int, block_m: int) -> torch.Tensor:
    """Sort the slots by expert and cut each expert's rows into blocks, without waiting for the device.

    Args:
        top_k_index: (T, top_k) int32 or int64, contiguous, on a GPU (or anywhere under Triton's interpreter). Ids
            outside 0..num_experts-1 are dropped.
        num_experts: E.
        block_m: rows in a block.

    Returns:
        The tensors of a `Routing`, int32, one after the other; the same for the same input in every run.
    """
    R, device = top_k_index.numel(), top_k_index.device
    sizes = routing_sizes(R, num_experts, block_m)
    # one allocation: five small ones would cost more than the launch
    buffer = torch.empty(sum(sizes), dtype=torch.int32, device=device)
    slot_of, row_of, offsets, block_expert, block_row = buffer.split(sizes)
    if R == 0:
        offsets.zero_()
        return buffer
    block_e = triton.next_power_of_2(num_experts)
    sub = min(_SUB, max(32, _SUB_TIMES_EXPERTS // block_e))
    wanted = R if R <= CHUNK else max(CHUNK, triton.cdiv(R, _MAX_CHUNKS))
    chunk_size = triton.cdiv(wanted, sub) * sub
    chunks = triton.cdiv(R, chunk_size)
    counts = buffer
    if chunks > 1:
        counts = torch.empty(chunks, block_e, dtype=torch.int32, device=device)
        _histogram_kernel[(chunks,)](top_k_index, counts, R, num_experts, chunk_size, SUB=sub, BLOCK_E=block_e)
    _sort_kernel[(chunks,)](
        top_k_index,
        counts,
        slot_of,
        row_of,
        offsets,
        block_expert,
        block_row,
        R,
        num_experts,
        block_expert.numel(),
        chunks,
        chunk_size,
        block_m,
        SUB=sub,
        BLOCK_E=block_e,
        num_warps=8,
    )
    return buffer
