"""Grouped GEMM on dense weights: every expert's rows times that expert's weight, with the epilogues of grouped_nm.

    out[r, n] = act(sum_k x[r, k] * W[e(r), n, k] + bias[e(r), n])          not gated
    out[r, i] = act(gate) * up, W = [gate; up] along n, i < N / 2           gated

M rows, N columns of the output, K the reduction dimension. A gated program holds two accumulators of BLOCK_N / 2
columns, one for the gate rows and one for the up rows of the same output columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .epilogue import activate, activate_rows
from .launch_order import block_and_tile
from .own_slots import own_slots, padded_experts, routed_by
from .schedule import Routing, block_bound
from .tuning import GroupedConfig

__all__ = ["grouped_dense"]


# what changes from call to call is no constant and no promise: a server would compile at every new batch size
@triton.jit(
    do_not_specialize=("R", "E", "tiles", "num_blocks", "split_k", "group_m"),
    do_not_specialize_on_alignment=("slot_of_ptr", "offsets_ptr", "block_expert_ptr", "block_row_ptr"),
)
def _grouped_dense_kernel(
    x_ptr,  # (T, K) when GATHER, else (R, K)
    weight_ptr,  # (E, N, K), last dim contiguous
    bias_ptr,  # (E, N), read when HAS_BIAS
    out_ptr,  # (split_k, R, N_OUT)
    slot_of_ptr,  # (R,) int32, read when GATHER; the experts of the slots when OWN
    offsets_ptr,  # (E + 1,) int32
    block_expert_ptr,  # (num_blocks,) int32
    block_row_ptr,  # (num_blocks,) int32
    R,
    E,  # read when OWN
    N,
    K,
    N_OUT,  # N / 2 when GATED, else N
    tiles,  # cdiv(N_OUT, columns of a program)
    num_blocks,
    split_k,
    group_m,  # blocks that walk the weight together
    stride_xm,
    stride_we,
    stride_wn,
    TOP_K: tl.constexpr,  # read when GATHER
    GATHER: tl.constexpr,
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SWAP: tl.constexpr,
    STAGES: tl.constexpr,
    OWN: tl.constexpr,  # a program finds its rows itself
    EXPERTS: tl.constexpr,  # for own_slots
    FIRST: tl.constexpr,  # what is launched next may begin at once
    EARLY: tl.constexpr,  # may begin before what was launched last, which wrote x, has ended
):
    """Grid (num_blocks * tiles, split_k): one program makes a block of rows by BLOCK_N weight rows."""
    if FIRST:
        gdc_launch_dependents()
    block, tile = block_and_tile(tl.program_id(0), tiles, num_blocks, group_m)
    if OWN:
        expert, offs_m, count = own_slots(slot_of_ptr, block, R, E, BLOCK_M, EXPERTS)
        expert = expert.to(tl.int64)
        mask_m = tl.arange(0, BLOCK_M) < count
    else:
        expert = tl.load(block_expert_ptr + block).to(tl.int64)
    if expert < 0:
        return

    if not OWN:
        offs_m = tl.load(block_row_ptr + block) + tl.arange(0, BLOCK_M)
        mask_m = offs_m < tl.load(offsets_ptr + expert + 1)
    if GATHER and OWN:
        source = offs_m // TOP_K
    elif GATHER:
        source = tl.load(slot_of_ptr + offs_m, mask=mask_m, other=0) // TOP_K
    else:
        source = tl.where(mask_m, offs_m, 0)

    COLUMNS: tl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    offs_n = tile * COLUMNS + tl.arange(0, COLUMNS)
    mask_n = offs_n < N_OUT
    # rows past the end read row 0: their columns are never stored, and an unmasked load is wider
    weight_rows = tl.where(mask_n, offs_n, 0)
    split = tl.program_id(1)
    k_steps = tl.cdiv(K, BLOCK_K)
    steps = tl.cdiv(k_steps, split_k)
    first_step = split * steps
    last_step = tl.minimum(first_step + steps, k_steps)
    offs_k = first_step * BLOCK_K + tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + source[:, None].to(tl.int64) * stride_xm + offs_k[None, :]
    weight_ptrs = weight_ptr + expert * stride_we + weight_rows[:, None].to(tl.int64) * stride_wn + offs_k[None, :]
    up_offset = tl.cast(N_OUT, tl.int64) * stride_wn

    if SWAP:
        acc = tl.zeros((COLUMNS, BLOCK_M), dtype=tl.float32)
        acc_up = tl.zeros((COLUMNS, BLOCK_M), dtype=tl.float32)
    else:
        acc = tl.zeros((BLOCK_M, COLUMNS), dtype=tl.float32)
        acc_up = tl.zeros((BLOCK_M, COLUMNS), dtype=tl.float32)
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    for step in tl.range(first_step, last_step, num_stages=STAGES):
        if EVEN_K:
            x = tl.load(x_ptrs, mask=mask_m[:, None], other=0.0)
            weight = tl.load(weight_ptrs)
        else:
            mask_k = (step * BLOCK_K + tl.arange(0, BLOCK_K) < K)[None, :]
            x = tl.load(x_ptrs, mask=mask_m[:, None] & mask_k, other=0.0)
            weight = tl.load(weight_ptrs, mask=mask_k, other=0.0)
        if SWAP:
            acc = tl.dot(weight, x.T, acc)
        else:
            acc = tl.dot(x, weight.T, acc)
        if GATED:
            if EVEN_K:
                weight_up = tl.load(weight_ptrs + up_offset)
            else:
                weight_up = tl.load(weight_ptrs + up_offset, mask=mask_k, other=0.0)
            if SWAP:
                acc_up = tl.dot(weight_up, x.T, acc_up)
            else:
                acc_up = tl.dot(x, weight_up.T, acc_up)
        x_ptrs += BLOCK_K
        weight_ptrs += BLOCK_K

    if SWAP:
        acc = acc.T
        acc_up = acc_up.T
    bias_ptrs = bias_ptr + expert * N + offs_n
    if HAS_BIAS:
        acc += tl.load(bias_ptrs, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    acc = activate(acc, ACTIVATION)
    if GATED:
        if HAS_BIAS:
            acc_up += tl.load(bias_ptrs + N_OUT, mask=mask_n, other=0.0).to(tl.float32)[None, :]
        acc *= acc_up
    out_rows = (split * R + offs_m).to(tl.int64)
    out_ptrs = out_ptr + out_rows[:, None] * N_OUT + offs_n[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


def grouped_dense(
    x: torch.Tensor,
    weight: torch.Tensor,
    routing: Routing | None,
    top_k_index: torch.Tensor,
    config: GroupedConfig,
    *,
    gather: bool,
    bias: torch.Tensor | None = None,
    activation: str = "none",
    gated: bool = False,
    keep_splits: bool = False,
    first: bool = False,
    early: bool = False,
) -> torch.Tensor:
    """Multiply expert-sorted rows by their expert's dense weight; optionally bias and activation.

    Args:
        x: (T, K) when `gather`, else (R, K) in the order of `routing`; bf16 or fp16, last dim contiguous.
        weight: (E, N, K) of the dtype of x, last dim contiguous.
        routing: from `route` with config.block_m, or None, as for `grouped_nm`.
        top_k_index: (T, top_k), what was routed.
        config: launch sizes.
        gather: take the token of each row from x, instead of row r from row r.
        bias: (E, N), added in fp32, or None.
        activation: one of moe_reference.ACTIVATIONS, applied in fp32.
        gated: multiply the activated first half of N by the second half.
        keep_splits: return the fp32 partial sums of a split reduction, without bias, for `combine`.
        first, early: as for `grouped_nm`.

    Returns:
        (R, N), or (R, N / 2) when gated; (config.split_k, R, N) when keep_splits. fp32 accumulation, rounded once to
        the dtype of x; fp32 for keep_splits with split_k > 1. Rows of dropped slots are not written.
    """
    R = top_k_index.numel()
    E, N, K = weight.shape
    num_blocks = block_bound(R, E, config.block_m)
    split_k = config.split_k
    separate = split_k > 1 and not keep_splits
    fused = split_k == 1
    gate_here = gated and fused
    n_out = N // 2 if gate_here else N
    out = torch.empty(split_k, R, n_out, dtype=x.dtype if fused else torch.float32, device=x.device)
    if out.numel():
        tiles = triton.cdiv(n_out, config.block_n // 2 if gate_here else config.block_n)
        _grouped_dense_kernel[(num_blocks * tiles, split_k)](
            x,
            weight,
            bias if fused and bias is not None else weight,
            out,
            *routed_by(routing, top_k_index),
            R,
            E,
            N,
            K,
            n_out,
            tiles,
            num_blocks,
            split_k,
            config.group_m,
            x.stride(0),
            weight.stride(0),
            weight.stride(1),
            TOP_K=top_k_index.shape[1] if gather else 1,
            GATHER=gather,
            GATED=gate_here,
            ACTIVATION=activation if fused else "none",
            HAS_BIAS=fused and bias is not None,
            EVEN_K=K % config.block_k == 0,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            SWAP=config.swap,
            STAGES=config.num_stages,
            OWN=routing is None,
            EXPERTS=padded_experts(R, E) if routing is None else 0,
            FIRST=first,
            EARLY=early,
            num_warps=config.num_warps,
            **({"launch_pdl": True} if early else {}),
        )
    if separate:
        assert routing is not None, "an activation of its own reads rows in the order of a routing"
        return activate_rows(
            out, bias, top_k_index, routing.slot_of, routing.offsets, activation, gated=gated, dtype=x.dtype
        )
    return out if keep_splits else out[0]
