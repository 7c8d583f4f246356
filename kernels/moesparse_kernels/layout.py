"""Packed n:m expert weights: the kept values and one bit per weight that says where they were.

Symbols: E experts, N rows (output features), K columns (input features); a group is m neighbouring columns of one row,
of which n are kept. Three orders of the same content:

"row" (on disk, any n:m)
    values  [E, N, K * n / m], the weight's dtype: the kept weights of a row, left to right.
    index   [E, N, K / 8] uint8: bit k % 8 of byte k // 8 is set when column k is kept (least significant bit first, so
            for m = 4 the low nibble is the even group).
    Bytes: n / m of the dense weight plus one bit per weight; no padding.

"fragment" (on the GPU, 2:4 and 16-bit dtypes)
    The order in which the threads of a tensor-core instruction want their operand: a 16-byte load is one thread's
    words. N and K are padded to multiples of 128 with groups of two explicit zeros. A tile is 128 rows by 128 columns;
    its row is 32 * w + 8 * r + g, its group 16 * kt + 8 * p2 + 2 * q + b, and lane = 4 * g + q.
    values  int32 [E, N/128, K/64, r 4, w 4, lane 32, 4]; the K/64 axis is (tile, kt), the last axis (p2, v): v = 0, 1
            is the group's first and second kept weight; the low half of a word is group b = 0, the high half b = 1.
    index   int32 [E, N/128, K/128, w 4, lane 32, r 4]; bit 16 * b + 4 * p + j is set when column j of group (p, b) is
            kept, p = 2 * kt + p2.
    Bytes: those of "row" at the padded N and K.

"mma_sp" (on NVIDIA GPUs, 2:4 and 16-bit dtypes)
    The order in which mma.sp::ordered_metadata.m16n8k32 wants its sparse operand (PTX ISA, matrix fragments of sparse
    mma.m16n8k32); padded as "fragment". A unit is 64 rows by 128 columns, 9 KB in one piece of each tensor; its row is
    16 * w + 8 * half + g, its group 8 * kt + 4 * hi + q, and lane = 4 * g + q.
    values  int32 [E, N/64, K/128, kt 4, w 4, lane 32, 4]; word 2 * hi + half holds a group's two kept weights, the
            first in the low half. kt is one instruction.
    index   int32 [E, N/64, K/128, w 4, lane 32, s 2]; word s holds the columns 64 * s to 64 * s + 63: the four bits
            from 16 * half + 4 * j on name the kept columns of their group 4 * q + j, first + 4 * second.
            Instruction kt reads word kt / 2 of the lanes q = 2 * (kt % 2) and the next: its selector is kt % 2.
    Bytes: those of "fragment".

Every group holds exactly n bits in every order: a group with fewer non-zeros is filled with explicit zeros. A value is
a bit pattern here: -0.0, subnormals and NaN come back as they went in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from .row_order import as_bits, count_kept, decode_rows, encode_rows, pack_bits, row_blocks, unpack_bits
from .tensor_core_orders import ORDERS, TILE, padded

__all__ = ["GROUP_SIZES", "NMWeight", "order_of"]

GROUP_SIZES = (4, 8, 16, 32)

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def order_of(values: torch.Tensor, index: torch.Tensor) -> str:
    """The order of stored tensors, by their dtype and shape."""
    if values.dtype != torch.int32:
        return "row"
    return "mma_sp" if index.shape[-1] == 2 else "fragment"


def check_pattern(n: int, m: int) -> None:
    if m not in GROUP_SIZES:
        raise ValueError(f"m must be one of {GROUP_SIZES}, got {m}")
    if not 0 < n <= m:
        raise ValueError(f"n must lie in 1..m={m}, got {n}")


def check_columns(K: int, m: int) -> None:
    step = math.lcm(m, 8)
    if K % step:
        raise ValueError(f"K must be a multiple of {step} (whole groups of {m} and whole index bytes), got {K}")


def _first_group(wrong: torch.Tensor) -> tuple[int, int]:
    """Row and group of the first True of a (rows, groups) tensor."""
    row, group = wrong.nonzero()[0].tolist()
    return row, group


def _non_zeros(block: torch.Tensor, n: int, m: int, expert: int, first_row: int) -> torch.Tensor:
    """Index of `block` (rows, K) with n bits per group that hold every non-zero, then -0.0, then +0.0."""
    bits = as_bits(block)
    # the shift drops the sign bit: what is left is zero for -0.0 too
    keep = (bits << 1) != 0
    index = pack_bits(keep)
    count = count_kept(index, m)
    if bool((count > n).any()):
        row, group = _first_group(count > n)
        raise ValueError(
            f"weight must hold at most {n} non-zeros in every group of {m}, got {int(count[row, group])} "
            f"in expert {expert}, row {first_row + row}, group {group}; prune it to {n}:{m} first or pass a mask"
        )
    short = count < n
    if not bool(short.any()):
        return index
    groups = keep.unflatten(-1, (-1, m))
    filled, negative_zero = groups[short], bits.unflatten(-1, (-1, m))[short] != 0
    for candidate in (negative_zero, torch.ones_like(filled)):
        free = n - filled.sum(-1, keepdim=True, dtype=torch.int32)
        spare = candidate & ~filled
        filled |= spare & (spare.cumsum(-1, dtype=torch.int32) <= free)
    groups[short] = filled
    return pack_bits(keep)


def check_groups(index: torch.Tensor, n: int, m: int, expert: int, first_row: int, name: str) -> None:
    count = count_kept(index, m)
    if bool((count != n).any()):
        row, group = _first_group(count != n)
        raise ValueError(
            f"{name} must keep exactly {n} of every {m} columns, got {int(count[row, group])} "
            f"in expert {expert}, row {first_row + row}, group {group}"
        )


@dataclass(frozen=True, eq=False, repr=False)
class NMWeight:
    """An n:m weight of E experts, packed. Immutable; the tensors are contiguous and on one device.

    Make one with `NMWeight.pack`, or from stored tensors with the constructor, which checks shapes and dtypes without
    reading data; `validate` reads the data.

    Attributes:
        values: the kept weights; layout in the module's docstring.
        index: which columns they are; layout in the module's docstring.
        shape: (E, N, K) of the dense weight, N output and K input features, without padding.
        n: weights kept in each group.
        m: columns in a group.
        order: "row", "fragment" or "mma_sp".
        dtype: dtype of the dense weight, torch.bfloat16, torch.float16 or torch.float32.
    """

    values: torch.Tensor
    index: torch.Tensor
    shape: tuple[int, int, int]
    n: int
    m: int
    order: str
    dtype: torch.dtype

    def __post_init__(self) -> None:
        if len(self.shape) != 3:
            raise ValueError(f"shape must be (E, N, K), got {tuple(self.shape)}")
        object.__setattr__(self, "shape", tuple(int(size) for size in self.shape))
        check_pattern(self.n, self.m)
        if self.dtype not in _DTYPES:
            raise ValueError(f"dtype must be one of {_DTYPES}, got {self.dtype}")
        check_columns(self.shape[2], self.m)
        E, N, K = self.shape
        if self.order == "row":
            wanted: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
                "values": (self.dtype, (E, N, K // self.m * self.n)),
                "index": (torch.uint8, (E, N, K // 8)),
            }
        else:
            values_shape, index_shape = self._tensor_core_shapes(self.order)
            wanted = {"values": (torch.int32, values_shape), "index": (torch.int32, index_shape)}
        for name, (dtype, shape) in wanted.items():
            tensor = getattr(self, name)
            if tensor.dtype != dtype or tuple(tensor.shape) != shape:
                raise ValueError(
                    f"{name} must be {dtype} of shape {shape} for a {self.n}:{self.m} weight {self.shape} in "
                    f"{self.order!r} order, got {tensor.dtype} of shape {tuple(tensor.shape)}"
                )
            if not tensor.is_contiguous():
                raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")
        if self.values.device != self.index.device:
            raise ValueError(f"index must be on the device of values, {self.values.device}, got {self.index.device}")

    def _tensor_core_shapes(self, order: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of values and index in an order of ORDERS, which only some weights have."""
        if order not in ORDERS:
            raise ValueError(f'order must be "row", "fragment" or "mma_sp", got {order!r}')
        if (self.n, self.m) != (2, 4):
            raise ValueError(f'order "{order}" must be a 2:4 weight, got {self.n}:{self.m}')
        if self.dtype.itemsize != 2:
            raise ValueError(f'order "{order}" must have a 16-bit dtype, got {self.dtype}')
        E, N, K = self.shape
        values, index = ORDERS[order].shapes(padded(N), padded(K))
        return (E, *values), (E, *index)

    def __repr__(self) -> str:
        return (
            f"NMWeight({self.n}:{self.m}, shape={self.shape}, dtype={self.dtype}, order={self.order!r}, "
            f"device={self.device}, nbytes={self.nbytes})"
        )

    @classmethod
    def pack(cls, weight: torch.Tensor, mask: torch.Tensor | None = None, n: int = 2, m: int = 4) -> NMWeight:
        """Pack a dense weight in "row" order.

        Memory: the packed tensors plus temporaries for a few million weights at a time.

        Args:
            weight: (E, N, K) bf16, fp16 or fp32, any strides, K a multiple of lcm(m, 8).
            mask: (E, N, K) bool, True where a weight is kept, exactly n in every group. None: the non-zeros of
                `weight` are kept; a group with fewer than n is filled with its -0.0 (a value, until the group is full)
                and then with its zeros, lower columns first.
            n: weights kept in each group.
            m: columns in a group: 4, 8, 16 or 32.

        Raises:
            ValueError: shapes or dtypes do not fit, or a group has more than n non-zeros or not exactly n mask bits;
                the message names the first such expert, row and group.
        """
        check_pattern(n, m)
        if weight.dim() != 3:
            raise ValueError(f"weight must be (E, N, K), got shape {tuple(weight.shape)}")
        if weight.dtype not in _DTYPES:
            raise ValueError(f"weight must be one of {_DTYPES}, got {weight.dtype}")
        E, N, K = weight.shape
        check_columns(K, m)
        if mask is not None and (mask.dtype != torch.bool or mask.shape != weight.shape):
            raise ValueError(
                f"mask must be torch.bool of shape {tuple(weight.shape)}, got {mask.dtype} of shape {tuple(mask.shape)}"
            )
        values = weight.new_empty(E, N, K // m * n)
        index = torch.empty(E, N, K // 8, dtype=torch.uint8, device=weight.device)
        for e in range(E):
            for rows in row_blocks(N, K, weight.device):
                block = weight.detach()[e, rows]
                if mask is None:
                    index[e, rows] = _non_zeros(block, n, m, e, rows.start)
                else:
                    index[e, rows] = pack_bits(mask[e, rows])
                    check_groups(index[e, rows], n, m, e, rows.start, "mask")
                encode_rows(block, index[e, rows], n, m, out=values[e, rows])
        return cls(values, index, (E, N, K), n, m, "row", weight.dtype)

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def nbytes(self) -> int:
        """Bytes of values and index, padding included."""
        return self.values.nbytes + self.index.nbytes

    @property
    def dense_nbytes(self) -> int:
        """Bytes of the dense weight."""
        return math.prod(self.shape) * self.dtype.itemsize

    def _expert_rows(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """One expert's values and index in "row" order, padding cut off."""
        if self.order == "row":
            return self.values[expert], self.index[expert]
        _, N, K = self.shape
        values, index = ORDERS[self.order].unpack(self.values[expert], self.index[expert], self.dtype)
        return values[:N, : K // 2], index[:N, : K // 8]

    def unpack_expert(self, expert: int, out: torch.Tensor | None = None) -> torch.Tensor:
        """The dense weight (N, K) of one expert: the masked weight bit for bit, pruned positions +0.0.

        Memory: the result plus temporaries for a few million weights (not in "row" order: plus one packed expert).

        Args:
            expert: 0 <= expert < E.
            out: written and returned when given: contiguous (N, K) of this weight's dtype and device.
        """
        E, N, K = self.shape
        if not 0 <= expert < E:
            raise ValueError(f"expert must lie in 0..{E - 1}, got {expert}")
        if out is None:
            out = torch.empty(N, K, dtype=self.dtype, device=self.device)
        elif tuple(out.shape) != (N, K) or out.dtype != self.dtype or not out.is_contiguous():
            raise ValueError(
                f"out must be contiguous {self.dtype} of shape {(N, K)}, got {out.dtype} of strides {out.stride()} "
                f"and shape {tuple(out.shape)}"
            )
        values, index = self._expert_rows(expert)
        decode_rows(values, index, self.n, self.m, out)
        return out

    def unpack(self) -> torch.Tensor:
        """The dense weight (E, N, K): the masked weight bit for bit, pruned positions +0.0."""
        dense = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        for e in range(self.shape[0]):
            self.unpack_expert(e, out=dense[e])
        return dense

    def mask(self) -> torch.Tensor:
        """bool (E, N, K), True where a weight is stored."""
        return torch.stack([unpack_bits(self._expert_rows(e)[1]) for e in range(self.shape[0])])

    def validate(self) -> NMWeight:
        """Read the index and check that every group, padding included, holds exactly n bits; return self.

        Raises:
            ValueError: names the first expert, row and group that does not.
        """
        for e in range(self.shape[0]):
            if self.order == "row":
                index = self.index[e]
            else:
                _, index = ORDERS[self.order].unpack(self.values[e], self.index[e], self.dtype)
            check_groups(index, self.n, self.m, e, 0, "index")
        return self

    def to_order(self, order: str) -> NMWeight:
        """The same weight in another order, bit for bit; self when it is in that order already.

        Memory: the result plus two packed experts, and the weight in "row" order between two others. "fragment" and
        "mma_sp" pad N and K to multiples of 128.

        Raises:
            ValueError: the weight cannot have that order; or a group without exactly n bits, which "mma_sp" has no
                metadata for: names the first such expert, row and group.
        """
        if order == self.order:
            return self
        if order != "row" and self.order != "row":
            return self.to_order("row").to_order(order)
        E, N, K = self.shape
        if order == "row":
            values = torch.empty(E, N, K // 2, dtype=self.dtype, device=self.device)
            index = torch.empty(E, N, K // 8, dtype=torch.uint8, device=self.device)
            for e in range(E):
                values[e], index[e] = self._expert_rows(e)
        else:
            values_shape, index_shape = self._tensor_core_shapes(order)
            values = self.index.new_empty(values_shape, dtype=torch.int32)
            index = self.index.new_empty(index_shape, dtype=torch.int32)
            for e in range(E):
                if order == "mma_sp":
                    check_groups(self.index[e], 2, 4, e, 0, "index")
                values[e], index[e] = ORDERS[order].pack(self.values[e], self.index[e])
        return replace(self, values=values, index=index, order=order)

    def to(self, device: torch.device | str | None = None, *, order: str | None = None) -> NMWeight:
        """The same weight on another device, in another order, or both (reordered where the result lives)."""
        moved = self
        if device is not None:
            moved = replace(self, values=self.values.to(device), index=self.index.to(device))
        return moved if order is None else moved.to_order(order)

    def rows(self, start: int, stop: int) -> NMWeight:
        """Rows start..stop of every expert: what one rank of a column-parallel layer holds.

        In the orders of tensor cores both ends must be multiples of 128, or stop = N. May share memory with self.
        """
        return self._slice(1, start, stop, step=1)

    def columns(self, start: int, stop: int) -> NMWeight:
        """Columns start..stop, both multiples of lcm(m, 8): what one rank of a row-parallel layer holds.

        In the orders of tensor cores both ends must be multiples of 128, or stop = K. May share memory with self.
        """
        return self._slice(2, start, stop, step=math.lcm(self.m, 8))

    def _slice(self, axis: int, start: int, stop: int, step: int) -> NMWeight:
        size, name = self.shape[axis], ("experts", "rows", "columns")[axis]
        if not 0 <= start < stop <= size:
            raise ValueError(f"{name} must satisfy 0 <= start < stop <= {size}, got {start}..{stop}")
        E, N, K = self.shape
        shape = (E, stop - start, K) if axis == 1 else (E, N, stop - start)
        # rows or columns of the dense weight to one entry (or, in "row" order, n entries) of the sliced axis
        values_times = self.n if self.order == "row" and axis == 2 else 1
        if self.order == "row":
            if start % step or stop % step:
                raise ValueError(f"{name} must start and stop at multiples of {step}, got {start}..{stop}")
            values_per, index_per = (1, 1) if axis == 1 else (self.m, 8)
        else:
            if start % TILE or (stop % TILE and stop != size):
                raise ValueError(
                    f'{name} must start and stop at multiples of {TILE} in "{self.order}" order, '
                    f'got {start}..{stop}; slice to_order("row") instead'
                )
            stop, order = padded(stop), ORDERS[self.order]
            values_per, index_per = (order.rows, order.rows) if axis == 1 else order.columns
        size = stop - start
        values = self.values.narrow(axis, start // values_per * values_times, size // values_per * values_times)
        index = self.index.narrow(axis, start // index_per, size // index_per)
        return replace(self, values=values.contiguous(), index=index.contiguous(), shape=shape)

    def experts(self, index: int | slice | list[int] | torch.Tensor) -> NMWeight:
        """Some of the experts, in the order asked for; an int gives E = 1. May share memory with self."""
        if isinstance(index, int):
            if not 0 <= index < self.shape[0]:
                raise ValueError(f"expert must lie in 0..{self.shape[0] - 1}, got {index}")
            index = slice(index, index + 1)
        values, bits = self.values[index].contiguous(), self.index[index].contiguous()
        return replace(self, values=values, index=bits, shape=(values.shape[0], *self.shape[1:]))

    def equal(self, other: NMWeight) -> bool:
        """Same pattern, shape, order, dtype and stored bits (so NaN equals itself and -0.0 differs from 0.0)."""
        same = ("shape", "n", "m", "order", "dtype")
        return (
            all(getattr(self, name) == getattr(other, name) for name in same)
            and torch.equal(as_bits(self.values), as_bits(other.values))
            and torch.equal(self.index, other.index)
        )
