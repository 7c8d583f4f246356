"""Formats of values: what the weights that stay are rounded to, in how many bits, and back.

| format | a code | scale, and for how many weights | source |
|---|---|---|---|
| bf16 | bfloat16 | none | |
| fp8 | E4M3 (arXiv 2209.05433) | bfloat16, for a row | |
| fp8:128x128 | E4M3 | bfloat16, for a block of 128 rows and columns | arXiv 2412.19437, 3.3 |
| int8, int8:32 (:64, :128) | 8 bits | bfloat16, for a row; for a group of a row | |
| int4:32 (:64, :128), int3:, int2: | 4, 3, 2 bits | bfloat16, for a group of a row | |
| int4:32:zero and so on | the same less a zero point of that many bits | the same | |
| mxfp4 | E2M1 | E8M0, a power of two, for 32 of a row | OCP Microscaling Formats 1.0, 2023 |
| nvfp4 | E2M1 | E4M3, for 16 of a row, and a float32 for the matrix | NVIDIA, arXiv 2509.25149 |

A value is its code, less a zero point, times its scale, in float32. Symmetric integers of b bits reach from -2^(b-1) to
2^(b-1) - 1; a scale may be negative, which turns that around. Zero is exact in every format. Codes are those of
`moesparse.weights.codes`, which checkpoints are read and written by too.

Under an n:m mask the kept values have codes, groups are of the columns before pruning, and one bit a weight says where.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moesparse.errors import UsageError
from moesparse.weights.codes import (
    FP4_VALUES,
    FP8_MAX,
    nearest_fp4,
    nearest_fp8,
    nearest_integers,
    of_fp4,
    of_fp8,
    reduced,
    scales_of,
    spread,
)
from moesparse.weights.patterns import Pattern

__all__ = ["GROUPS", "Quantised", "Scales", "ValueFormat"]

GROUPS = (32, 64, 128)
_WANTED = (
    "bf16, fp8, fp8:128x128, int8, int8:GROUP, int4:GROUP, int3:GROUP, int2:GROUP, the last three also with :zero, "
    f"mxfp4 or nvfp4, GROUP one of {', '.join(map(str, GROUPS))}"
)
_E8M0_BIAS = 127


@dataclass(frozen=True, eq=False)
class Scales:
    """What codes are multiplied by.

    Attributes:
        stored: [..., row blocks, column blocks] in the format's `scale_dtype`.
        zero: uint8, the same shape, zero points; None where codes of integers are symmetric, and for floats.
        whole: [..., 1, 1] float32 of nvfp4: a scale is what is stored over this. None elsewhere.
    """

    stored: Tensor
    zero: Tensor | None = None
    whole: Tensor | None = None

    @property
    def values(self) -> Tensor:
        """float32, the scales themselves."""
        found = scales_of(self.stored)
        return found if self.whole is None else found / self.whole

    def to_bytes(self) -> Tensor:
        """uint8 [..., bytes of a matrix], a copy: what is stored, then zero points, then what there is one of."""
        parts = [self.stored.flatten(-2).contiguous().view(torch.uint8)]
        parts += [] if self.zero is None else [self.zero.flatten(-2)]
        parts += [] if self.whole is None else [self.whole.flatten(-2).contiguous().view(torch.uint8)]
        return torch.cat(parts, dim=-1)


@dataclass(frozen=True, eq=False)
class Quantised:
    """Weights [..., out, in] as codes.

    Attributes:
        format: of the values.
        codes: uint8, or bfloat16 for bf16, the shape of the weights.
        scales: None for bf16.
    """

    format: ValueFormat
    codes: Tensor
    scales: Scales | None

    def __getitem__(self, experts: int | slice) -> Quantised:
        """Of some of the first dim, as views."""
        scales = self.scales
        if scales is not None:
            found = (None if each is None else each[experts] for each in (scales.zero, scales.whole))
            scales = Scales(scales.stored[experts], *found)
        return Quantised(self.format, self.codes[experts], scales)

    def dequantise(self) -> Tensor:
        """float32 of the weights' shape."""
        return self.format.values(self.codes, self.scales)


@dataclass(frozen=True)
class ValueFormat:
    """One row of the table above; `ValueFormat.parse("int4:64")`.

    Attributes:
        name: as `parse` takes it.
        kind: "bf16", "fp8", "int", "mxfp4" or "nvfp4".
        bits: of a code.
        rows, columns: that share a scale; None is all columns of a row.
        zero_point: groups have one.
    """

    name: str
    kind: str
    bits: int
    rows: int = 1
    columns: int | None = None
    zero_point: bool = False

    @classmethod
    def parse(cls, text: str | ValueFormat) -> ValueFormat:
        """Read a format; `ValueFormat.parse(str(format)) == format`.

        Raises:
            UsageError: it is none; lists those there are.
        """
        if isinstance(text, cls):
            return text
        name = text.strip() if isinstance(text, str) else ""
        if name in _NAMED:
            return _NAMED[name]
        found = re.fullmatch(r"int([8432]):(\d+)(:zero)?", name)
        if found and int(found[2]) in GROUPS and not (found[1] == "8" and found[3]):
            return cls(name, "int", int(found[1]), 1, int(found[2]), bool(found[3]))
        raise UsageError(f"values must be {_WANTED}, got {text!r}")

    def __str__(self) -> str:
        return self.name

    @property
    def scale_dtype(self) -> torch.dtype | None:
        """In which scales are stored; None without."""
        if self.kind == "bf16":
            return None
        found = {"mxfp4": torch.float8_e8m0fnu, "nvfp4": torch.float8_e4m3fn}
        return found.get(self.kind, torch.bfloat16)

    def check_matrix(self, name: str, in_features: int) -> None:
        """Refuse a matrix whose rows are no whole groups; the last blocks of fp8:128x128 may be cut off.

        Raises:
            UsageError: names the tensor.
        """
        if self.rows == 1 and self.columns is not None and in_features % self.columns:
            raise UsageError(
                f"{name}: in_features must be a multiple of {self.columns} for values {self.name}, got {in_features}"
            )

    def scales_from(self, data: Tensor, shape: Sequence[int]) -> Scales:
        """The way back of `Scales.to_bytes`.

        Args:
            data: of some matrices.
            shape: [..., out, in] of any of these matrices.
        """
        assert self.scale_dtype is not None
        outer = data.shape[:-1]
        each = (*outer, -(-shape[-2] // self.rows), -(-shape[-1] // (self.columns or shape[-1])))
        sizes = [math.prod(each[-2:]) * self.scale_dtype.itemsize, math.prod(each[-2:]) * self.zero_point]
        # copies, because a view of another dtype must begin at a whole number
        stored, zero, whole = (part.flatten().clone() for part in data.tensor_split([sizes[0], sum(sizes)], dim=-1))
        return Scales(
            stored.view(self.scale_dtype).view(each),
            zero.view(each) if self.zero_point else None,
            whole.view(torch.float32).view(*outer, 1, 1) if self.kind == "nvfp4" else None,
        )

    def scale_bytes(self, shape: Sequence[int]) -> int:
        """Of the scales and zero points of one matrix [..., out, in], as `Scales.to_bytes` has them."""
        if self.scale_dtype is None:
            return 0
        count = -(-shape[-2] // self.rows) * -(-shape[-1] // (self.columns or shape[-1]))
        return count * (self.scale_dtype.itemsize + self.zero_point) + 4 * (self.kind == "nvfp4")

    def bytes_of(self, shape: Sequence[int], pattern: Pattern | None = None) -> int:
        """Exact bytes of weights [..., out, in]: codes, scales and zero points, and of a mask one bit a weight.

        Args:
            shape: of the weights, dense.
            pattern: n:m keeps n / m of the codes; a ratio has no packed format, and its zeros have codes.
        """
        *outer, out, size = shape
        matrices, weights = math.prod(outer), math.prod(shape)
        kept, mask = weights, 0
        if pattern is not None and pattern.group is not None:
            kept, mask = weights * pattern.group[0] // pattern.group[1], -(-weights // 8)
        found = -(-kept * self.bits // 8) + mask
        if self.scale_dtype is None:
            return found
        scales = matrices * -(-out // self.rows) * -(-size // (self.columns or size))
        found += scales * self.scale_dtype.itemsize
        found += -(-scales * self.bits // 8) * self.zero_point
        return found + 4 * matrices * (self.kind == "nvfp4")

    def bits_of(self, shape: Sequence[int], pattern: Pattern | None = None) -> float:
        """Bits a weight, of all weights of the dense shape; see `bytes_of`."""
        return 8 * self.bytes_of(shape, pattern) / math.prod(shape)

    def extent(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The smallest weight and zero, the largest and zero, of those that share a scale: float32."""
        size = self.rows, self.columns or weight.shape[-1]
        return reduced(weight.float().clamp(max=0), size, "amin"), reduced(weight.float().clamp(min=0), size, "amax")

    def whole(self, weight: Tensor) -> Tensor | None:
        """[..., 1, 1] float32 of nvfp4: the largest weight of the matrix is the largest code at the largest scale."""
        if self.kind != "nvfp4":
            return None
        largest = weight.abs().amax((-2, -1), keepdim=True).float()
        found = FP8_MAX * max(FP4_VALUES) / largest
        return torch.where(found.isfinite(), found, 1.0)

    def scales(self, low: Tensor, high: Tensor, reach: float = 1.0, whole: Tensor | None = None) -> Scales | None:
        """Scales whose codes reach from the smallest to the largest weight, or to a share of that.

        Those of symmetric integers are 2 max / (2^b - 1), as in compressed-tensors; a power of two of mxfp4 is the one
        under which the largest weight lies from 3.5 to 7 (the largest code is 6).

        Args:
            low, high: of `extent`.
            reach: what they are multiplied by; a negative one gives symmetric integers a negative scale.
            whole: of nvfp4.
        """
        largest = torch.maximum(-low, high) * reach
        if self.kind == "bf16":
            return None
        if self.kind == "mxfp4":
            mantissa, exponent = largest.frexp()
            # E2M1 reaches up to the exponent 2
            power = exponent - 3 + (mantissa >= 0.875) + _E8M0_BIAS
            power = torch.where(largest > 0, power, _E8M0_BIAS).clamp(0, 254)
            return Scales(power.to(torch.uint8).view(torch.float8_e8m0fnu))
        steps = 2**self.bits - 1
        if self.zero_point:
            stored = _stored((high - low) * reach / steps, torch.bfloat16)
            zero = (-low * reach / stored.float()).round().clamp(0, steps)
            return Scales(stored, zero.to(torch.uint8))
        if self.kind == "int":
            return Scales(_stored(largest * 2 / steps, torch.bfloat16))
        if self.kind == "fp8":
            return Scales(_stored(largest / FP8_MAX, torch.bfloat16))
        assert whole is not None
        wanted = (largest / max(FP4_VALUES) * whole).clamp(max=FP8_MAX)
        return Scales(_stored(wanted, torch.float8_e4m3fn), whole=whole)

    def nearest(self, weight: Tensor, scales: Scales | None) -> Tensor:
        """The nearest codes of float32 weights [..., out, in]; zero has the code of zero."""
        if scales is None:
            return weight.bfloat16()
        scale, zero = self.spread(scales, weight.shape)
        return self.nearest_units(weight / scale, zero)

    def values(self, codes: Tensor, scales: Scales | None) -> Tensor:
        """What codes stand for: float32, and every zero is the positive one."""
        if scales is None:
            return codes.float().add_(0.0)
        scale, zero = self.spread(scales, codes.shape)
        return self.units(codes, zero).mul_(scale).add_(0.0)

    def spread(self, scales: Scales, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(float32 scale, float32 zero point) of every weight; the second is one number where codes are symmetric."""
        zero = self.zeros(scales)
        return self._spread(scales.values, shape), zero if zero.ndim == 0 else self._spread(zero, shape)

    def zeros(self, scales: Scales) -> Tensor:
        """float32 zero points, the shape of the scales, or one number where codes are symmetric."""
        if scales.zero is None:
            return torch.tensor(float(2 ** (self.bits - 1)), device=scales.stored.device)
        return scales.zero.float()

    def by_rows(self, each: Tensor, rows: int) -> Tensor:
        """What there is one of for each scale, for every one of some rows: [..., rows, column blocks]."""
        return each if self.rows == 1 else spread(each, self.rows, rows, -2)

    def _spread(self, each: Tensor, shape: Sequence[int]) -> Tensor:
        return spread(self.by_rows(each, shape[-2]), self.columns or shape[-1], shape[-1], -1)

    def nearest_units(self, units: Tensor, zero: Tensor) -> Tensor:
        """Codes of weights over their scale, float32 of any shape."""
        if self.kind == "int":
            return nearest_integers(units, zero, self.bits)
        return nearest_fp8(units) if self.kind == "fp8" else nearest_fp4(units)

    def rounded_(self, units: Tensor, zero: Tensor) -> Tensor:
        """`units` of `nearest_units`, in place where that is fewer passes."""
        if self.kind != "int":
            return self.units(self.nearest_units(units, zero), zero)
        top = 2**self.bits - 1
        if zero.ndim == 0:
            return units.round_().clamp_(-(top + 1) // 2, top // 2)
        return units.round_().add_(zero).clamp_(0, top).sub_(zero)

    def units(self, codes: Tensor, zero: Tensor) -> Tensor:
        """The way back: float32, values over their scale."""
        if self.kind == "int":
            return codes.float().sub_(zero)
        return of_fp8(codes) if self.kind == "fp8" else of_fp4(codes)

    def quantise(self, weight: Tensor, scales: Scales | None = None) -> Quantised:
        """Weights [..., out, in] rounded to the nearest codes.

        Args:
            weight: any float dtype, finite.
            scales: under which; None makes those that reach from the smallest to the largest weight.

        Raises:
            UsageError: rows that are no whole groups.
        """
        self.check_matrix("weight", weight.shape[-1])
        if scales is None:
            scales = self.scales(*self.extent(weight), whole=self.whole(weight))
        return Quantised(self, self.nearest(weight.float(), scales), scales)


def _stored(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """A scale as it is stored; 1 where that would be zero, for weights that are all zero or next to it."""
    return torch.where(scale.to(dtype).float() == 0, 1.0, scale).to(dtype)


_NAMED = {
    "bf16": ValueFormat("bf16", "bf16", 16),
    "fp8": ValueFormat("fp8", "fp8", 8),
    "fp8:128x128": ValueFormat("fp8:128x128", "fp8", 8, 128, 128),
    "int8": ValueFormat("int8", "int", 8),
    "mxfp4": ValueFormat("mxfp4", "mxfp4", 4, 1, 32),
    "nvfp4": ValueFormat("nvfp4", "nvfp4", 4, 1, 16),
}
