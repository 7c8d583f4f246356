"""What codes of 4 and 8 bits stand for, and how they lie in bytes and words."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = [
    "FP4_VALUES",
    "FP8_MAX",
    "nearest_fp4",
    "nearest_fp8",
    "nearest_integers",
    "of_fp4",
    "of_fp8",
    "pack_nibbles",
    "pack_words",
    "reduced",
    "scales_near",
    "scales_of",
    "spread",
    "unpack_nibbles",
    "unpack_words",
    "where_stored",
]

FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""Of the codes 0 to 15: E2M1, the top bit is the sign (OCP Microscaling Formats 1.0, 2023)."""

# halfway between one value and the next; of two equally near the one with the even code is taken
_FP4_BOUNDS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)

FP8_MAX = torch.finfo(torch.float8_e4m3fn).max


def nearest_fp4(values: Tensor) -> Tensor:
    """float32 -> uint8 codes 0 to 15 of the nearest E2M1 numbers, those beyond 6 of 6; a zero keeps its sign."""
    bounds = torch.tensor(_FP4_BOUNDS, device=values.device)
    size = values.abs().contiguous()
    code = torch.bucketize(size, bounds)
    code += (code % 2 == 1) & (size == bounds[code.clamp(max=len(bounds) - 1)])
    return (code + values.signbit() * 8).to(torch.uint8)


def of_fp4(codes: Tensor) -> Tensor:
    """The way back: uint8 -> float32 of the same shape."""
    table = torch.tensor(FP4_VALUES, device=codes.device)
    # indexing with a tensor takes twice the time of index_select
    return table.index_select(0, codes.flatten().int()).view(codes.shape)


def nearest_fp8(values: Tensor) -> Tensor:
    """float32 -> uint8, the bytes of the nearest E4M3 numbers, those beyond 448 of 448."""
    return values.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).view(torch.uint8)


def of_fp8(codes: Tensor) -> Tensor:
    """The way back: uint8 -> float32."""
    return codes.view(torch.float8_e4m3fn).float()


def nearest_integers(values: Tensor, zero: Tensor, bits: int) -> Tensor:
    """float32 -> uint8, the nearest integers and a zero point, those beyond 0 and 2^bits - 1 of these; ties to even.

    The way back is the code less the zero point.
    """
    return (values.round() + zero).clamp_(0, 2**bits - 1).to(torch.uint8)


def unpack_nibbles(data: Tensor) -> Tensor:
    """Bytes (..., K / 2) -> uint8 codes (..., K); the lower half of a byte comes first."""
    data = data.view(torch.uint8)
    return torch.stack((data & 15, data >> 4), dim=-1).flatten(-2)


def pack_nibbles(codes: Tensor, bits: int = 4) -> Tensor:
    """The way back: uint8 codes (..., K) -> bytes (..., K / 2), the second of two `bits` higher."""
    return codes[..., 0::2] | codes[..., 1::2] << bits


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """int32 (..., W) -> uint8 codes (..., W * 32 // bits), the lowest bits of a word first; those of 3 cross words.

    Args:
        words: as safetensors holds them, little-endian.
        bits: 2, 3, 4 or 8.
    """
    data = words.contiguous().view(torch.uint8)
    if bits in (4, 8):
        return unpack_nibbles(data) if bits == 4 else data
    each = (data[..., None] >> torch.arange(8, dtype=torch.uint8, device=data.device) & 1).flatten(-2)
    count = each.shape[-1] // bits
    values = torch.tensor([1, 2, 4][:bits], dtype=torch.uint8, device=data.device)
    return (each[..., : count * bits].unflatten(-1, (count, bits)) * values).sum(-1, dtype=torch.uint8)


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """The way back: uint8 codes (..., K) -> int32 (..., ceil(K * bits / 32)), filled up with zeros."""
    size = -(-codes.shape[-1] * bits // 32) * 4
    codes = pad(codes, (0, -codes.shape[-1] % 32))
    if bits == 8:
        data = codes
    elif bits == 3:
        # eight codes are three bytes
        words = (codes.unflatten(-1, (-1, 8)).int() << torch.arange(0, 24, 3, device=codes.device)).sum(-1)
        data = torch.stack([words & 255, words >> 8 & 255, words >> 16], dim=-1).to(torch.uint8).flatten(-2)
    else:
        data = codes if bits == 4 else pack_nibbles(codes, 2)
        data = pack_nibbles(data)
    # flat, because a dim of one may have a stride that is no whole word
    return data[..., :size].reshape(-1).view(torch.int32).view(*codes.shape[:-1], size // 4)


def scales_of(stored: Tensor) -> Tensor:
    """Scales in float32, exact; bytes are E8M0: 2 to the power of the byte less 127, and 255 is NaN."""
    if stored.dtype == torch.uint8:
        stored = stored.view(torch.float8_e8m0fnu)
    return stored.float()


def spread(scale: Tensor, size: int, length: int, dim: int) -> Tensor:
    """Every scale for `size` neighbours along a dim, the last one for what is left of `length`."""
    return scale.repeat_interleave(size, dim).narrow(dim, 0, length)


def reduced(matrix: Tensor, size: tuple[int, int], how: str) -> Tensor:
    """The sum, the largest or the smallest of every block of a matrix; the way back of `spread`.

    Args:
        matrix: (..., out, in).
        size: rows and columns of a block. Those that the end of the matrix cuts off are filled up with zeros.
        how: "sum", "amax" or "amin".

    Returns:
        (..., blocks along out, blocks along in).
    """
    (rows, columns), (out, inputs) = size, matrix.shape[-2:]
    whole = pad(matrix, (0, -inputs % columns, 0, -out % rows))
    blocks = whole.unflatten(-1, (-1, columns)).unflatten(-3, (-1, rows))
    return getattr(torch, how)(blocks, (-3, -1))


def scales_near(wanted: Tensor, like: Tensor) -> Iterator[Tensor]:
    """Scales as a checkpoint stores them, near those that are wanted: powers of two on both sides, or the nearest.

    Args:
        wanted: float32, not negative.
        like: stored scales, for their dtype.
    """
    if like.dtype not in (torch.uint8, torch.float8_e8m0fnu):
        yield wanted.clamp(max=torch.finfo(like.dtype).max).to(like.dtype)
        return
    for exponent in (wanted.frexp().exponent - 1, wanted.frexp().exponent):
        # the byte is the exponent and 127; 255 would be NaN
        yield (exponent + 127).clamp(0, 254).to(torch.uint8).view(like.dtype)


def where_stored(first: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """`torch.where` for the bytes of two tensors of any one dtype."""
    dtype, ints = one.dtype, {1: torch.uint8, 2: torch.int16, 4: torch.int32}[one.element_size()]
    return torch.where(first, one.view(ints), other.view(ints)).view(dtype)
