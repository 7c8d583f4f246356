"""Per-expert column energy: sum over the tokens of an expert of (g * x)^2, for every column.

This is the squared scale of MoE-Pruner (Xie et al. 2024, arXiv 2410.12013, eq. 9), or without the gate that of Wanda
(Sun et al. 2023, arXiv 2306.11695) on routed tokens; both may be had for one read of x. Rows are taken expert by
expert and cut into chunks that never cross an expert; a chunk's sum is fp32 with Kahan's compensation, the chunks of an
expert are added in fp64, in order. No atomics: the same input gives the same bits. Symbols: T tokens, K columns, E
experts, R rows in expert order, C chunks, S sums: 1, or 2 where both are wanted, without the gate first.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

__all__ = ["column_energy"]

# rows of a chunk: short enough to spread one crowded expert over the device, long enough to keep the partials few
CHUNK = 128


@triton.jit
def _add(total, lost, term):
    """Kahan: `lost` is what the last addition rounded away."""
    term -= lost
    following = total + term
    return following, (following - total) - term


@triton.jit
def _chunk_energy_kernel(
    x_ptr,  # (T, K)
    order_ptr,  # (R,) which slot of (T, TOP_K) is the r-th row, when ROUTED
    gates_ptr,  # (T, TOP_K), or (R,) when not ROUTED or BOTH; when GATED
    offsets_ptr,  # (E + 1,) first row of each expert
    chunks_ptr,  # (E + 1,) first chunk of each expert
    expert_ptr,  # (C,) expert of each chunk, E for the unused ones at the end
    partial_ptr,  # (S, C, K) fp32
    K,
    num_experts,
    stride_xt,
    TOP_K: tl.constexpr,
    ROUTED: tl.constexpr,
    GATED: tl.constexpr,
    BOTH: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Grid (C, cdiv(K, BLOCK_K)): one program sums one chunk's BLOCK_K columns."""
    chunk = tl.program_id(0)
    expert = tl.load(expert_ptr + chunk)
    if expert >= num_experts:
        return
    start = tl.load(offsets_ptr + expert) + (chunk - tl.load(chunks_ptr + expert)) * CHUNK
    stop = tl.minimum(start + CHUNK, tl.load(offsets_ptr + expert + 1))
    offs_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_k = offs_k < K
    total = tl.zeros((BLOCK_K,), dtype=tl.float32)
    lost = tl.zeros((BLOCK_K,), dtype=tl.float32)
    if BOTH:
        plain_total = tl.zeros((BLOCK_K,), dtype=tl.float32)
        plain_lost = tl.zeros((BLOCK_K,), dtype=tl.float32)
    for first in range(0, CHUNK, BLOCK_R):
        row = start + first + tl.arange(0, BLOCK_R)
        mask_r = row < stop
        slot = row
        if ROUTED:
            slot = tl.load(order_ptr + row, mask=mask_r, other=0)
        # int64, because token * stride passes 2**31
        token = (slot // TOP_K).to(tl.int64)
        x = tl.load(
            x_ptr + token[:, None] * stride_xt + offs_k[None, :], mask=mask_r[:, None] & mask_k[None, :], other=0.0
        ).to(tl.float32)
        if BOTH:
            plain_total, plain_lost = _add(plain_total, plain_lost, tl.sum(x * x, axis=0))
        if GATED:
            gate = tl.load(gates_ptr + (row if BOTH else slot), mask=mask_r, other=0.0).to(tl.float32)
            x = x * gate[:, None]
        total, lost = _add(total, lost, tl.sum(x * x, axis=0))
    place = chunk.to(tl.int64)
    if BOTH:
        tl.store(partial_ptr + place * K + offs_k, plain_total, mask=mask_k)
        place += tl.num_programs(0)
    tl.store(partial_ptr + place * K + offs_k, total, mask=mask_k)


@triton.jit
def _expert_energy_kernel(
    partial_ptr,  # (S, C, K) fp32
    chunks_ptr,  # (E + 1,)
    out_ptr,  # (S, E, K) fp64
    K,
    num_chunks,
    BLOCK_K: tl.constexpr,
):
    """Grid (cdiv(K, BLOCK_K), E, S): one program adds the chunks of one expert."""
    expert = tl.program_id(1)
    # int64, because what lies before the second sum passes 2**31
    which = tl.program_id(2).to(tl.int64)
    partial_ptr += which * num_chunks * K
    out_ptr += which * tl.num_programs(1) * K
    offs_k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_k = offs_k < K
    total = tl.zeros((BLOCK_K,), dtype=tl.float64)
    # int64, because chunk * K passes 2**31
    first = tl.load(chunks_ptr + expert).to(tl.int64)
    for i in range(tl.load(chunks_ptr + expert + 1) - first):
        total += tl.load(partial_ptr + (first + i) * K + offs_k, mask=mask_k, other=0.0).to(tl.float64)
    tl.store(out_ptr + expert.to(tl.int64) * K + offs_k, total, mask=mask_k)


def column_energy(
    x: torch.Tensor,
    offsets: torch.Tensor,
    gates: torch.Tensor | None,
    order: torch.Tensor | None,
    top_k: int,
    both: bool = False,
) -> torch.Tensor:
    """Energy of the rows offsets[e]..offsets[e + 1] of each expert e, like `reference.column_energy`.

    Args:
        x: (T, K), its last dim contiguous.
        offsets: (E + 1,) int32 or int64, ascending, inside 0..R.
        gates: one gate per slot, with `both` per row, contiguous; None for g = 1.
        order: (R,) slot of each row, token = slot // top_k; None where row r is token r.
        top_k: slots per token, 1 without `order`.
        both: also the energy without the gates, which must be given.

    Returns:
        (S, E, K) fp64.
    """
    K, E = x.shape[1], offsets.numel() - 1
    R = x.shape[0] if order is None else order.numel()
    S = 2 if both else 1
    out = torch.empty(S, E, K, dtype=torch.float64, device=x.device)
    if out.numel() == 0:
        return out
    if R == 0:
        return out.zero_()
    chunks = torch.zeros(E + 1, dtype=torch.int32, device=x.device)
    chunks[1:] = ((offsets.diff() + (CHUNK - 1)) // CHUNK).cumsum(0)
    # what R rows can make at most, whatever the routing: the grid needs no look at the device
    most = triton.cdiv(R, CHUNK) + min(E, R)
    chunk = torch.arange(most, dtype=torch.int32, device=x.device)
    expert = torch.searchsorted(chunks[1:], chunk, right=True, out_int32=True)
    partial = torch.empty(S, most, K, dtype=torch.float32, device=x.device)
    # one warp reads 256 columns of a row at a time and adds the rows inside its threads
    lanes = 64 if torch.version.hip else 32
    block_k = 512 if K > 256 or lanes == 64 else 256
    _chunk_energy_kernel[(most, triton.cdiv(K, block_k))](
        x,
        order if order is not None else offsets,
        gates if gates is not None else x,
        offsets,
        chunks,
        expert,
        partial,
        K,
        E,
        x.stride(0),
        TOP_K=top_k,
        ROUTED=order is not None,
        GATED=gates is not None,
        BOTH=both,
        CHUNK=CHUNK,
        BLOCK_R=16,
        BLOCK_K=block_k,
        num_warps=block_k // (8 * lanes),
    )
    _expert_energy_kernel[(triton.cdiv(K, 256), E, S)](partial, chunks, out, K, most, BLOCK_K=256, num_warps=4)
    return out
