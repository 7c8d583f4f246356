"""Keep the `keep` largest |W| * scale of every row, exactly and without a sort.

A whole row lies in the registers of one program. Scores are compared as integers (see select.py): the largest threshold
that at least `keep` scores reach is found by bisection on the bits, at most 31 counts, fewer when a count hits `keep`.
Scores equal to the threshold go to the lower columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .select import score_bits

__all__ = ["MAX_COLUMNS", "row_topk"]

# 16,384 columns are 32 per thread of a full 16-warp program
MAX_COLUMNS = 16384


@triton.jit
def _row_topk_kernel(
    weight_ptr,  # (E, N, K)
    scale_ptr,  # (E, K) fp32
    out_ptr,  # (E, N, K)
    N,
    K,
    keep,
    BLOCK_K: tl.constexpr,
):
    """Grid (N, E): one program prunes one row; BLOCK_K >= K, 0 <= keep <= K."""
    # int64, because row * K passes 2**31
    expert = tl.program_id(1).to(tl.int64)
    row = expert * N + tl.program_id(0)
    offs_k = tl.arange(0, BLOCK_K)
    mask_k = offs_k < K
    w = tl.load(weight_ptr + row * K + offs_k, mask=mask_k, other=0.0)
    scale = tl.load(scale_ptr + expert * K + offs_k, mask=mask_k, other=0.0)
    # below every score: a padding column is never counted
    score = tl.where(mask_k, score_bits(w, scale), -1)
    # the threshold lies in low..high; `count` scores reach low, and count >= keep
    low = tl.min(tl.where(mask_k, score, 0x7FFFFFFF))
    high = tl.max(score)
    count = tl.sum(mask_k.to(tl.int32))
    while (low < high) & (count != keep):
        middle = low + (high - low) // 2 + 1
        reached = tl.sum((score >= middle).to(tl.int32))
        enough = reached >= keep
        count = tl.where(enough, reached, count)
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
    above = score > low
    level = (score == low).to(tl.int32)
    # of the columns on the threshold the first so many fill the row up
    room = keep - tl.sum(above.to(tl.int32))
    kept = above | ((level != 0) & (tl.cumsum(level, 0) <= room))
    tl.store(out_ptr + row * K + offs_k, tl.where(kept, w, 0.0), mask=mask_k)


def row_topk(weight: torch.Tensor, scale: torch.Tensor, keep: int) -> torch.Tensor:
    """Contiguous weight (E, N, K <= 16,384) and fp32 scale (E, K) -> weight * mask, like `reference.row_topk`."""
    E, N, K = weight.shape
    out = torch.empty_like(weight)
    if out.numel():
        block_k = max(triton.next_power_of_2(K), 128)
        # up to 2048 columns fit one warp, and then no count waits at a barrier
        num_warps = min(max(block_k // 2048, 1), 4) if block_k < 8192 else block_k // 1024
        _row_topk_kernel[(N, E)](weight, scale, out, N, K, keep, BLOCK_K=block_k, num_warps=num_warps)
    return out
