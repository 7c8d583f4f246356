"""Grouped GEMM on 2:4 weights in fragment order (layout.py): every expert's rows times that expert's packed weight.

    out[r, n] = act(sum_k x[r, k] * W[e(r), n, k] + bias[e(r), n])          not gated
    out[r, i] = act(gate) * up, W = [gate; up] along n, i < N / 2           gated

M rows, N columns of the output, K the reduction dimension.

A weight never passes through shared memory as bf16: a thread copies its own 16 bytes of packed values, turns them
into the dense operand of its tensor-core instruction in registers (`_expand`), and multiplies. Two things make that
possible. The fragment order was laid out for it; and the reduction dimension is reordered inside each 32 columns,
for the weight by the storage and for x by naming its registers in that order (`reorder_columns`), which costs
nothing: a thread's eight columns are neighbours in memory, one 16-byte read.

Gate and up rows of one output column sit in different tiles of the weight. A program therefore takes half of a gate
tile and the same half of the up tile, chosen so that both results of a column are registers of one thread.

Two forms of the product: x @ W.T (mma.sync, any GPU) and, with SWAP, W @ x.T (wgmma on sm_90, where the long side
must be the rows). They differ only in which register is which.
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

__all__ = ["can_fuse_gate", "grouped_nm"]

_TILE = 128


@triton.jit
def _expand(first, second, nibbles):
    """The four dense columns of two groups, from their kept weights and bitmasks.

    Every int32 holds group a in its low half and group b in its high half: `first` and `second` the kept weights in
    column order, `nibbles` the bitmasks (bit j and bit 16 + j say that column j is kept). Exactly two bits are set
    per group, so column 0 can only be the first kept weight and column 3 only the second; column 1 is the second if
    column 0 is kept, column 2 the first if column 3 is.
    """
    kept_0 = (nibbles & 0x00010001) * 0xFFFF
    kept_1 = ((nibbles >> 1) & 0x00010001) * 0xFFFF
    kept_2 = ((nibbles >> 2) & 0x00010001) * 0xFFFF
    kept_3 = ((nibbles >> 3) & 0x00010001) * 0xFFFF
    column_0 = first & kept_0
    column_1 = ((kept_0 & second) | (~kept_0 & first)) & kept_1
    column_2 = ((kept_3 & first) | (~kept_3 & second)) & kept_2
    column_3 = second & kept_3
    return column_0, column_1, column_2, column_3


@triton.jit
def _halves(words, dtype: tl.constexpr):
    """int32 (...) -> 16-bit floats (..., 2), low half first."""
    low = (words & 0xFFFF).to(tl.uint16).to(dtype, bitcast=True)
    high = ((words >> 16) & 0xFFFF).to(tl.uint16).to(dtype, bitcast=True)
    return tl.join(low, high)


@triton.jit
def weight_tile(words, index, dtype: tl.constexpr, SWAP: tl.constexpr, ROWS: tl.constexpr = 128):
    """A dense tile of ROWS rows by 128 columns from its packed words; only names of registers move.

    words: int32 (8 * ROWS, 4), rows (kt 2, r ROWS / 32, w 4, lane 32), columns (p2 2, v 2); index: int32
    (128, ROWS / 32), rows (w, lane), columns r. SWAP wants all 128 rows. Returns (N, K) when SWAP, else (K, N), with N
    and K in the order of `tile_row_order` and `reorder_columns`.
    """
    R: tl.constexpr = ROWS // 32
    first, second = tl.split(tl.reshape(words, (8 * ROWS, 2, 2)))
    shifts = tl.arange(0, 4) * 4
    nibbles = index[:, :, None] >> shifts[None, None, :]  # (w lane, r, kt p2)
    nibbles = tl.reshape(tl.trans(tl.reshape(nibbles, (128, R, 2, 2)), (2, 1, 0, 3)), (8 * ROWS, 2))
    column_0, column_1, column_2, column_3 = _expand(first, second, nibbles)
    # j = 2 * jh + jl is the column inside the group; axes (..., p2, jl, jh) from the joins below, then b
    columns = tl.join(tl.join(column_0, column_2), tl.join(column_1, column_3))
    tile = tl.reshape(_halves(columns, dtype), (2, R, 4, 8, 4, 2, 2, 2, 2))  # kt r w g q p2 jh jl b
    if SWAP:
        tile = tl.reshape(tile, (2, 2, 2, 4, 8, 4, 2, 2, 2, 2))  # kt r1 r0 w g q p2 jh jl b
        tile = tl.trans(tile, (1, 3, 2, 4, 0, 6, 7, 8, 5, 9))  # r1 w r0 g | kt p2 jh jl q b
    else:
        tile = tl.trans(tile, (0, 5, 6, 4, 7, 8, 1, 2, 3))  # kt p2 jh q jl b | r w g
    return tl.reshape(tile, (128, ROWS))


@triton.jit
def reorder_columns(x, BLOCK_M: tl.constexpr, SWAP: tl.constexpr):
    """x (BLOCK_M, 128) with its columns in the order of `weight_tile`'s reduction dimension."""
    x = tl.reshape(x, (BLOCK_M, 4, 4, 2, 2, 2))  # m (kt p2) q b jh jl
    if SWAP:
        x = tl.trans(x, (0, 1, 4, 5, 2, 3))
    else:
        x = tl.trans(x, (0, 1, 4, 2, 5, 3))
    return tl.reshape(x, (BLOCK_M, 128))


@triton.jit
def tile_row_order(SWAP: tl.constexpr, ROWS: tl.constexpr = 128):
    """Row of the weight tile, 32 * w + 8 * r + g, behind each position along N of the product."""
    i = tl.arange(0, ROWS)
    if SWAP:  # positions (r1, w, r0, g)
        order = ((i // 16) % 4) * 32 + (i // 64) * 16 + ((i // 8) % 2) * 8 + i % 8
    else:  # positions (r, w, g)
        order = (i // 32) * 8 + ((i // 8) % 4) * 32 + i % 8
    return order


@triton.jit
def _prefetch(pointers):
    """Lines of 128 bytes into L2; NVIDIA's only."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; // $0", "=r,l", [pointers.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
    )


# what changes from call to call is no constant and no promise: a server would compile at every new batch size
@triton.jit(
    do_not_specialize=("R", "E", "tiles", "k_steps", "num_blocks", "split_k", "group_m"),
    do_not_specialize_on_alignment=("slot_of_ptr", "offsets_ptr", "block_expert_ptr", "block_row_ptr"),
)
def _grouped_nm_kernel(
    x_ptr,  # (T, K) when GATHER, else (R, K)
    values_ptr,  # (E, tiles, K_PAD / 64, 4, 4, 32, 4) int32
    index_ptr,  # (E, tiles, K_PAD / 128, 4, 32, 4) int32
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
    tiles,  # cdiv(N, 128)
    k_steps,  # cdiv(K, 128)
    num_blocks,
    split_k,
    group_m,  # blocks that walk the weight together
    stride_xm,
    TOP_K: tl.constexpr,  # read when GATHER
    GATHER: tl.constexpr,
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SWAP: tl.constexpr,
    STAGES: tl.constexpr,
    ROWS: tl.constexpr,  # weight rows of a program: 128, or 64 where not SWAP
    OWN: tl.constexpr,  # a program finds its rows itself
    EXPERTS: tl.constexpr,  # for own_slots
    FIRST: tl.constexpr,  # what is launched next may begin at once
    EARLY: tl.constexpr,  # may begin before what was launched last, which wrote x, has ended
):
    """Grid (num_blocks * tiles * 128 / ROWS, split_k): one program makes a block of rows by ROWS weight rows."""
    if FIRST:
        gdc_launch_dependents()
    PARTS: tl.constexpr = 128 // ROWS
    block, tile = block_and_tile(tl.program_id(0), tiles * PARTS, num_blocks, group_m)
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

    # packed words of a tile: 32 int32 of values and 4 of index for each column of the padded weight
    k_pad = k_steps * 128
    word = tl.arange(0, 8 * ROWS)
    quad = tl.arange(0, 4)
    thread = tl.arange(0, 128)
    RS: tl.constexpr = ROWS // 32
    eight = tl.arange(0, RS)
    if GATED:
        # r = RS / 2 * s + rr: s picks the gate tile or the up tile, rr the eight rows inside this part of it
        HALF: tl.constexpr = RS // 2
        part = tile % (2 * PARTS)
        first_tile = expert * tiles + tile // (2 * PARTS)
        up_tile = tl.cast(tiles // 2, tl.int64)
        s, rr = (word // (128 * HALF)) % 2, (word // 128) % HALF
        words = s * up_tile * (k_pad * 32) + (word // (128 * RS)) * 2048 + (part * HALF + rr) * 512 + (word % 128) * 4
        lanes = (eight // HALF) * up_tile * (k_pad * 4) + part * HALF + eight % HALF
    elif PARTS == 1:
        first_tile = expert * tiles + tile
        words = word * 4
        lanes = eight
    else:
        part = tile % PARTS
        first_tile = expert * tiles + tile // PARTS
        words = (word // (128 * RS)) * 2048 + (part * RS + (word // 128) % RS) * 512 + (word % 128) * 4
        lanes = part * RS + eight
    values_ptrs = values_ptr + first_tile * (k_pad * 32) + words[:, None] + quad[None, :]
    index_ptrs = index_ptr + first_tile * (k_pad * 4) + thread[:, None] * 4 + lanes[None, :]

    split = tl.program_id(1)
    steps = tl.cdiv(k_steps, split_k)
    first_step = split * steps
    last_step = tl.minimum(first_step + steps, k_steps)
    offs_k = first_step * 128 + tl.arange(0, 128)
    values_ptrs += first_step * 4096
    index_ptrs += first_step * 512
    x_ptrs = x_ptr + source[:, None].to(tl.int64) * stride_xm + offs_k[None, :]

    if SWAP:
        acc = tl.zeros((128, BLOCK_M), dtype=tl.float32)
    else:
        acc = tl.zeros((BLOCK_M, ROWS), dtype=tl.float32)
    if EARLY:
        # the weight does not wait for anybody: its first two steps into L2 meanwhile
        ahead = values_ptr + first_tile * (k_pad * 32) + tl.arange(0, 128) * 32
        for more in tl.static_range(2):
            _prefetch(ahead + tl.minimum(first_step + more, k_steps - 1) * 4096)
        gdc_wait()
        gdc_launch_dependents()
    for step in tl.range(first_step, last_step, num_stages=STAGES):
        packed = tl.load(values_ptrs)
        index = tl.load(index_ptrs)
        if EVEN_K:
            x = tl.load(x_ptrs, mask=mask_m[:, None], other=0.0)
        else:
            columns = step * 128 + tl.arange(0, 128)
            x = tl.load(x_ptrs, mask=mask_m[:, None] & (columns < K)[None, :], other=0.0)
        weight = weight_tile(packed, index, x_ptr.dtype.element_ty, SWAP, ROWS)
        x = reorder_columns(x, BLOCK_M, SWAP)
        if SWAP:
            acc = tl.dot(weight, x.T, acc)
        else:
            acc = tl.dot(x, weight, acc)
        values_ptrs += 4096
        index_ptrs += 512
        x_ptrs += 128

    if GATED:
        # split the product along s, a register index of every thread; what is left of N is (rr, w, g) in some order
        if SWAP:
            parts = tl.trans(tl.reshape(acc, (2, 4, 2, 8, BLOCK_M)), (1, 2, 3, 4, 0))
            gate, up = tl.split(parts)
            gate = tl.reshape(gate, (64, BLOCK_M)).T
            up = tl.reshape(up, (64, BLOCK_M)).T
            i = tl.arange(0, 64)
            offs_n = (i // 16) * 32 + ((i // 8) % 2) * 8 + i % 8
        else:
            parts = tl.trans(tl.reshape(acc, (BLOCK_M, 2, HALF, 4, 8)), (0, 2, 3, 4, 1))
            gate, up = tl.split(parts)
            gate = tl.reshape(gate, (BLOCK_M, ROWS // 2))
            up = tl.reshape(up, (BLOCK_M, ROWS // 2))
            i = tl.arange(0, ROWS // 2)
            offs_n = ((i // 8) % 4) * 32 + (i // 32) * 8 + i % 8
        offs_n += (tile // (2 * PARTS)) * 128 + part * HALF * 8
        mask_n = offs_n < N_OUT
        if HAS_BIAS:
            bias_ptrs = bias_ptr + expert * N + offs_n
            gate += tl.load(bias_ptrs, mask=mask_n, other=0.0).to(tl.float32)[None, :]
            up += tl.load(bias_ptrs + N_OUT, mask=mask_n, other=0.0).to(tl.float32)[None, :]
        result = activate(gate, ACTIVATION) * up
    else:
        if SWAP:
            result = acc.T
        else:
            result = acc
        offs_n = tile_row_order(SWAP, ROWS)
        if PARTS == 1:
            offs_n += tile * 128
        else:
            offs_n += (tile // PARTS) * 128 + part * RS * 8
        mask_n = offs_n < N_OUT
        if HAS_BIAS:
            result += tl.load(bias_ptr + expert * N + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
        result = activate(result, ACTIVATION)
    out_rows = (split * R + offs_m).to(tl.int64)
    out_ptrs = out_ptr + out_rows[:, None] * N_OUT + offs_n[None, :]
    tl.store(out_ptrs, result.to(out_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


def can_fuse_gate(n: int) -> bool:
    """Whether gate and up rows start on tile borders; if not, the activation runs as a launch of its own."""
    return n % (2 * _TILE) == 0


def grouped_nm(
    x: torch.Tensor,
    values: torch.Tensor,
    index: torch.Tensor,
    n: int,
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
    """Multiply expert-sorted rows by their expert's 2:4 weight; optionally bias and activation.

    Args:
        x: (T, K) when `gather`, else (R, K) in the order of `routing`; bf16 or fp16, last dim contiguous.
        values, index: the tensors of an `NMWeight` (E, n, K) in fragment order, of the dtype of x.
        n: rows of the weight, 2 * I when gated.
        routing: from `route` with config.block_m; None: rows in the order of the slots, `MOST_SLOTS` at most.
        top_k_index: (T, top_k), what was routed.
        config: launch sizes; num_warps must be 4, the layout is made for four warps.
        gather: take the token of each row from x, instead of row r from row r.
        bias: (E, n), added in fp32, or None.
        activation: one of moe_reference.ACTIVATIONS, applied in fp32.
        gated: multiply the activated first half of n by the second half.
        keep_splits: return the fp32 partial sums of a split reduction, without bias, for `combine`.
        first: what is launched next with `early` may begin as soon as all programs of this launch have.
        early: may begin before the launch in front of it, with `first`, has ended; it waits before x is read.

    Returns:
        (R, n), or (R, n / 2) when gated; (config.split_k, R, n) when keep_splits. fp32 accumulation, rounded once to
        the dtype of x; fp32 for keep_splits with split_k > 1. Rows of dropped slots are not written.
    """
    R, K, E = top_k_index.numel(), x.shape[1], values.shape[0]
    num_blocks = block_bound(R, E, config.block_m)
    split_k, rows = config.split_k, min(config.block_n, _TILE)
    if rows not in ((_TILE,) if config.swap else (64, _TILE)):
        raise ValueError(f"block_n of packed weights must be 128, or 64 where not swapped, got {config}")
    separate = (gated and not can_fuse_gate(n)) or (split_k > 1 and not keep_splits)
    fused = not separate and not (keep_splits and split_k > 1)
    n_out = n // 2 if gated and fused else n
    out = torch.empty(split_k, R, n_out, dtype=x.dtype if fused else torch.float32, device=x.device)
    if out.numel():
        tiles, k_steps = triton.cdiv(n, _TILE), triton.cdiv(K, _TILE)
        _grouped_nm_kernel[(num_blocks * tiles * (_TILE // rows), split_k)](
            x,
            values,
            index,
            bias if fused and bias is not None else values,
            out,
            *routed_by(routing, top_k_index),
            R,
            E,
            n,
            K,
            n_out,
            tiles,
            k_steps,
            num_blocks,
            split_k,
            config.group_m,
            x.stride(0),
            TOP_K=top_k_index.shape[1] if gather else 1,
            GATHER=gather,
            GATED=gated and fused,
            ACTIVATION=activation if fused else "none",
            HAS_BIAS=fused and bias is not None,
            EVEN_K=K % _TILE == 0,
            BLOCK_M=config.block_m,
            SWAP=config.swap,
            STAGES=config.num_stages,
            ROWS=rows,
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
