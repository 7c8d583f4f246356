"""pytest-benchmark entry points of the pruning and packing kernels; checked, then timed, host time included."""

import pytest
import torch

from benchmarks.speed.bench_kernels import cases

pytest.importorskip("pytest_benchmark")
pytestmark = pytest.mark.gpu

OPS = (
    *("nm_prune 4:8", "nm_prune 2:4", "nm_prune 2:4 packed", "pack", "unpack", "row_topk 50%"),
    *("column_energy", "column_energies"),
)


@pytest.mark.parametrize("op", OPS)
def test_kernel(op, shape, device, timed):
    tokens = 64 if device.type == "cpu" else 8192
    made = cases(shape, torch.bfloat16, device, tokens)
    case = next(case for case in made if (case.op, case.contender) == (op, "moesparse"))
    case.check(case.call())
    timed(case.call)
