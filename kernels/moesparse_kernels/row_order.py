"""Rows of n:m weights to and from "row" order (layout.py), in plain torch.

A byte of index says everything about its eight columns, so tables of 256 entries replace work on single bits. What is
in the tables depends on the pattern:

2:4 of 16 bits   A group's dense form is a 64-bit word, (v0 v1 v0 v1 & even) | (0 v0 v1 0 & middle): every column is
                 covered by one of the two arrangements, and the masks depend on the group's nibble alone.
m = 4, 8         A byte holds a fixed number of weights: its table entry is the list of their columns, and whole rows
                 are one gather or scatter.
m = 16, 32       The number varies from byte to byte: the bits are expanded and the weights selected by mask.

On a CPU the compiled kernels write the dense rows where they are, the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from itertools import combinations

import torch

from .native_library import unpack_rows

__all__ = ["as_bits", "count_kept", "decode_rows", "encode_rows", "look_up", "pack_bits", "row_blocks", "unpack_bits"]

# weights handled at a time: on a CPU the temporaries of a block stay in its cache, a GPU wants fewer launches
_BLOCK_CPU, _BLOCK_GPU = 2**19, 2**22

# times a word of eight 0/1 bytes: bit 56 + j of the product is byte j, and no two bits meet
_GATHER_BITS = 0x0102040810204080


def _table_for(table: Callable, index: torch.Tensor, *pattern: int):
    """A cached table on the device of index; a fake index gets one of its own, which the cache must not hold."""
    make = table if type(index) is torch.Tensor else table.__wrapped__  # type: ignore[attr-defined]
    return make(*pattern, index.device)


def _byte_bits(device: torch.device) -> torch.Tensor:
    """int64 (256, 8): bit j of every byte."""
    return torch.arange(256, device=device).unsqueeze(1) >> torch.arange(8, device=device) & 1


@cache
def _bool_words(device: torch.device) -> torch.Tensor:
    """int64 (256,): the eight bits of a byte as eight bools."""
    return _byte_bits(device).to(torch.uint8).view(torch.int64).view(-1)


@cache
def _counts(m: int, device: torch.device) -> torch.Tensor:
    """(256,): how many bits of a byte are set, uint8; for m = 4 in each half of it, two uint8 in an int16."""
    counts = _byte_bits(device).unflatten(1, (-1, min(m, 8))).sum(-1).to(torch.uint8)
    # one element a byte, because index_select copies rows one by one
    return counts.view(torch.int16 if m == 4 else torch.uint8).view(-1)


@cache
def _columns(n: int, m: int, device: torch.device) -> torch.Tensor:
    """int64 (256, 8 * n / m): the columns a byte keeps, in order; those of no n:m byte hold anything in 0..7."""
    order = _byte_bits(device).sort(dim=1, descending=True, stable=True).indices
    return order[:, : 8 * n // m].contiguous()


@cache
def _arrangements(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks of the even and of the middle arrangement of a byte's two groups: (256,) complex128, each two int64."""
    even, middle = [0] * 16, [0] * 16
    for first, second in combinations(range(4), 2):
        nibble = 1 << first | 1 << second
        for column, is_second in ((first, False), (second, True)):
            # v0 v1 v0 v1 holds the first weight at even columns; 0 v0 v1 0 has the rest
            target = even if is_second == (column % 2 == 1) else middle
            target[nibble] |= 0xFFFF << 16 * column
    tables = []
    for masks in (even, middle):
        signed = [mask - 2**64 if mask >= 2**63 else mask for mask in masks]
        pairs = [[signed[byte & 15], signed[byte >> 4]] for byte in range(256)]
        # complex only as a 16-byte element that index_select copies whole
        tables.append(torch.view_as_complex(torch.tensor(pairs, device=device).view(torch.float64)))
    return tables[0], tables[1]


def pack_bits(mask: torch.Tensor) -> torch.Tensor:
    """bool (..., K) -> uint8 (..., K / 8), least significant bit first."""
    # the conversion also gives words an aligned start, which a view of a mask need not have
    words = mask.to(torch.uint8, memory_format=torch.contiguous_format).view(-1).view(torch.int64)
    return ((words * _GATHER_BITS) >> 56).to(torch.uint8).view(*mask.shape[:-1], mask.shape[-1] // 8)


def as_bits(weight: torch.Tensor) -> torch.Tensor:
    """The same memory as integers: exact for -0.0 and under flush-to-zero, and where torch copies fp16 through fp32,
    which would set a bit of a signalling NaN."""
    return weight.view(torch.int32 if weight.element_size() == 4 else torch.int16)


def look_up(table: Callable[[torch.device], torch.Tensor], index: torch.Tensor) -> torch.Tensor:
    """uint8 of any shape -> the entries of a cached table of bytes (256,), same shape."""
    return _table_for(table, index).index_select(0, index.reshape(-1).to(torch.int32)).view(index.shape)


def unpack_bits(index: torch.Tensor) -> torch.Tensor:
    """uint8 (..., K / 8) -> bool (..., K)."""
    words = _table_for(_bool_words, index).index_select(0, index.reshape(-1).to(torch.int32))
    return words.view(torch.bool).view(*index.shape[:-1], index.shape[-1] * 8)


def count_kept(index: torch.Tensor, m: int) -> torch.Tensor:
    """uint8 (rows, K / 8) -> uint8 (rows, K / m): the bits set in each group."""
    counts = _table_for(_counts, index, m).index_select(0, index.reshape(-1).to(torch.int32)).view(torch.uint8)
    groups = index.shape[1] * 8 // m
    return counts.view(index.shape[0], groups, max(1, m // 8)).sum(-1, dtype=torch.uint8)


def row_blocks(rows: int, columns: int, device: torch.device) -> Iterator[slice]:
    """Slices of rows that bound the temporaries of what is done with them."""
    step = max(1, (_BLOCK_CPU if device.type == "cpu" else _BLOCK_GPU) // max(columns, 1))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _places(index: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """int64 (rows * K * n / m,): the position in (rows * K,) of every kept weight, m = 4 or 8."""
    places = _table_for(_columns, index, n, m).index_select(0, index.reshape(-1).to(torch.int32))
    places += torch.arange(0, index.numel() * 8, 8, device=index.device).unsqueeze(1)
    return places.view(-1)


def encode_rows(weight: torch.Tensor, index: torch.Tensor, n: int, m: int, out: torch.Tensor) -> None:
    """Write the weights that index keeps.

    Args:
        weight: (N, K), any strides.
        index: (N, K / 8) uint8, exactly n bits in every group.
        n: weights kept in each group.
        m: columns in a group.
        out: contiguous (N, K * n / m), dtype of weight.
    """
    N, K = weight.shape
    weight, out = as_bits(weight), as_bits(out)
    for rows in row_blocks(N, K, weight.device):
        if m <= 8:
            places = _places(index[rows], n, m)
            torch.index_select(weight[rows].reshape(-1), 0, places, out=out[rows].view(-1))
        else:
            torch.masked_select(weight[rows], unpack_bits(index[rows]), out=out[rows].view(-1))


def decode_rows(values: torch.Tensor, index: torch.Tensor, n: int, m: int, out: torch.Tensor) -> None:
    """Write the dense weight: kept weights bit for bit, +0.0 elsewhere.

    Args:
        values: (N, K * n / m), last dim contiguous.
        index: (N, K / 8) uint8, exactly n bits in every group.
        n: weights kept in each group.
        m: columns in a group.
        out: contiguous (N, K), dtype of values.
    """
    N, K = out.shape
    if not K:
        # a view as wider words asks where the storage begins, also for rows of no columns
        return
    if unpack_rows(values, index, n, m, out):
        return
    values, out = as_bits(values), as_bits(out)
    for rows in row_blocks(N, K, out.device):
        if (n, m) == (2, 4) and out.element_size() == 2:
            _decode_2_4(values[rows], index[rows], out[rows])
        elif m <= 8:
            out[rows].view(-1).zero_().scatter_(0, _places(index[rows], n, m), values[rows].reshape(-1))
        else:
            out[rows].zero_().masked_scatter_(unpack_bits(index[rows]), values[rows])


def _decode_2_4(values: torch.Tensor, index: torch.Tensor, out: torch.Tensor) -> None:
    even, middle = _table_for(_arrangements, index)
    byte = index.reshape(-1).to(torch.int32)
    pair = values.reshape(-1).view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    word = out.view(-1).view(torch.int64)
    torch.mul(pair, 0x1_0000_0001, out=word)
    word &= torch.view_as_real(even.index_select(0, byte)).view(torch.int64).view(-1)
    pair <<= 16
    pair &= torch.view_as_real(middle.index_select(0, byte)).view(torch.int64).view(-1)
    word |= pair
