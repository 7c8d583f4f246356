"""The bodies of test_pruning_gpu.py, so that they are right where a card first runs them."""

import pytest
import torch
from pruning_cases import assert_column_energy, assert_nm_prune, assert_row_topk


@pytest.mark.parametrize(("n", "m"), [(2, 4), (5, 16)])
def test_nm_prune(n, m):
    assert_nm_prune((1, 5, 96), n, m, torch.bfloat16, "cpu")


def test_row_topk():
    assert_row_topk((1, 4, 72), 31, torch.float16, "cpu")


def test_column_energy():
    assert_column_energy(150, 2, 1, 24, torch.bfloat16, "cpu")
