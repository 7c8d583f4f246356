"""nm_prune's kernels against sorting loops: every weight, bit for bit."""

import pruning_oracle as oracle
import pytest
import torch

from moesparse_kernels import NMWeight, nm_prune

# N = 5: rows of every hard kind, and a last program that is not full (4 rows each)
# K = 264: one 256-column program would not do, and the second is nearly empty; 33 index bytes are no power of two
SHAPE = (2, 5, 264)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8)])
def test_tuned_patterns(n, m, dtype):
    weight, scale = oracle.hard_weight(*SHAPE, dtype), oracle.column_scale(2, SHAPE[2])
    mask = oracle.keep_mask(weight, scale, n, m)
    assert oracle.same_bits(nm_prune(weight, scale, n, m), oracle.masked(weight, mask))
    assert nm_prune(weight, scale, n, m, packed=True).validate().equal(NMWeight.pack(weight, mask, n, m))


# uneven and unit counts of the small groups; the long groups; n = m prunes nothing
@pytest.mark.parametrize(("n", "m"), [(1, 4), (3, 4), (4, 4), (3, 8), (8, 8), (5, 16), (1, 32), (31, 32)])
def test_every_other_pattern(n, m):
    # K = 96: three groups of 32
    weight, scale = oracle.hard_weight(1, 4, 96, torch.bfloat16), oracle.column_scale(1, 96)
    mask = oracle.keep_mask(weight, scale, n, m)
    assert oracle.same_bits(nm_prune(weight, scale, n, m), oracle.masked(weight, mask))
    assert nm_prune(weight, scale, n, m, packed=True).validate().equal(NMWeight.pack(weight, mask, n, m))


def test_groups_that_fill_no_byte():
    # K = 12: three groups of four and no whole number of index bytes, which only the dense result allows
    weight, scale = oracle.hard_weight(1, 4, 12, torch.bfloat16), oracle.column_scale(1, 12)
    assert oracle.same_bits(nm_prune(weight, scale), oracle.masked(weight, oracle.keep_mask(weight, scale, 2, 4)))


def test_two_dimensions_shared_scale_and_strides():
    weight = oracle.hard_weight(1, 16, 4, torch.bfloat16)[0].t()
    scale = oracle.column_scale(1, 16)
    expected = oracle.masked(weight[None], oracle.keep_mask(weight[None], scale, 2, 4))
    assert oracle.same_bits(nm_prune(weight, scale[0]), expected[0])
    assert nm_prune(weight, scale[0], packed=True).shape == (1, 4, 16)
    twice = torch.stack([weight, weight])
    assert oracle.same_bits(nm_prune(twice, scale[0]), expected.repeat(2, 1, 1))


def test_nothing_to_prune():
    # no experts after a surgery, and no rows on a rank
    for shape in [(0, 4, 16), (2, 0, 16)]:
        weight, scale = torch.empty(shape, dtype=torch.bfloat16), torch.ones(shape[0], 16)
        assert nm_prune(weight, scale).shape == shape
        assert nm_prune(weight, scale, packed=True).shape == shape


# both kernels; negative NaN too: its sign bit must not make it small
@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (6, 16)])
def test_nan_is_kept_and_the_count_stays(n, m):
    weight, scale = torch.ones(1, 2, 16, dtype=torch.bfloat16), torch.ones(1, 16)
    weight[0, 0, 3], weight[0, 0, 10] = float("nan"), -float("nan")
    scale[0, 6] = float("nan")
    packed = nm_prune(weight, scale, n, m, packed=True).validate()
    assert bool(packed.mask()[0, 0, [3, 6, 10]].all())
    assert packed.unpack().isnan().sum() == 2
    assert nm_prune(weight, scale, n, m).count_nonzero() == 32 // m * n
