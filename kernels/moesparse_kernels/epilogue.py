"""What happens to the rows of a grouped GEMM: the activation between the two GEMMs, and the combine after the second.

    h[r]   = act(gate[r]) * up[r]                    gated experts, [gate | up] concatenated
    y[t]   = sum_k top_k_weights[t, k] * rows[row_of[t, k]]

The activation is fused into the GEMM unless the reduction dimension was split: then the splits are added here, in
order, so the result is the same in every run. Arithmetic is fp32; one rounding at the end.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

__all__ = ["activate", "activate_rows", "combine"]


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """One of moe_reference.ACTIVATIONS on an fp32 tensor."""
    if ACTIVATION == "silu":
        x = x * tl.sigmoid(x)
    elif ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # 0.5 * (1 + tanh(z)) is sigmoid(2 z)
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACTIVATION == "relu":
        x = tl.maximum(x, 0.0)
    elif ACTIVATION == "relu2":
        x = tl.maximum(x, 0.0)
        x = x * x
    else:
        tl.static_assert(ACTIVATION == "none", "unknown activation")
    return x


@triton.jit(do_not_specialize=("R",), do_not_specialize_on_alignment=("slot_of_ptr", "num_rows_ptr"))
def _activate_kernel(
    partial_ptr,  # (SPLIT_K, R, N), N = 2 * I when GATED
    bias_ptr,  # (E, N), read when HAS_BIAS
    top_k_index_ptr,  # (R,) experts of the slots, read when HAS_BIAS
    slot_of_ptr,  # (R,) int32
    num_rows_ptr,  # (1,) int32: rows that belong to an expert
    out_ptr,  # (R, N_OUT)
    R,
    N,
    N_OUT,
    SPLIT_K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Grid (R, cdiv(N_OUT, BLOCK_N)): one program makes a slice of one row."""
    row = tl.program_id(0).to(tl.int64)
    if row >= tl.load(num_rows_ptr):
        return
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N_OUT
    value = tl.zeros((BLOCK_N,), dtype=tl.float32)
    up = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for split in tl.static_range(SPLIT_K):
        base = partial_ptr + (split * R + row) * N
        value += tl.load(base + offs_n, mask=mask_n, other=0.0).to(tl.float32)
        if GATED:
            up += tl.load(base + N_OUT + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    if HAS_BIAS:
        slot = tl.load(slot_of_ptr + row)
        expert = tl.load(top_k_index_ptr + slot).to(tl.int64)
        value += tl.load(bias_ptr + expert * N + offs_n, mask=mask_n, other=0.0).to(tl.float32)
        if GATED:
            up += tl.load(bias_ptr + expert * N + N_OUT + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    value = activate(value, ACTIVATION)
    if GATED:
        value *= up
    tl.store(out_ptr + row * N_OUT + offs_n, value.to(out_ptr.dtype.element_ty), mask=mask_n)


def activate_rows(
    partial: torch.Tensor,
    bias: torch.Tensor | None,
    top_k_index: torch.Tensor,
    slot_of: torch.Tensor,
    offsets: torch.Tensor,
    activation: str,
    gated: bool,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Add the splits of a GEMM in order, then bias and activation.

    Args:
        partial: (splits, R, N), any float dtype; N = 2 * I, [gate | up], when gated.
        bias: (E, N) or None.
        top_k_index: (T, top_k), the expert of each slot.
        slot_of: (R,) int32 from `route`.
        offsets: (E + 1,) int32 from `route`.
        activation: one of moe_reference.ACTIVATIONS.
        gated: multiply the activated first half of N by the second half.
        dtype: dtype of the result.

    Returns:
        (R, I) when gated, else (R, N). Rows of dropped slots are not written.
    """
    splits, R, N = partial.shape
    n_out = N // 2 if gated else N
    out = torch.empty(R, n_out, dtype=dtype, device=partial.device)
    if out.numel() == 0:
        return out
    block_n = min(1024, triton.next_power_of_2(n_out))
    _activate_kernel[(R, triton.cdiv(n_out, block_n))](
        partial,
        partial if bias is None else bias,
        top_k_index,
        slot_of,
        offsets[-1:],
        out,
        R,
        N,
        n_out,
        SPLIT_K=splits,
        ACTIVATION=activation,
        GATED=gated,
        HAS_BIAS=bias is not None,
        BLOCK_N=block_n,
    )
    return out


@triton.jit(do_not_specialize=("R", "E"), do_not_specialize_on_alignment=("row_of_ptr",))
def _combine_kernel(
    rows_ptr,  # (SPLIT_K, R, H)
    bias_ptr,  # (E, H), read when HAS_BIAS
    top_k_index_ptr,  # (T, TOP_K), read when HAS_BIAS or not SORTED
    top_k_weights_ptr,  # (T, TOP_K)
    row_of_ptr,  # (T, TOP_K) int32, -1 when dropped; read when SORTED
    out_ptr,  # (T, H)
    R,
    H,
    E,
    TOP_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SORTED: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Grid (T, cdiv(H, BLOCK_H)): one program sums one token's slice of H."""
    if EARLY:
        gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    offs_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    mask_h = offs_h < H
    acc = tl.zeros((BLOCK_H,), dtype=tl.float32)
    for k in range(TOP_K):
        # int64, because row * H passes 2**31 for long prompts
        slot = token * TOP_K + k
        if SORTED:
            row = tl.load(row_of_ptr + slot).to(tl.int64)
        else:
            chosen = tl.load(top_k_index_ptr + slot)
            row = tl.where((chosen >= 0) & (chosen < E), slot, -1)
        mask = tl.where(mask_h, row, -1) >= 0
        value = tl.zeros((BLOCK_H,), dtype=tl.float32)
        for split in tl.static_range(SPLIT_K):
            value += tl.load(rows_ptr + (split * R + row) * H + offs_h, mask=mask, other=0.0).to(tl.float32)
        if HAS_BIAS:
            expert = tl.load(top_k_index_ptr + slot).to(tl.int64)
            value += tl.load(bias_ptr + expert * H + offs_h, mask=mask, other=0.0).to(tl.float32)
        gate = tl.load(top_k_weights_ptr + slot).to(tl.float32)
        # a dropped slot adds nothing, whatever its gate holds
        acc += tl.where(mask, gate * value, 0.0)
    tl.store(out_ptr + token * H + offs_h, acc.to(out_ptr.dtype.element_ty), mask=mask_h)


def combine(
    rows: torch.Tensor,
    bias: torch.Tensor | None,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    row_of: torch.Tensor | None,
    dtype: torch.dtype,
    *,
    num_experts: int = 0,
    early: bool = False,
) -> torch.Tensor:
    """Weight each token's rows by its gates and add them, choice by choice.

    Args:
        rows: (splits, R, H), the down projection; splits of the reduction are added in order.
        bias: (E, H) or None.
        top_k_index: (T, top_k).
        top_k_weights: (T, top_k), any float dtype.
        row_of: (T, top_k) int32 from `route`; None where row r is slot r.
        dtype: dtype of the result.
        num_experts: E, without row_of: slots of ids outside 0..E-1 are dropped.
        early: may begin before what was launched last has ended, and waits for it.

    Returns:
        (T, H); fp32 accumulation, rounded once. A token whose slots are all dropped gets zeros.
    """
    splits, R, H = rows.shape
    T, top_k = top_k_index.shape
    out = torch.empty(T, H, dtype=dtype, device=rows.device)
    if out.numel() == 0:
        return out
    block_h = min(1024, triton.next_power_of_2(H))
    _combine_kernel[(T, triton.cdiv(H, block_h))](
        rows,
        rows if bias is None else bias,
        top_k_index,
        top_k_weights,
        top_k_index if row_of is None else row_of,
        out,
        R,
        H,
        num_experts,
        TOP_K=top_k,
        SPLIT_K=splits,
        HAS_BIAS=bias is not None,
        SORTED=row_of is not None,
        EARLY=early,
        BLOCK_H=block_h,
        **({"launch_pdl": True} if early else {}),
    )
    return out
