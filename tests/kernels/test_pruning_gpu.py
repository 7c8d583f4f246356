"""The pruning ops on a GPU, bit for bit; interpreter/test_pruning_cases.py runs the same bodies without one."""

import pytest
import torch
from pruning_cases import assert_column_energy, assert_nm_prune, assert_row_topk

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


# N and K no multiple of a program's; K of a real model's width
@pytest.mark.parametrize("shape", [(2, 5, 288), (1, 67, 2048)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nm_prune(dtype, shape):
    # both kernels: octets, and the general one
    for n, m in ((2, 4), (4, 8), (1, 4), (3, 8), (5, 16), (1, 32)):
        assert_nm_prune(shape, n, m, dtype, "cuda")


# one block of columns and the widest that the kernel holds
@pytest.mark.parametrize(("shape", "keeps"), [((2, 4, 200), (0, 1, 100, 199, 200)), ((1, 3, 16384), (8192,))], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_row_topk(dtype, shape, keeps):
    for keep in keeps:
        assert_row_topk(shape, keep, dtype, "cuda")


# several chunks of 128 rows for each expert, a ragged last one; a decode batch over many experts
@pytest.mark.parametrize("sizes", [(700, 4, 2, 264), (40, 128, 8, 2048)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_column_energy(dtype, sizes):
    assert_column_energy(*sizes, dtype, "cuda")
