"""The order of mma.sp: every bit where the docstring says, and the product that the instruction makes of it.

The instruction is emulated from the PTX manual (mma_sp_emulator.py); that reading is checked against layouts that
NVIDIA's CUTLASS publishes as numbers.
"""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mma_sp_emulator import dense_a, ldmatrix_x4, mma_sp

from moesparse_kernels import NMWeight


def _packed(E, N, K, dtype=torch.bfloat16, seed=0, whole=False):
    """Any bits at all under a random mask, or (`whole`) small whole numbers, whose sums are exact."""
    random = torch.Generator().manual_seed(seed)
    if whole:
        weight = torch.randint(-8, 9, (E, N, K), generator=random).to(dtype)
    else:
        weight = torch.randint(-(2**15), 2**15, (E, N, K), generator=random).to(torch.int16).view(dtype)
    kept = torch.rand(E, N, K // 4, 4, generator=random).argsort(-1)[..., :2]
    mask = torch.zeros(E, N, K // 4, 4, dtype=torch.bool).scatter_(-1, kept, True).view(E, N, K)
    return NMWeight.pack(weight, mask)


def _numbers(words: torch.Tensor, dtype: torch.dtype) -> np.ndarray:
    """int32 (...) -> float64 (..., 2), low half first."""
    return words.view(dtype).double().unflatten(-1, (-1, 2)).numpy()


def test_order_is_as_documented():
    # two units along both axes, so that their order shows
    packed = _packed(1, 128, 256, torch.float16)
    made = packed.to_order("mma_sp")
    halves, mask = packed.values[0].view(torch.int16).numpy().view(np.uint16), packed.mask()[0].numpy()
    values, index = np.zeros((2, 2, 4, 4, 32, 4), np.uint32), np.zeros((2, 2, 4, 32, 2), np.uint32)
    for n, group in itertools.product(range(128), range(64)):
        unit, w, half, g = n // 64, n % 64 // 16, n % 16 // 8, n % 8
        kb, kt, hi, q = group // 32, group % 32 // 8, group % 8 // 4, group % 4
        pair = halves[n, 2 * group : 2 * group + 2].astype(np.uint32)
        values[unit, kb, kt, w, 4 * g + q, 2 * hi + half] = pair[0] | pair[1] << 16
        first, second = np.flatnonzero(mask[n, 4 * group : 4 * group + 4])
        s, q, j = group % 32 // 16, group % 16 // 4, group % 4
        index[unit, kb, w, 4 * g + q, s] |= np.uint32((first + 4 * second) << (16 * half + 4 * j))
    assert np.array_equal(made.values[0].numpy().view(np.uint32), values)
    assert np.array_equal(made.index[0].numpy().view(np.uint32), index)


@st.composite
def _shapes(draw):
    return draw(st.integers(0, 2)), draw(st.integers(1, 140)), 8 * draw(st.integers(1, 40))


@settings(deadline=None, max_examples=25)
@given(_shapes(), st.sampled_from([torch.bfloat16, torch.float16]), st.integers(0, 2**31))
def test_round_trips(shape, dtype, seed):
    packed = _packed(*shape, dtype, seed)
    made = packed.to_order("mma_sp").validate()
    assert made.to_order("row").equal(packed)
    assert made.to_order("fragment").equal(packed.to_order("fragment"))
    assert packed.to_order("fragment").to_order("mma_sp").equal(made)
    padded_n, padded_k = (-(-size // 128) * 128 for size in shape[1:])
    assert made.nbytes == shape[0] * padded_n * padded_k * 9 // 8
    assert torch.equal(made.unpack().view(torch.int16), packed.unpack().view(torch.int16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_instruction_makes_the_product(dtype):
    # more columns than one unit, and sizes that are padded
    N, K, T = 72, 136, 8
    packed = _packed(1, N, K, dtype, whole=True)
    made = packed.to_order("mma_sp")
    random = torch.Generator().manual_seed(1)
    x = torch.zeros(T, 256, dtype=dtype)
    x[:, :K] = torch.randint(-8, 9, (T, K), generator=random).to(dtype)
    units, blocks = made.values.shape[1:3]
    out = np.zeros((units, 4, 32, 4))
    for kb, kt in itertools.product(range(blocks), range(4)):
        # the B operand is ldmatrix of row-major tokens: lane l gives token l % 8, columns 8 (l / 8)
        lane = np.arange(32)
        address = 2 * (lane % 8 * 256 + 128 * kb + 32 * kt + 8 * (lane // 8))
        b = ldmatrix_x4(x.double().flatten().numpy(), address)
        a = _numbers(made.values[0, :, kb, kt], dtype)
        metadata = made.index[0, :, kb, :, :, kt // 2].numpy().view(np.uint32)
        out += mma_sp(a, b, metadata, kt % 2)
    # c of a lane: rows g and g + 8, tokens 2 q and 2 q + 1
    got = out.reshape(units, 4, 8, 4, 2, 2).transpose(0, 1, 4, 2, 3, 5).reshape(units * 64, T).T
    wanted = x[:, :K].double() @ packed.unpack()[0].double().T
    assert np.array_equal(got[:, :N], wanted.numpy())
    assert not got[:, N:].any()


def test_undefined_metadata_is_seen():
    made = _packed(1, 128, 128, whole=True).to_order("mma_sp")
    a, metadata = (
        _numbers(made.values[0, 0, 0, 0], torch.bfloat16),
        made.index[0, 0, 0, :, :, 0].numpy().view(np.uint32),
    )
    dense_a(a, metadata, 0)
    with pytest.raises(ValueError, match="two columns in order"):
        dense_a(a, metadata & ~np.uint32(15), 0)


# ---- published numbers


def _coordinate(i, shape):
    for size in shape:
        yield i % size
        i //= size


def _place(thread, value, layout):
    """Row and column of a CUTLASS layout (thread, value) -> row + 64 * column."""
    (t_shape, t_stride), (v_shape, v_stride) = layout
    coordinates = (*_coordinate(thread, t_shape), *_coordinate(value, v_shape))
    offset = sum(i * stride for i, stride in zip(coordinates, (*t_stride, *v_stride), strict=True))
    return offset % 64, offset // 64


# include/cute/atom/mma_traits_sm90_gmma.hpp ALayout_64x32, mma_traits_sm90_gmma_sparse.hpp ELayout_64x32
_A_64X32 = ((4, 8, 4), (256, 1, 16)), ((4, 2, 2), (64, 8, 1024))
_E_64X32 = ((2, 2, 8, 4), (1024, 0, 1, 16)), ((16, 2), (64, 8))


@pytest.mark.parametrize("kt", range(4))
def test_registers_are_those_of_cutlass_for_wgmma_sp(kt):
    # four warps of wgmma.sp with A in registers hold what four mma.sp hold: the same bytes serve both
    packed = _packed(1, 64, 128, whole=True)
    made = packed.to_order("mma_sp")
    a = _numbers(made.values[0, 0, 0, kt], torch.bfloat16).reshape(128, 4, 2)
    metadata = made.index[0, 0, 0, :, :, kt // 2].numpy().view(np.uint32).reshape(128)
    nibbles = {}
    for thread in range(128):
        # CUTLASS repeats the metadata over both pairs of lanes; the selector picks one
        if thread % 4 // 2 == kt % 2:
            for value in range(0, 32, 4):
                row, column = _place(thread, value, _E_64X32)
                nibbles[row, column // 4] = int(metadata[thread]) >> value & 15
    dense = np.zeros((64, 32))
    for thread, register in itertools.product(range(128), range(4)):
        row, column = _place(thread, 4 * register, _A_64X32)
        nibble = nibbles[row, column // 4]
        dense[row, column + nibble % 4], dense[row, column + nibble // 4] = a[thread, register]
    assert np.array_equal(dense, packed.unpack()[0, :, 32 * kt : 32 * kt + 32].double().numpy())


def test_the_selector_takes_the_lanes_that_cutlass_fills():
    """CUTLASS 2.x on sm_80: one register holds the metadata of two m16 tiles, and tile m is multiplied with selector m.

    tools/util/include/cutlass/util/host_reorder.h says to which row and column of 16-bit elements the metadata of a
    row and 16 columns goes; two of them are a lane's register, registers in order (include/cutlass/gemm/warp/
    mma_sparse_tensor_op.h multiplies tile m with selector m % 2).
    """
    random = np.random.default_rng(0)
    nibbles = random.choice([4, 8, 12, 9, 13, 14], (32, 2, 4)).astype(np.uint32)  # row, 16 columns, group
    chunks = (nibbles << 4 * np.arange(4, dtype=np.uint32)).sum(-1, dtype=np.uint32)
    reordered = np.zeros((32, 2), np.uint32)
    for m, k in itertools.product(range(32), range(2)):
        row, column = m % 8 * 4 + m // 8, k
        if row % 2 == 0 and column % 2 == 1:
            row, column = row + 1, column - 1
        elif row % 2 == 1 and column % 2 == 0:
            row, column = row - 1, column + 1
        reordered[row, column] = chunks[m, k]
    registers = reordered[:, 0] | reordered[:, 1] << 16
    for selector in range(2):
        kept = dense_a(np.ones((32, 4, 2)), registers, selector).reshape(16, 2, 4, 4)
        rows = nibbles[16 * selector : 16 * selector + 16, ..., None]
        columns = np.arange(4)
        assert np.array_equal(kept, (columns == rows % 4) | (columns == rows // 4))


# ---- slices and refusals


def test_slices():
    # 300 rows and 392 columns: the last units of each are ragged and may be taken to the end
    packed = _packed(2, 300, 392)
    made = packed.to_order("mma_sp")
    assert made.rows(128, 300).equal(packed.rows(128, 300).to_order("mma_sp"))
    assert made.columns(256, 392).equal(packed.columns(256, 392).to_order("mma_sp"))
    assert made.experts([1]).equal(packed.experts(1).to_order("mma_sp"))
    with pytest.raises(ValueError, match=r'rows must start and stop at multiples of 128 in "mma_sp" order, got 0..64'):
        made.rows(0, 64)


def test_an_index_without_two_bits_is_refused():
    packed = _packed(2, 4, 16)
    index = packed.index.clone()
    index[1, 3, 1] |= 0xF0
    broken = NMWeight(packed.values, index, packed.shape, 2, 4, "row", packed.dtype)
    with pytest.raises(
        ValueError, match=r"index must keep exactly 2 of every 4 columns, got 4 in expert 1, row 3, group 3"
    ):
        broken.to_order("mma_sp")


def test_validate_finds_broken_metadata():
    made = _packed(2, 128, 128).to_order("mma_sp")
    index = made.index.clone()
    # expert 1, unit 1, w = 2, lane g = 3, q = 1, s = 1, half = 1, j = 2: row 64 + 32 + 8 + 3, group 16 + 4 + 2
    index[1, 1, 0, 2, 13, 1] |= 0xF << 24
    broken = NMWeight(made.values, index, made.shape, 2, 4, "mma_sp", made.dtype)
    with pytest.raises(ValueError, match="got 0 in expert 1, row 107, group 22"):
        broken.validate()


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (lambda: NMWeight.pack(torch.zeros(1, 4, 8, dtype=torch.bfloat16), n=3), "must be a 2:4 weight, got 3:4"),
        (lambda: NMWeight.pack(torch.zeros(1, 4, 8)), "must have a 16-bit dtype, got torch.float32"),
    ],
)
def test_weights_without_the_instruction_are_refused(weight, message):
    with pytest.raises(ValueError, match=f'order "mma_sp" {message}'):
        weight().to_order("mma_sp")
