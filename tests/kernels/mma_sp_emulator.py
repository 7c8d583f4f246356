"""mma.sp.m16n8k32 and ldmatrix lane by lane, as the PTX ISA describes their fragments, in numpy.

PTX ISA, "Matrix fragments for sparse mma.m16n8k32 with .f16 and .bf16 types" and "ldmatrix". A lane is 4 * g + q.
Registers have two halves, low half first: arrays (..., lane 32, register, 2). Leading axes are so many instructions.
"""

from __future__ import annotations

import numpy as np

LANE = np.arange(32)
G, Q = LANE // 4, LANE % 4


def dense_a(a: np.ndarray, metadata: np.ndarray, selector: int) -> np.ndarray:
    """The 16 x 32 operand that the hardware multiplies.

    Args:
        a: (..., 32, 4, 2) values.
        metadata: (..., 32) uint32; only two lanes of every four are read.
        selector: 0: lanes q = 0 and 1, 1: lanes q = 2 and 3.

    Raises:
        ValueError: a metadata nibble that does not name two columns in order, which is undefined behaviour.
    """
    out = np.zeros((*a.shape[:-3], 16, 32))
    for lane in range(32):
        for i in range(8):
            row = G[lane] + (0 if i in (0, 1, 4, 5) else 8)
            first_column = 4 * Q[lane] + (0 if i < 4 else 16)
            # the lane that holds the indices of this chunk of four columns: [row][chunk 0..3] in the first lane of the
            # pair, [row][4..7] in the second; bits 15..0 belong to rows 0..7, bits 31..16 to rows 8..15
            chunk = first_column // 4
            holder = 4 * G[lane] + 2 * selector + chunk // 4
            nibble = metadata[..., holder] >> (16 * (row // 8) + 4 * (chunk % 4)) & 15
            if not (nibble % 4 < nibble // 4).all():
                raise ValueError(f"metadata must name two columns in order, got {nibble} for row {row}, chunk {chunk}")
            column = (first_column + (nibble % 4 if i % 2 == 0 else nibble // 4))[..., None].astype(np.int64)
            np.put_along_axis(out[..., row, :], column, a[..., lane, i // 2, i % 2, None], -1)
    return out


def dense_b(b: np.ndarray) -> np.ndarray:
    """(..., 32, 4, 2) -> (..., 32, 8): b_i of a lane is row 2 q + i % 2 + 8 (i / 2) of column g."""
    out = np.zeros((*b.shape[:-3], 32, 8))
    for i in range(8):
        out[..., 2 * Q + i % 2 + 8 * (i // 2), G] = b[..., LANE, i // 2, i % 2]
    return out


def lanes_c(product: np.ndarray) -> np.ndarray:
    """(..., 16, 8) -> (..., 32, 4): c_i of a lane is row g + 8 (i / 2) of column 2 q + i % 2."""
    return np.stack([product[..., G + 8 * (i // 2), 2 * Q + i % 2] for i in range(4)], axis=-1)


def mma_sp(a: np.ndarray, b: np.ndarray, metadata: np.ndarray, selector: int) -> np.ndarray:
    """The product that is added to c, (..., 32, 4) in float64."""
    return lanes_c(dense_a(a, metadata, selector) @ dense_b(b))


def ldmatrix_x4(shared: np.ndarray, address: np.ndarray) -> np.ndarray:
    """Four 8 x 8 matrices of 16-bit elements.

    Args:
        shared: (elements,) 16-bit elements of shared memory.
        address: (32,) byte address that each lane gives: lanes 8 j to 8 j + 7 the rows of matrix j, of 16 bytes each.

    Returns:
        (32, 4, 2): register j of lane 4 g + q holds elements 2 q and 2 q + 1 of row g of matrix j.
    """
    assert not (address % 16).any(), "a row must start at a multiple of 16 bytes"
    rows = shared[(address // 2)[:, None] + np.arange(8)].reshape(4, 8, 4, 2)
    return rows[:, G, Q].transpose(1, 0, 2)
