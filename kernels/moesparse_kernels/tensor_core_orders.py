"""2:4 weights of 16 bits in the orders of tensor cores (layout.py): one expert from "row" order and back, bit for bit.

A metadata nibble of "mma_sp" names the columns that a group keeps, lower one first: first + 4 * second. A group that
keeps columns 0 and 2 has the bitmask 0b0101 in "row" order and the nibble 0 + 4 * 2 = 8 here. There are six of each, so
that a byte of index becomes a byte of metadata by one table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import combinations

import torch

from .row_order import as_bits, look_up

__all__ = ["ORDERS", "TILE", "TensorCoreOrder", "padded"]

# N and K are padded to its multiples, in both orders
TILE = 128


def padded(size: int) -> int:
    return -(-size // TILE) * TILE


@dataclass(frozen=True)
class TensorCoreOrder:
    """An order of int32 tensors with a tile of 128 x 128.

    Attributes:
        shapes: from padded N and K to the shapes of one expert's values and index.
        from_rows: from padded values (N, K / 2) and index (N, K / 8) to int32 tensors of these shapes.
        to_rows: the inverse, values as int16.
        rows: of the dense weight in one entry of the first axis.
        columns: of the dense weight in one entry of the second axis, of values and of index.
    """

    shapes: Callable[[int, int], tuple[tuple[int, ...], tuple[int, ...]]]
    from_rows: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    to_rows: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    rows: int
    columns: tuple[int, int]

    def pack(self, values: torch.Tensor, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """One 2:4 expert, values (N, K / 2) and index (N, K / 8) -> its int32 tensors, padded."""
        N, K = values.shape[0], values.shape[1] * 2
        if (padded(N), padded(K)) != (N, K):
            padded_values = values.new_zeros(padded(N), padded(K) // 2)
            padded_values[:N, : K // 2] = values
            # 0b0011 twice: a padding group keeps its first two (zero) columns
            padded_index = index.new_full((padded(N), padded(K) // 8), 0x33)
            padded_index[:N, : K // 8] = index
            values, index = padded_values, padded_index
        return self.from_rows(as_bits(values), index)

    def unpack(
        self, values: torch.Tensor, index: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The inverse of `pack`, padding included; an index that names no two columns becomes zero bits."""
        row_values, row_index = self.to_rows(values, index)
        return row_values.view(dtype), row_index


def _fragment_shapes(N: int, K: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return (N // 128, K // 64, 4, 4, 32, 4), (N // 128, K // 128, 4, 32, 4)


def _fragment_from_rows(values: torch.Tensor, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    N, K = values.shape[0], values.shape[1] * 2
    halves = values.view(N // 128, 4, 4, 8, K // 64, 2, 4, 2, 2)  # tile w r g kt p2 q b v
    words = halves.permute(0, 4, 2, 1, 3, 6, 5, 8, 7).contiguous().view(torch.int32)  # tile kt r w g q p2 v (b)
    nibbles = torch.stack([index & 15, index >> 4], dim=-1)
    nibbles = nibbles.view(N // 128, 4, 4, 8, K // 128, 2, 2, 4, 2)  # tile w r g kb kt p2 q b
    nibbles = nibbles.permute(0, 4, 1, 3, 7, 2, 8, 5, 6)  # tile kb w g q r b kt p2
    lanes = (nibbles[..., 0] | (nibbles[..., 1] << 4)).flatten(-2).contiguous().view(torch.int32)
    values_shape, index_shape = _fragment_shapes(N, K)
    return words.view(values_shape), lanes.view(index_shape)


def _fragment_to_rows(values: torch.Tensor, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    N, K = values.shape[0] * 128, values.shape[1] * 64
    halves = values.view(torch.int16).view(N // 128, K // 64, 4, 4, 8, 4, 2, 2, 2)
    halves = halves.permute(0, 3, 2, 4, 1, 6, 5, 8, 7)  # tile w r g kt p2 q b v
    pairs = index.view(torch.uint8).view(N // 128, K // 128, 4, 8, 4, 4, 2, 2)  # tile kb w g q r b kt
    nibbles = torch.stack([pairs & 15, pairs >> 4], dim=-1)
    nibbles = nibbles.permute(0, 2, 5, 3, 1, 7, 8, 4, 6)  # tile w r g kb kt p2 q b
    row_index = nibbles[..., 0] | (nibbles[..., 1] << 4)
    return halves.reshape(N, K // 2), row_index.reshape(N, K // 8)


# metadata of each bitmask, 0 (which is none) of a bitmask without exactly two bits; and back
_METADATA = [0] * 16
_BITMASK = [0] * 16
for _first, _second in combinations(range(4), 2):
    _METADATA[1 << _first | 1 << _second] = _first | _second << 2
    _BITMASK[_first | _second << 2] = 1 << _first | 1 << _second


def _of_bytes(nibbles: list[int], device: torch.device) -> torch.Tensor:
    return torch.tensor(
        [nibbles[byte & 15] | nibbles[byte >> 4] << 4 for byte in range(256)], dtype=torch.uint8, device=device
    )


@cache
def _metadata_bytes(device: torch.device) -> torch.Tensor:
    """uint8 (256,): two groups' metadata of two groups' bitmasks."""
    return _of_bytes(_METADATA, device)


@cache
def _bitmask_bytes(device: torch.device) -> torch.Tensor:
    return _of_bytes(_BITMASK, device)


def _mma_sp_shapes(N: int, K: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return (N // 64, K // 128, 4, 4, 32, 4), (N // 64, K // 128, 4, 32, 2)


def _mma_sp_from_rows(values: torch.Tensor, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    N, K = values.shape[0], values.shape[1] * 2
    words = values.view(torch.int32).view(N // 64, 4, 2, 8, K // 128, 4, 2, 4)  # unit w half g kb kt hi q
    words = words.permute(0, 4, 5, 1, 3, 7, 6, 2).contiguous()  # unit kb kt w g q hi half
    metadata = look_up(_metadata_bytes, index).view(N // 64, 4, 2, 8, K // 128, 2, 4, 2)  # unit w half g kb s q b
    lanes = metadata.permute(0, 4, 1, 3, 6, 5, 2, 7).contiguous()  # unit kb w g q s half b
    values_shape, index_shape = _mma_sp_shapes(N, K)
    return words.view(values_shape), lanes.view(-1).view(torch.int32).view(index_shape)


def _mma_sp_to_rows(values: torch.Tensor, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    N, K = values.shape[0] * 64, values.shape[1] * 128
    words = values.view(N // 64, K // 128, 4, 4, 8, 4, 2, 2).permute(0, 3, 7, 4, 1, 2, 6, 5)  # unit w half g kb kt hi q
    lanes = index.view(torch.uint8).view(N // 64, K // 128, 4, 8, 4, 2, 2, 2)  # unit kb w g q s half b
    bitmasks = look_up(_bitmask_bytes, lanes.permute(0, 2, 6, 3, 1, 5, 4, 7))  # unit w half g kb s q b
    return words.reshape(N, K // 4).view(torch.int16), bitmasks.view(N, K // 8)


ORDERS = {
    "fragment": TensorCoreOrder(_fragment_shapes, _fragment_from_rows, _fragment_to_rows, rows=128, columns=(64, 128)),
    "mma_sp": TensorCoreOrder(_mma_sp_shapes, _mma_sp_from_rows, _mma_sp_to_rows, rows=64, columns=(128, 128)),
}
