"""pytest-benchmark entry points: `PYTHONPATH=.:kernels python -m pytest benchmarks` on a GPU.

MOESPARSE_BENCH_DRY=1 runs them tiny on a CPU.
"""

import os

import pytest
import torch

from benchmarks.speed.shapes import DRY_SHAPES, SHAPES

DRY = os.environ.get("MOESPARSE_BENCH_DRY") == "1"


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available() and not DRY:
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device; MOESPARSE_BENCH_DRY=1 runs it tiny"))


def pytest_generate_tests(metafunc):
    if "shape" in metafunc.fixturenames:
        shapes = DRY_SHAPES if DRY else SHAPES
        metafunc.parametrize("shape", shapes.values(), ids=shapes)


@pytest.fixture
def device():
    return torch.device("cpu" if DRY else "cuda")


@pytest.fixture
def timed(benchmark, device):
    """Run a call under pytest-benchmark's clock until the device is done with it."""

    def run(call):
        def finished():
            call()
            if device.type == "cuda":
                torch.cuda.synchronize()

        benchmark.pedantic(finished, rounds=2 if DRY else 50, warmup_rounds=0 if DRY else 5)

    return run
