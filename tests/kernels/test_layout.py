"""NMWeight: packing, both orders, slices; everything is compared bit for bit."""

import copy
import itertools
import math
import pickle

import numpy as np
import pruning_oracle as oracle
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from moesparse_kernels import NMWeight, row_order

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _random_bits(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Any bit pattern at all: NaN, infinities, subnormals, both zeros; a quarter of the weights are zeros."""
    kind = torch.int32 if dtype == torch.float32 else torch.int16
    limit = 2 ** (8 * dtype.itemsize - 1)
    bits = torch.randint(-limit, limit, shape, generator=generator).to(kind)
    zeros = torch.tensor([0, -limit], dtype=torch.int64).to(kind)
    choice = torch.randint(0, 8, shape, generator=generator)
    return torch.where(choice < 2, zeros[choice.clamp(max=1)], bits).view(dtype)


def _random_mask(shape: tuple[int, int, int], n: int, m: int, generator: torch.Generator) -> torch.Tensor:
    E, N, K = shape
    kept = torch.rand(E, N, K // m, m, generator=generator).argsort(-1)[..., :n]
    return torch.zeros(E, N, K // m, m, dtype=torch.bool).scatter_(-1, kept, True).view(shape)


def _packed(E: int, N: int, K: int, n: int = 2, m: int = 4, dtype=torch.bfloat16, seed: int = 0) -> NMWeight:
    generator = torch.Generator().manual_seed(seed)
    return NMWeight.pack(_random_bits((E, N, K), dtype, generator), _random_mask((E, N, K), n, m, generator), n, m)


@st.composite
def _cases(draw):
    m = draw(st.sampled_from([4, 8, 16, 32]))
    shape = (draw(st.integers(0, 3)), draw(st.integers(0, 5)), math.lcm(m, 8) * draw(st.integers(0, 5)))
    return shape, draw(st.integers(1, m)), m, draw(st.sampled_from(DTYPES)), draw(st.integers(0, 2**31))


@settings(deadline=None, max_examples=60)
@given(_cases())
@example(((1, 1, 0), 2, 4, torch.bfloat16, 0))  # rows of no columns
@example(((2, 1, 0), 2, 4, torch.bfloat16, 0))  # and those of a second expert, which begin anywhere
def test_round_trip(case):
    shape, n, m, dtype, seed = case
    generator = torch.Generator().manual_seed(seed)
    weight, mask = _random_bits(shape, dtype, generator), _random_mask(shape, n, m, generator)
    packed = NMWeight.pack(weight, mask, n, m).validate()
    assert oracle.same_bits(packed.unpack(), oracle.masked(weight, mask))
    assert packed.nbytes == math.prod(shape) * (n * dtype.itemsize * 8 + m) // (8 * m)
    assert packed.dense_nbytes == math.prod(shape) * dtype.itemsize
    if shape[0]:
        assert torch.equal(packed.mask(), mask)
    for e, row in itertools.product(range(shape[0]), range(shape[1])):
        # the definition, bit by bit
        columns = [k for k in range(shape[2]) if int(packed.index[e, row, k // 8]) >> (k % 8) & 1]
        assert columns == mask[e, row].nonzero().flatten().tolist()
        assert oracle.same_bits(packed.values[e, row], weight[e, row, columns])


@settings(deadline=None, max_examples=60)
@given(_cases())
@example(((1, 1, 0), 2, 4, torch.bfloat16, 0))  # rows of no columns
@example(((2, 1, 0), 2, 4, torch.bfloat16, 0))  # and those of a second expert, which begin anywhere
def test_non_zeros_are_found_and_groups_filled(case):
    # masked weights as they lie in a checkpoint: some kept weights are zeros themselves
    shape, n, m, dtype, seed = case
    generator = torch.Generator().manual_seed(seed)
    weight = oracle.masked(_random_bits(shape, dtype, generator), _random_mask(shape, n, m, generator))
    packed = NMWeight.pack(weight, n=n, m=m).validate()
    assert oracle.same_bits(packed.unpack(), weight)


@pytest.mark.parametrize("flush", [False, True])
def test_small_and_negative_zero_are_values(flush):
    # a subnormal must count as non-zero even where the CPU flushes them
    torch.set_flush_denormal(flush)
    try:
        tiny = torch.tensor([1, 0, -(2**15), 0, 0, 0, 0, 0], dtype=torch.int16).view(torch.bfloat16)
        packed = NMWeight.pack(tiny.view(1, 1, 8))
    finally:
        torch.set_flush_denormal(False)
    assert oracle.same_bits(packed.unpack()[0, 0], tiny)
    # columns 0 and 2 of the first group; an empty group keeps its first two
    assert packed.index.tolist() == [[[0b0011_0101]]]


def test_groups_fill_with_negative_zeros_first():
    # weight * mask leaves -0.0 where a negative weight was pruned: those fill a group, the rest come back as +0.0
    row = torch.tensor([-0.0, -0.0, 5.0, -0.0, 0.0, -0.0, 0.0, -0.0], dtype=torch.bfloat16)
    packed = NMWeight.pack(row.view(1, 1, 8))
    assert packed.index.tolist() == [[[0b1010_0101]]]
    assert torch.signbit(packed.unpack()[0, 0]).tolist() == [True, False, False, False, False, True, False, True]


def test_pack_takes_any_strides_and_parameters():
    weight = torch.nn.Parameter(oracle.hard_weight(2, 6, 16, torch.bfloat16).transpose(1, 2))
    mask = _random_mask((2, 16, 8), 2, 4, torch.Generator().manual_seed(0))
    packed = NMWeight.pack(weight[:, :, :6].repeat(1, 1, 2)[:, :, ::2][:, :, :4].repeat(1, 1, 2), mask)
    assert packed.shape == (2, 16, 8) and not packed.values.requires_grad


def test_rows_are_packed_in_blocks(monkeypatch):
    # a block of 32 weights is two rows of 16: five rows are three blocks, and errors count rows across them
    whole = _packed(2, 5, 16)
    monkeypatch.setattr(row_order, "_BLOCK_CPU", 32)
    assert _packed(2, 5, 16).equal(whole)
    assert oracle.same_bits(whole.unpack(), _packed(2, 5, 16).unpack())
    weight = torch.zeros(2, 5, 16)
    weight[1, 3, 8:11] = 1.0
    with pytest.raises(ValueError, match=r"got 3 in expert 1, row 3, group 2; prune it to 2:4"):
        NMWeight.pack(weight)


# ---- fragment order


def _fragment_by_definition(packed: NMWeight) -> tuple[torch.Tensor, torch.Tensor]:
    """The module docstring, one group at a time, for a weight without padding."""
    E, N, K = packed.shape
    values = np.zeros((E, N // 128, K // 64, 4, 4, 32, 4), dtype=np.uint32)
    index = np.zeros((E, N // 128, K // 128, 4, 32, 4), dtype=np.uint32)
    halves = packed.values.view(torch.int16).numpy().view(np.uint16).astype(np.uint32)
    mask = packed.mask().numpy().astype(np.uint32)
    for e, n, group in itertools.product(range(E), range(N), range(K // 4)):
        w, r, g = n % 128 // 32, n % 32 // 8, n % 8
        tile, kt, p2, q, b = group // 32, group % 32 // 16, group % 16 // 8, group % 8 // 2, group % 2
        lane = 4 * g + q
        for v in range(2):
            values[e, n // 128, 2 * tile + kt, r, w, lane, 2 * p2 + v] |= halves[e, n, 2 * group + v] << (16 * b)
        for j in range(4):
            index[e, n // 128, tile, w, lane, r] |= mask[e, n, 4 * group + j] << (16 * b + 4 * (2 * kt + p2) + j)
    return torch.from_numpy(values.view(np.int32)), torch.from_numpy(index.view(np.int32))


def test_fragment_order_is_as_documented():
    # two tiles along K, so that the order of tiles shows
    packed = _packed(1, 128, 256, dtype=torch.float16)
    fragment = packed.to_order("fragment")
    values, index = _fragment_by_definition(packed)
    assert torch.equal(fragment.values, values)
    assert torch.equal(fragment.index, index)


# whole tiles; one row and one byte of columns; both sizes ragged, several tiles; no experts
@pytest.mark.parametrize("shape", [(2, 128, 128), (1, 1, 8), (2, 130, 264), (1, 256, 136), (0, 128, 128)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fragment_round_trip(shape, dtype):
    packed = _packed(*shape, dtype=dtype)
    fragment = packed.to_order("fragment").validate()
    assert fragment.shape == shape and fragment.values.dtype == torch.int32
    assert fragment.to_order("row").equal(packed)
    assert oracle.same_bits(fragment.unpack(), packed.unpack())
    rows, columns = (-(-size // 128) * 128 for size in shape[1:])
    assert fragment.nbytes == shape[0] * rows * columns * 9 // 8


def test_padding_is_groups_of_two_zeros():
    fragment = _packed(1, 1, 8).to_order("fragment")
    whole = NMWeight(fragment.values, fragment.index, (1, 128, 128), 2, 4, "fragment", torch.bfloat16).validate()
    dense = whole.unpack().view(torch.int16)
    assert not dense[0, 1:].any() and not dense[0, 0, 8:].any()


def test_validate_finds_a_broken_fragment():
    fragment = _packed(2, 128, 128).to_order("fragment")
    index = fragment.index.clone()
    # expert 1, w = 1, g = 0, q = 2, r = 3: row 56; p = 0, b = 0: group 4
    index[1, 0, 0, 1, 2, 3] |= 0xF
    broken = NMWeight(fragment.values, index, fragment.shape, 2, 4, "fragment", fragment.dtype)
    with pytest.raises(
        ValueError, match=r"index must keep exactly 2 of every 4 columns, got 4 in expert 1, row 56, group 4"
    ):
        broken.validate()


# ---- slices and copies


@pytest.mark.parametrize(("n", "m"), [(2, 4), (3, 8), (9, 16), (1, 32)])
def test_slices_equal_packing_of_slices(n, m):
    generator = torch.Generator().manual_seed(0)
    shape = (3, 6, 128)
    weight, mask = _random_bits(shape, torch.bfloat16, generator), _random_mask(shape, n, m, generator)
    packed = NMWeight.pack(weight, mask, n, m)
    assert packed.rows(1, 5).equal(NMWeight.pack(weight[:, 1:5], mask[:, 1:5], n, m))
    assert packed.columns(32, 96).equal(NMWeight.pack(weight[..., 32:96], mask[..., 32:96], n, m))
    assert packed.experts(2).equal(NMWeight.pack(weight[2:], mask[2:], n, m))
    for chosen in (slice(0, 2), [2, 0], torch.tensor([1, 1])):
        assert packed.experts(chosen).equal(NMWeight.pack(weight[chosen], mask[chosen], n, m))


def test_slices_of_fragments():
    # 300 rows and 392 columns: the last tile of each is ragged and may be taken to the end
    packed = _packed(2, 300, 392)
    fragment = packed.to_order("fragment")
    assert fragment.rows(128, 300).equal(packed.rows(128, 300).to_order("fragment"))
    assert fragment.rows(0, 128).equal(packed.rows(0, 128).to_order("fragment"))
    assert fragment.columns(256, 392).equal(packed.columns(256, 392).to_order("fragment"))
    assert fragment.columns(128, 256).equal(packed.columns(128, 256).to_order("fragment"))
    assert fragment.experts([1]).equal(packed.experts(1).to_order("fragment"))
    with pytest.raises(
        ValueError, match=r'rows must start and stop at multiples of 128 in "fragment" order, got 0..64'
    ):
        fragment.rows(0, 64)


def test_slices_do_not_keep_the_whole_alive():
    packed = _packed(2, 8, 64)
    assert packed.columns(0, 32).values.untyped_storage().nbytes() == packed.values.nbytes // 2


def test_one_expert_at_a_time():
    packed = _packed(3, 6, 32)
    out = torch.full((6, 32), float("nan"), dtype=torch.bfloat16)
    assert packed.unpack_expert(1, out=out) is out
    assert oracle.same_bits(out, packed.unpack()[1])
    assert oracle.same_bits(packed.to_order("fragment").unpack_expert(2), packed.unpack()[2])


def test_copies_and_devices():
    packed = _packed(2, 4, 16)
    for twin in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed)), packed.to("cpu", order="row")):
        assert twin.equal(packed)
    assert packed.to(order="fragment").order == "fragment"
    assert packed.to("meta").device.type == "meta"
    assert packed.to_order("row") is packed
    assert repr(packed) == (
        "NMWeight(2:4, shape=(2, 4, 16), dtype=torch.bfloat16, order='row', device=cpu, nbytes=144)"
    )


def test_fake_tensors_meet_no_cached_table():
    # before and after: a fake table left in a cache would break the real tensors that come next
    packed = _packed(2, 4, 16)
    dense = packed.unpack()
    with FakeTensorMode() as mode:
        fake = NMWeight(
            mode.from_tensor(packed.values), mode.from_tensor(packed.index), packed.shape, 2, 4, "row", packed.dtype
        )
        assert (fake.unpack().shape, fake.mask().dtype) == (packed.shape, torch.bool)
    assert oracle.same_bits(packed.unpack(), dense)


def test_equal_compares_bits():
    zeros = NMWeight.pack(torch.zeros(1, 1, 8))
    signed = NMWeight(-zeros.values, zeros.index, zeros.shape, 2, 4, "row", torch.float32)
    assert torch.equal(zeros.values, signed.values) and not zeros.equal(signed)
    assert not zeros.equal(NMWeight.pack(torch.zeros(1, 2, 8)))
    assert not zeros.equal(NMWeight.pack(torch.zeros(1, 1, 8, dtype=torch.float16)))


# ---- errors


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NMWeight.pack(torch.zeros(4, 8)), r"weight must be \(E, N, K\), got shape \(4, 8\)"),
        (lambda: NMWeight.pack(torch.zeros(1, 4, 8).double()), r"weight must be one of .*, got torch.float64"),
        (lambda: NMWeight.pack(torch.zeros(1, 4, 12)), r"K must be a multiple of 8 .*, got 12"),
        (lambda: NMWeight.pack(torch.zeros(1, 4, 24), m=16), r"K must be a multiple of 16 .*, got 24"),
        (lambda: NMWeight.pack(torch.zeros(1, 4, 8), m=5), r"m must be one of \(4, 8, 16, 32\), got 5"),
        (lambda: NMWeight.pack(torch.zeros(1, 4, 8), n=0), r"n must lie in 1..m=4, got 0"),
        (lambda: NMWeight.pack(torch.zeros(1, 4, 8), n=5), r"n must lie in 1..m=4, got 5"),
        (
            lambda: NMWeight.pack(torch.zeros(1, 4, 8), torch.ones(1, 4, 8)),
            r"mask must be torch.bool of shape \(1, 4, 8\), got torch.float32 of shape \(1, 4, 8\)",
        ),
        (
            lambda: NMWeight.pack(torch.zeros(1, 4, 8), torch.ones(1, 4, 8, dtype=torch.bool)),
            r"mask must keep exactly 2 of every 4 columns, got 4 in expert 0, row 0, group 0",
        ),
        (
            lambda: NMWeight.pack(torch.ones(1, 4, 8)),
            r"weight must hold at most 2 non-zeros in every group of 4, got 4 in expert 0, row 0, group 0",
        ),
        (lambda: _packed(1, 4, 8, 3, 4).to_order("fragment"), r'order "fragment" must be a 2:4 weight, got 3:4'),
        (
            lambda: _packed(1, 4, 8, dtype=torch.float32).to_order("fragment"),
            r'order "fragment" must have a 16-bit dtype, got torch.float32',
        ),
        (lambda: _packed(1, 4, 8).to_order("column"), r"""order must be "row", "fragment" or "mma_sp", got 'column'"""),
        (lambda: _packed(1, 4, 8).rows(2, 5), r"rows must satisfy 0 <= start < stop <= 4, got 2..5"),
        (lambda: _packed(1, 4, 16).columns(0, 4), r"columns must start and stop at multiples of 8, got 0..4"),
        (lambda: _packed(1, 4, 8).experts(1), r"expert must lie in 0..0, got 1"),
        (lambda: _packed(1, 4, 8).unpack_expert(-1), r"expert must lie in 0..0, got -1"),
        (
            lambda: _packed(1, 4, 8).unpack_expert(0, out=torch.zeros(4, 8)),
            r"out must be contiguous torch.bfloat16 of shape \(4, 8\), got torch.float32",
        ),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": (4, 8)}, r"shape must be \(E, N, K\), got \(4, 8\)"),
        ({"shape": (1, 4, 16)}, r"values must be torch.bfloat16 of shape \(1, 4, 8\) .*, got .* \(1, 4, 4\)"),
        ({"dtype": torch.float16}, r"values must be torch.float16 .*, got torch.bfloat16"),
        ({"dtype": torch.int8}, r"dtype must be one of .*, got torch.int8"),
        ({"order": "column"}, r"""order must be "row", "fragment" or "mma_sp", got 'column'"""),
        ({"order": "fragment"}, r"values must be torch.int32 of shape \(1, 1, 2, 4, 4, 32, 4\)"),
        ({"index": torch.zeros(1, 4, 1)}, r"index must be torch.uint8 of shape \(1, 4, 1\)"),
        ({"values": torch.zeros(1, 4, 4).bfloat16().transpose(1, 2)}, r"values must be contiguous, got strides"),
        (
            {"index": torch.zeros(1, 4, 1, dtype=torch.uint8, device="meta")},
            r"index must be on the device of values, cpu",
        ),
    ],
)
def test_constructor_errors(changes, message):
    good = _packed(1, 4, 8)
    fields = {name: getattr(good, name) for name in ("values", "index", "shape", "n", "m", "order", "dtype")}
    with pytest.raises(ValueError, match=message):
        NMWeight(**{**fields, **changes})
