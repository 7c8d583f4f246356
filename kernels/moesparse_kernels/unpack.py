"""Packed 2:4 weights back to dense ones, fast: for the CPU path, and for loads where the dense GEMM wins.

The kept weights of a group of four are two neighbouring 16-bit values, its dense form four. As one 64-bit word per
group,

    dense = (v0 v1 v0 v1 & even) | (0 v0 v1 0 & middle)

where every column is covered by one of the two arrangements and the masks depend on the group's nibble alone. That is
a handful of vectorised integer operations on whole rows, with the masks of a byte of index (two groups) looked up at
once; boolean scatters are several times slower. On a GPU the decoder of the grouped GEMM does it
(unpack_fragment.py).
"""

from __future__ import annotations

from functools import cache
from itertools import combinations

import torch

from .layout import NMWeight

__all__ = ["unpack", "unpack_expert"]

# dense weights made at a time on a CPU: the temporaries of a block stay in its cache
_BLOCK = 2**19


def _signed(word: int) -> int:
    return word - 2**64 if word >= 2**63 else word


@cache
def _masks(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks of the even and of the middle arrangement for a byte of index: (256,) complex128, each two int64."""
    even, middle = [0] * 16, [0] * 16
    for first, second in combinations(range(4), 2):
        nibble = 1 << first | 1 << second
        for column, is_second in ((first, False), (second, True)):
            # v0 v1 v0 v1 holds the first weight at even columns; 0 v0 v1 0 has the rest
            target = even if is_second == (column % 2 == 1) else middle
            target[nibble] |= 0xFFFF << 16 * column
    tables = []
    for masks in (even, middle):
        pairs = [[_signed(masks[byte & 15]), _signed(masks[byte >> 4])] for byte in range(256)]
        # complex only as a 16-byte element that index_select copies whole
        tables.append(torch.view_as_complex(torch.tensor(pairs, device=device).view(torch.float64)))
    return tables[0], tables[1]


def _unpack_rows(values: torch.Tensor, index: torch.Tensor, out: torch.Tensor) -> None:
    """2:4 rows of one expert, values (N, K / 2) and index (N, K / 8) in "row" order -> out (N, K), 16-bit dtypes."""
    N, K = out.shape
    even, middle = _masks(out.device)
    rows = max(1, _BLOCK // max(K, 1))
    for start in range(0, N, rows):
        stop = min(start + rows, N)
        byte = index[start:stop].reshape(-1).to(torch.int32)
        shifted = values[start:stop].view(torch.int32).reshape(-1).to(torch.int64)
        word = out[start:stop].view(torch.int64).view(-1)
        torch.bitwise_and(shifted, 0xFFFFFFFF, out=word)
        word |= word << 32
        word &= torch.view_as_real(torch.index_select(even, 0, byte)).view(torch.int64).view(-1)
        shifted <<= 16
        shifted &= torch.view_as_real(torch.index_select(middle, 0, byte)).view(torch.int64).view(-1)
        word |= shifted


def unpack_expert(weight: NMWeight, expert: int, out: torch.Tensor | None = None) -> torch.Tensor:
    """`NMWeight.unpack_expert`, several times faster for row-order 2:4 weights of 16 bits.

    Args:
        weight: any pattern and order.
        expert: which one.
        out: contiguous (N, K) of the weight's dtype, written and returned when given.

    Returns:
        (N, K), the masked weight bit for bit.
    """
    fast = weight.order == "row" and (weight.n, weight.m) == (2, 4) and weight.dtype.itemsize == 2
    if not fast or weight.shape[2] % 8:
        return weight.unpack_expert(expert, out=out)
    if out is None:
        out = torch.empty(weight.shape[1:], dtype=weight.dtype, device=weight.values.device)
    _unpack_rows(weight.values[expert], weight.index[expert], out)
    return out


def unpack(weight: NMWeight) -> torch.Tensor:
    """The dense weight (E, N, K), bit for bit: one launch for fragment order on a GPU, expert by expert elsewhere."""
    if weight.order == "fragment" and weight.values.device.type == "cuda":
        from .unpack_fragment import unpack_fragment

        return unpack_fragment(weight)
    dense = torch.empty(weight.shape, dtype=weight.dtype, device=weight.values.device)
    for expert in range(weight.shape[0]):
        unpack_expert(weight, expert, out=dense[expert])
    return dense
