"""Fragment-order 2:4 weights back to dense ones on the GPU: the decoder of the grouped GEMM, then a store."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .grouped_nm import reorder_columns, tile_row_order, weight_tile
from .layout import NMWeight

__all__ = ["unpack_fragment"]


@triton.jit(do_not_specialize=("tiles", "k_steps"))
def _unpack_kernel(
    values_ptr,  # (E, tiles, K_PAD / 64, 4, 4, 32, 4) int32
    index_ptr,  # (E, tiles, K_PAD / 128, 4, 32, 4) int32
    out_ptr,  # (E, N, K)
    N,
    K,
    tiles,  # cdiv(N, 128)
    k_steps,  # cdiv(K, 128)
):
    """Grid (E * tiles * k_steps,): one program writes a tile of 128 rows by 128 columns."""
    pid = tl.program_id(0).to(tl.int64)
    expert = pid // (tiles * k_steps)
    tile = (pid // k_steps) % tiles
    step = pid % k_steps
    quad = tl.arange(0, 4)
    words = tl.load(values_ptr + pid * 4096 + tl.arange(0, 1024)[:, None] * 4 + quad[None, :])
    index = tl.load(index_ptr + pid * 512 + tl.arange(0, 128)[:, None] * 4 + quad[None, :])
    weight = weight_tile(words, index, out_ptr.dtype.element_ty, True)
    offs_n = tile * 128 + tile_row_order(True)
    # the columns of the tile are in the order that reorder_columns gives to x
    offs_k = step * 128 + tl.reshape(reorder_columns(tl.arange(0, 128)[None, :], 1, True), (128,))
    out_ptrs = out_ptr + (expert * N + offs_n)[:, None] * K + offs_k[None, :]
    tl.store(out_ptrs, weight, mask=(offs_n < N)[:, None] & (offs_k < K)[None, :])


def unpack_fragment(weight: NMWeight) -> torch.Tensor:
    """The dense weight (E, N, K) of a packed one in fragment order, bit for bit, padding cut off."""
    E, N, K = weight.shape
    dense = torch.empty(weight.shape, dtype=weight.dtype, device=weight.values.device)
    tiles, k_steps = weight.index.shape[1:3]
    if dense.numel():
        _unpack_kernel[(E * tiles * k_steps,)](weight.values, weight.index, dense, N, K, tiles, k_steps)
    return dense
