"""row_topk's kernel against sorting loops: every weight, bit for bit."""

import pruning_oracle as oracle
import pytest
import torch

from moesparse_kernels import row_topk

# K = 200: no power of two, so padding columns sit beside real ones; 4 rows of the hard kinds
E, N, K = 2, 4, 200


# nothing, one, half, all but one, everything
@pytest.mark.parametrize("keep", [0, 1, 100, 199, 200])
def test_counts(keep):
    weight, scale = oracle.hard_weight(E, N, K, torch.bfloat16), oracle.column_scale(E, K)
    expected = oracle.masked(weight, oracle.keep_mask(weight, scale, keep, K))
    assert oracle.same_bits(row_topk(weight, scale, keep), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_dtypes(dtype):
    weight, scale = oracle.hard_weight(1, N, K, dtype), oracle.column_scale(1, K)
    expected = oracle.masked(weight, oracle.keep_mask(weight, scale, 77, K))
    assert oracle.same_bits(row_topk(weight, scale, 77), expected)


def test_every_score_equal():
    # bisection cannot separate equal scores: the tie rule alone decides; 1,025 columns need a 2,048 block
    weight = torch.full((1, 1, 1025), -0.5, dtype=torch.bfloat16)
    kept = row_topk(weight, torch.ones(1, 1025), 513)
    assert bool((kept[0, 0, :513] == -0.5).all()) and not kept[0, 0, 513:].any()


def test_scores_one_bit_apart():
    # the last bisection step decides, at both ends of the range of fp32
    for bits in (0, 0x00800000, 0x7F7FFFF0):
        weight = torch.arange(bits, bits + 16, dtype=torch.int32).flip(0).view(torch.float32).reshape(1, 1, 16)
        kept = row_topk(weight, torch.ones(1, 16), 5)
        assert oracle.same_bits(kept[0, 0, :5], weight[0, 0, :5]) and not kept[0, 0, 5:].any()


def test_nan_and_infinity_are_kept():
    # 0x7FFFFFFF, the NaN that a GPU makes, is the largest int32: the search must not overflow
    weight = torch.ones(1, 1, 32)
    weight[0, 0, 20] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    weight[0, 0, 30] = float("inf")
    for keep in (1, 2, 7):
        kept = row_topk(weight, torch.ones(1, 32), keep)
        assert kept.count_nonzero() == keep
        assert kept[0, 0, 20].isnan() and (keep == 1 or kept[0, 0, 30].isinf())


def test_rows_too_long_for_registers():
    # one column more than the kernel takes: plain torch answers
    weight = torch.randn(1, 1, 16385, generator=torch.Generator().manual_seed(0))
    scale = torch.ones(1, 16385)
    expected = oracle.masked(weight, oracle.keep_mask(weight, scale, 8000, 16385))
    assert oracle.same_bits(row_topk(weight, scale, 8000), expected)


def test_no_rows():
    assert row_topk(torch.empty(2, 0, 16), torch.ones(2, 16), 3).shape == (2, 0, 16)
