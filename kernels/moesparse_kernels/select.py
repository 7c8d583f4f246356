"""Score and choose in one pass: keep the n largest |W| * scale of every m neighbouring columns.

W is read once and leaves as W * mask or packed (layout.py, "row" order). Symbols: E experts, N rows, K columns. The
score is the fp32 product |W| * scale of Wanda (Sun et al. 2023, arXiv 2306.11695) and MoE-Pruner (Xie et al. 2024,
arXiv 2410.12013). Scores are compared as integers: for non-negative floats the order is the same, it is total, and a
NaN ranks highest, so that every group keeps exactly n whatever it holds. Equal scores go to the lower column.

`_nm_prune_octet_kernel` handles m = 4 and 8; a thread holds eight columns, one byte of the index, in registers. Their
ranks live in the eight nibbles of one int32, so a comparison is one addition. `_nm_prune_kernel` handles every n:m.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

__all__ = ["nm_prune", "nm_prune_packed"]


@triton.jit
def score_bits(w, scale):
    """|w| * scale as int32 bits, ordered like the scores; NaN above infinity."""
    return (w.to(tl.float32) * scale).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _split_octets(x, BLOCK_K: tl.constexpr):
    """(BLOCK_K,) -> eight (BLOCK_K // 8,), column j of every eight in the j-th."""
    even, odd = tl.split(tl.reshape(x, (BLOCK_K // 8, 2, 2, 2)))
    x04, x26 = tl.split(even)
    x15, x37 = tl.split(odd)
    x0, x4 = tl.split(x04)
    x2, x6 = tl.split(x26)
    x1, x5 = tl.split(x15)
    x3, x7 = tl.split(x37)
    return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def _octet_keep(s, GROUP_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Scores of eight columns -> int32 with nibble j = 1 where column j is kept, 0 where not."""
    # a column starts beaten by all later ones of its group; each comparison it wins moves one loss to the other
    if GROUP_M == 4:
        ranks = tl.full(s[0].shape, 0x01230123, tl.int32)
    else:
        ranks = tl.full(s[0].shape, 0x01234567, tl.int32)
    for i in tl.static_range(7):
        for j in tl.static_range(i + 1, 8):
            if i // GROUP_M == j // GROUP_M:
                ranks += tl.where(s[i] >= s[j], (1 << (4 * j)) - (1 << (4 * i)), 0)
    # rank + 8 - n reaches the top bit of its nibble when rank >= n
    dropped = ((ranks + (8 - GROUP_N) * 0x11111111) >> 3) & 0x11111111
    return dropped ^ 0x11111111


@triton.jit
def _octet_value(w, position, P: tl.constexpr, GROUP_N: tl.constexpr, GROUP_M: tl.constexpr):
    """The P-th kept weight of eight columns; nibble j of position is 1 + its place where column j is kept, else 0."""
    FIRST: tl.constexpr = P // GROUP_N * GROUP_M + P % GROUP_N
    value = w[FIRST + GROUP_M - GROUP_N]
    for j in tl.static_range(FIRST, FIRST + GROUP_M - GROUP_N):
        value = tl.where(((position >> (4 * j)) & 15) == P + 1, w[j], value)
    return value


@triton.jit
def _nm_prune_octet_kernel(
    weight_ptr,  # (E, N, K)
    scale_ptr,  # (E, K) fp32
    out_ptr,  # (E, N, K), or (E, N, K // 2) when PACKED
    index_ptr,  # (E, N, K // 8) uint8 when PACKED
    N,
    K,
    GROUP_N: tl.constexpr,
    GROUP_M: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Grid (cdiv(N, BLOCK_N) * cdiv(K, BLOCK_K), E): one program prunes BLOCK_N rows of BLOCK_K columns.

    GROUP_M is 4 or 8, K a multiple of 8; PACKED keeps four of eight columns: 2:4 or 4:8.
    """
    blocks_k = tl.cdiv(K, BLOCK_K)
    first_n = tl.program_id(0) // blocks_k * BLOCK_N
    block = tl.program_id(0) % blocks_k
    offs_k = block * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_v = block * (BLOCK_K // 2) + tl.arange(0, BLOCK_K // 2)
    offs_b = block * (BLOCK_K // 8) + tl.arange(0, BLOCK_K // 8)
    mask_k = offs_k < K
    # int64, because row * K passes 2**31; inside a program's few rows it does not
    expert = tl.program_id(1).to(tl.int64)
    row = expert * N + first_n
    rows = tl.minimum(N - first_n, BLOCK_N)
    weight_ptr += row * K
    scale = tl.load(scale_ptr + expert * K + offs_k, mask=mask_k, other=0.0)
    w = tl.load(weight_ptr + offs_k, mask=mask_k, other=0.0)
    if PACKED:
        out_ptr += row * (K // 2)
        index_ptr += row * (K // 8)
    else:
        out_ptr += row * K
    for i in range(rows):
        # the next row is on its way while this one is ranked
        w_next = tl.load(weight_ptr + tl.minimum(i + 1, rows - 1) * K + offs_k, mask=mask_k, other=0.0)
        columns = _split_octets(w, BLOCK_K)
        keep = _octet_keep(_split_octets(score_bits(w, scale), BLOCK_K), GROUP_N, GROUP_M)
        if PACKED:
            # a product with 0x11111111 sums nibbles from the right: how many are kept up to and with column j
            position = (keep * 0x11111111) & (keep * 15)
            v0 = _octet_value(columns, position, 0, GROUP_N, GROUP_M)
            v1 = _octet_value(columns, position, 1, GROUP_N, GROUP_M)
            v2 = _octet_value(columns, position, 2, GROUP_N, GROUP_M)
            v3 = _octet_value(columns, position, 3, GROUP_N, GROUP_M)
            values = tl.reshape(tl.join(tl.join(v0, v2), tl.join(v1, v3)), (BLOCK_K // 2,))
            # bits 0, 4, 8, .. 28 move together into one byte
            byte = (keep | (keep >> 3)) & 0x03030303
            byte = (byte | (byte >> 6)) & 0x000F000F
            byte = (byte | (byte >> 12)) & 0xFF
            tl.store(out_ptr + i * (K // 2) + offs_v, values, mask=offs_v < K // 2)
            tl.store(index_ptr + i * (K // 8) + offs_b, byte.to(tl.uint8), mask=offs_b < K // 8)
        else:
            o0 = tl.where((keep & 0x1) != 0, columns[0], 0.0)
            o1 = tl.where((keep & 0x10) != 0, columns[1], 0.0)
            o2 = tl.where((keep & 0x100) != 0, columns[2], 0.0)
            o3 = tl.where((keep & 0x1000) != 0, columns[3], 0.0)
            o4 = tl.where((keep & 0x10000) != 0, columns[4], 0.0)
            o5 = tl.where((keep & 0x100000) != 0, columns[5], 0.0)
            o6 = tl.where((keep & 0x1000000) != 0, columns[6], 0.0)
            o7 = tl.where((keep & 0x10000000) != 0, columns[7], 0.0)
            even = tl.join(tl.join(o0, o4), tl.join(o2, o6))
            odd = tl.join(tl.join(o1, o5), tl.join(o3, o7))
            tl.store(out_ptr + i * K + offs_k, tl.reshape(tl.join(even, odd), (BLOCK_K,)), mask=mask_k)
        w = w_next


@triton.jit
def _nm_prune_kernel(
    weight_ptr,  # (E, N, K)
    scale_ptr,  # (E, K) fp32
    out_ptr,  # (E, N, K), or (E, N, K // GROUP_M * GROUP_N) when PACKED
    index_ptr,  # (E, N, K // 8) uint8 when PACKED
    N,
    K,
    GROUP_N: tl.constexpr,
    GROUP_M: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """Grid (N, cdiv(K // GROUP_M, BLOCK_G), E): one program prunes BLOCK_G groups of one row, any n:m."""
    # int64, because row * K passes 2**31
    expert = tl.program_id(2).to(tl.int64)
    row = expert * N + tl.program_id(0)
    group = tl.program_id(1) * BLOCK_G + tl.arange(0, BLOCK_G)
    column = tl.arange(0, GROUP_M)[None, :]
    offs = group[:, None] * GROUP_M + column
    mask = offs < K
    w = tl.load(weight_ptr + row * K + offs, mask=mask, other=0.0)
    score = score_bits(w, tl.load(scale_ptr + expert * K + offs, mask=mask, other=0.0))
    rank = tl.zeros((BLOCK_G, GROUP_M), dtype=tl.int32)
    for j in range(GROUP_M):
        other = tl.max(tl.where(column == j, score, -1), axis=1)[:, None]
        rank += ((other > score) | ((other == score) & (j < column))).to(tl.int32)
    keep = (rank < GROUP_N).to(tl.int32)
    if PACKED:
        place = tl.cumsum(keep, axis=1) - 1
        tl.store(
            out_ptr + row * (K // GROUP_M * GROUP_N) + group[:, None] * GROUP_N + place,
            w,
            mask=mask & (keep != 0),
        )
        octets = tl.reshape(keep, (BLOCK_G * GROUP_M // 8, 8))
        byte = tl.sum(octets << tl.arange(0, 8)[None, :], axis=1)
        offs_b = tl.program_id(1) * (BLOCK_G * GROUP_M // 8) + tl.arange(0, BLOCK_G * GROUP_M // 8)
        tl.store(index_ptr + row * (K // 8) + offs_b, byte.to(tl.uint8), mask=offs_b < K // 8)
    else:
        tl.store(out_ptr + row * K + offs, tl.where(keep != 0, w, 0.0), mask=mask)


def _launch(
    weight: torch.Tensor, scale: torch.Tensor, out: torch.Tensor, index: torch.Tensor | None, n: int, m: int
) -> None:
    E, N, K = weight.shape
    packed = index is not None
    grid: tuple[int, ...]
    if m <= 8 and K % 8 == 0 and (not packed or 2 * n == m):
        # eight 16-bit columns, a 16-byte load, per thread
        lanes = 64 if torch.version.hip else 32
        block_k = 512 if K > 256 or lanes == 64 else 256
        # enough rows to pay for the scale, and at least some thousand programs where the weight is large
        block_n = 16 if E * N * K >= 2**24 else 4
        grid = (triton.cdiv(K, block_k) * triton.cdiv(N, block_n), E)
        _nm_prune_octet_kernel[grid](
            weight,
            scale,
            out,
            out if index is None else index,
            N,
            K,
            GROUP_N=n,
            GROUP_M=m,
            PACKED=packed,
            BLOCK_N=block_n,
            BLOCK_K=block_k,
            num_warps=block_k // (8 * lanes),
        )
    else:
        block_g = 1024 // m
        grid = (N, triton.cdiv(K // m, block_g), E)
        _nm_prune_kernel[grid](
            weight,
            scale,
            out,
            out if index is None else index,
            N,
            K,
            GROUP_N=n,
            GROUP_M=m,
            PACKED=packed,
            BLOCK_G=block_g,
            num_warps=4,
        )


def nm_prune(weight: torch.Tensor, scale: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """Contiguous weight (E, N, K) and fp32 scale (E, K) -> weight * mask, like `reference.nm_prune`."""
    out = torch.empty_like(weight)
    if out.numel():
        _launch(weight, scale, out, None, n, m)
    return out


def nm_prune_packed(weight: torch.Tensor, scale: torch.Tensor, n: int, m: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Contiguous weight (E, N, K) and fp32 scale (E, K) -> values and index in "row" order."""
    E, N, K = weight.shape
    values = weight.new_empty(E, N, K // m * n)
    index = torch.empty(E, N, K // 8, dtype=torch.uint8, device=weight.device)
    if values.numel():
        _launch(weight, scale, values, index, n, m)
    return values, index
