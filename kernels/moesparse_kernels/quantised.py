"""Expert weights whose values have 8 or 4 bits, under an n:m mask or dense: how they lie in memory.

Symbols: E experts, N rows (output features), K columns (input features), V = K * n / m kept values of a row (K where
dense). A weight is value * scale, symmetric around 0; a position that is not kept is 0.

    values  8 bits: int8 [E, N, V], the kept values of a row, left to right.
            4 bits: uint8 [E, N, ceil(V / 2)], value + 8 in half a byte, the first of two in the low half.
    scales  bf16, fp16 or fp32 [E, N, ceil(K / group)], or [E, N, 1] where group = 0: one for the whole row. The columns
            group * i .. group * (i + 1) share scale i, whether they are kept or not.
    index   uint8 [E, N, K / 8] as in layout.py's "row" order; None where dense.

Bits a weight, 2:4 and bf16 scales: 8 bits and a scale a row 5; 4 bits in groups of 128 3.125, of 64 3.25, of 32 3.5.
All is contiguous. How it is stored on disk is not said here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .layout import NMWeight, check_columns, check_groups, check_pattern
from .row_order import decode_rows, row_blocks, unpack_bits

__all__ = ["VALUE_BITS", "VALUE_GROUPS", "AnyWeight", "QuantisedWeight"]

VALUE_BITS = (8, 4)
VALUE_GROUPS = (0, 32, 64, 128)
"""Columns that share a scale; 0, all of a row."""

_SCALES = (torch.bfloat16, torch.float16, torch.float32)
_TOP = {8: 127, 4: 7}


def _check_kind(bits: int, group: int) -> None:
    if bits not in VALUE_BITS:
        raise ValueError(f"bits must be one of {VALUE_BITS}, got {bits}")
    if group not in VALUE_GROUPS:
        raise ValueError(f"group must be one of {VALUE_GROUPS} columns, 0 for a whole row, got {group}")


def _groups(K: int, group: int) -> int:
    return -(-K // group) if group else 1


@dataclass(frozen=True, eq=False, repr=False)
class QuantisedWeight:
    """Weights (E, N, K) of 8 or 4 bits.

    Attributes:
        values: the kept values.
        scales: of each group of columns.
        index: which columns are kept, None where all are.
        shape: (E, N, K).
        n: weights kept in each group of the mask; where dense, n = m = 1.
        m: columns in a group of the mask.
        bits: of a value, 8 or 4.
        group: columns that share a scale, 0 for all of a row.
    """

    values: torch.Tensor
    scales: torch.Tensor
    index: torch.Tensor | None
    shape: tuple[int, int, int]
    n: int
    m: int
    bits: int
    group: int

    def __post_init__(self) -> None:
        """Raises: ValueError, a tensor does not fit the rest. What the tensors hold is not read: `validate`."""
        _check_kind(self.bits, self.group)
        E, N, K = self.shape
        if self.index is None and (self.n, self.m) != (1, 1):
            raise ValueError(f"n and m must be 1 where there is no index, got {self.n}:{self.m}")
        if self.index is not None:
            check_pattern(self.n, self.m)
            check_columns(K, self.m)
        values_dtype = torch.int8 if self.bits == 8 else torch.uint8
        wanted: dict[str, tuple[torch.Tensor | None, tuple[torch.dtype, ...], int]] = {
            "values": (self.values, (values_dtype,), -(-self.kept * self.bits // 8)),
            "scales": (self.scales, _SCALES, _groups(K, self.group)),
            "index": (self.index, (torch.uint8,), K // 8),
        }
        for name, (tensor, dtypes, size) in wanted.items():
            if tensor is None:
                continue
            if tuple(tensor.shape) != (E, N, size) or tensor.dtype not in dtypes or not tensor.is_contiguous():
                raise ValueError(
                    f"{name} must be contiguous {' or '.join(map(str, dtypes))} of shape {(E, N, size)}, "
                    f"got {tensor.dtype} of shape {tuple(tensor.shape)} and strides {tensor.stride()}"
                )
            if tensor.device != self.values.device:
                raise ValueError(f"{name} must be on the device of values, {self.values.device}, got {tensor.device}")

    def __repr__(self) -> str:
        pattern = "dense" if self.index is None else f"{self.n}:{self.m}"
        groups = f"groups of {self.group}" if self.group else "a scale a row"
        return (
            f"QuantisedWeight({pattern}, {self.bits} bits, {groups}, shape={self.shape}, device={self.device}, "
            f"nbytes={self.nbytes})"
        )

    @classmethod
    def quantise(
        cls,
        weight: NMWeight | torch.Tensor,
        bits: int = 8,
        group: int = 0,
        scales_dtype: torch.dtype | None = None,
    ) -> QuantisedWeight:
        """Round every kept weight to the nearest value: a scale is the largest magnitude of its group over 127 or 7.

        Memory: the result plus temporaries for a few million weights at a time.

        Args:
            weight: (E, N, K) packed in "row" order, or dense; bf16, fp16 or fp32, finite.
            bits: 8 or 4.
            group: columns that share a scale: 32, 64, 128, or 0 for all of a row.
            scales_dtype: of the scales, to which they are rounded first; None is fp32 for rows and bf16 for groups.

        Raises:
            ValueError: an argument does not fit, or a weight is not finite; the message names the first such row.
        """
        _check_kind(bits, group)
        scales_dtype = scales_dtype or (torch.bfloat16 if group else torch.float32)
        if scales_dtype not in _SCALES:
            raise ValueError(f"scales_dtype must be one of {_SCALES}, got {scales_dtype}")
        packed = weight if isinstance(weight, NMWeight) else None
        if packed is not None and packed.order != "row":
            raise ValueError(f'weight must be in "row" order, got {packed.order!r}; weight.to_order("row") once')
        if len(weight.shape) != 3 or weight.dtype not in _SCALES:
            raise ValueError(
                f"weight must be (E, N, K) of {_SCALES}, got {weight.dtype} of shape {tuple(weight.shape)}"
            )
        E, N, K = weight.shape
        n, m, index = (1, 1, None) if packed is None else (packed.n, packed.m, packed.index)
        dense = torch.empty(N, K, dtype=weight.dtype, device=weight.device)
        kept_bytes = -(-(K // m * n) * bits // 8)
        values = dense.new_empty(E, N, kept_bytes, dtype=torch.int8 if bits == 8 else torch.uint8)
        scales = dense.new_empty(E, N, _groups(K, group), dtype=scales_dtype)
        for e in range(E):
            if packed is None:
                dense = weight[e].detach()  # type: ignore[index]
            else:
                packed.unpack_expert(e, out=dense)
            for rows in row_blocks(N, K, dense.device):
                whole, scales[e, rows] = _to_values(dense[rows], bits, group, scales_dtype, e, rows.start)
                if packed is not None:
                    whole = whole[unpack_bits(packed.index[e, rows])].view(whole.shape[0], -1)
                values[e, rows] = whole if bits == 8 else _join_halves(whole)
        return cls(values, scales, index, (E, N, K), n, m, bits, group)

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def kept(self) -> int:
        """Values of a row."""
        return self.shape[2] // self.m * self.n

    @property
    def nbytes(self) -> int:
        """Bytes of values, scales and index."""
        return self.values.nbytes + self.scales.nbytes + (0 if self.index is None else self.index.nbytes)

    def validate(self) -> QuantisedWeight:
        """Read the index and check that every group of m columns holds exactly n bits; return self.

        Raises:
            ValueError: names the first expert, row and group that does not.
        """
        if self.index is not None:
            for e in range(self.shape[0]):
                check_groups(self.index[e], self.n, self.m, e, 0, "index")
        return self

    def whole_values(self, expert: int) -> torch.Tensor:
        """int16 (N, K): the values of one expert, 0 where none is kept."""
        _, N, K = self.shape
        values = self.values[expert]
        whole = values.to(torch.int16) if self.bits == 8 else _split_halves(values)[:, : self.kept].contiguous()
        if self.index is None:
            return whole
        dense = torch.empty(N, K, dtype=torch.int16, device=self.device)
        decode_rows(whole, self.index[expert], self.n, self.m, dense)
        return dense

    def unpack_expert(self, expert: int, out: torch.Tensor | None = None) -> torch.Tensor:
        """The dense weight (N, K) of one expert: value * scale in fp32, rounded once to the dtype of out.

        Args:
            expert: 0 <= expert < E.
            out: written and returned when given: (N, K), any float dtype; None makes one of fp32.
        """
        E, N, K = self.shape
        if not 0 <= expert < E:
            raise ValueError(f"expert must lie in 0..{E - 1}, got {expert}")
        if out is None:
            out = torch.empty(N, K, dtype=torch.float32, device=self.device)
        elif tuple(out.shape) != (N, K):
            raise ValueError(f"out must be of shape {(N, K)}, got {tuple(out.shape)}")
        scales = self.scales[expert].float()
        if self.group:
            scales = scales.repeat_interleave(self.group, dim=1)[:, :K]
        return out.copy_(self.whole_values(expert) * scales)

    def unpack(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The dense weight (E, N, K): value * scale in fp32, rounded once to dtype."""
        dense = torch.empty(self.shape, dtype=dtype, device=self.device)
        for e in range(self.shape[0]):
            self.unpack_expert(e, out=dense[e])
        return dense


AnyWeight = NMWeight | QuantisedWeight | torch.Tensor
"""Expert weights (E, N, K) as an expert layer takes them."""


def _to_values(
    dense: torch.Tensor, bits: int, group: int, scales_dtype: torch.dtype, expert: int, first_row: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, K) -> int16 values (rows, K) and scales (rows, groups)."""
    rows, K = dense.shape
    count = _groups(K, group)
    width = group or K
    weight = torch.nn.functional.pad(dense.float(), (0, count * width - K)).view(rows, count, width)
    largest = weight.abs().amax(-1) if width else weight.new_zeros(rows, count)
    if not bool(largest.isfinite().all()):
        row = int((~largest.isfinite()).any(-1).nonzero()[0])
        raise ValueError(
            f"weight must be finite to be quantised, got NaN or infinity in expert {expert}, row {first_row + row}"
        )
    top = _TOP[bits]
    scales = (largest / top).to(scales_dtype)
    if not bool(scales.isfinite().all()):
        raise ValueError(
            f"scales_dtype must hold the scales of the weight, got {scales_dtype} for {largest.max() / top}"
        )
    # a group without a scale has zeros alone
    divisor = scales.float().where(scales > 0, torch.inf).unsqueeze(-1)
    values = (weight / divisor).round_().clamp_(-top, top).to(torch.int16)
    return values.view(rows, -1)[:, :K], scales


def _join_halves(values: torch.Tensor) -> torch.Tensor:
    """Values -8..7 (rows, V) -> uint8 (rows, ceil(V / 2)), value + 8 in half a byte; a half without one holds 8."""
    pairs = torch.nn.functional.pad(values + 8, (0, values.shape[1] % 2), value=8).view(values.shape[0], -1, 2)
    return (pairs[..., 0] | pairs[..., 1] << 4).to(torch.uint8)


def _split_halves(values: torch.Tensor) -> torch.Tensor:
    """uint8 (rows, bytes) -> int16 (rows, 2 * bytes), what `_join_halves` joined."""
    return torch.stack([values & 15, values >> 4], dim=-1).to(torch.int16).flatten(1) - 8
