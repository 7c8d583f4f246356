"""What every test shares."""

import os
import shutil
import tempfile
from pathlib import Path

# tensors here are tiny: a second thread only waits for the first, and spins on a busy machine
os.environ.setdefault("OMP_NUM_THREADS", "1")
# what is remembered of this machine is not for tests to write
os.environ.setdefault("MOESPARSE_CACHE", f"{tempfile.gettempdir()}/moesparse-tests-{os.getpid()}")

import pytest
import torch

torch.set_num_threads(1)


# a file is for one worker (see the Makefile): the longest are given out first
DEAR = (
    "benchmarks/test_gpu_dry_run.py",
    "pruning/test_ranks.py",
    "test_end_to_end.py",
    "test_docs.py",
    "kernels/test_interpreter.py",
    "kernels/test_aot.py",
    "distillation/test_distill_runs.py",
    "pruning/test_within_a_layer.py",
    "packed/test_packed_loading.py",
    "test_packaging.py",
    "test_examples.py",
    "serving/test_serve.py",
)


def pytest_collection_modifyitems(items):
    tests = Path(__file__).parent
    place = {tests / name: number for number, name in enumerate(DEAR)}
    items.sort(key=lambda item: place.get(item.path, len(DEAR)))
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_sessionfinish():
    if os.environ["MOESPARSE_CACHE"].endswith(f"moesparse-tests-{os.getpid()}"):
        shutil.rmtree(os.environ["MOESPARSE_CACHE"], ignore_errors=True)


def pytest_runtest_logfinish():
    # every later test of a process that lost its device fails: pytest-xdist replaces one that ends
    if "PYTEST_XDIST_WORKER" in os.environ and torch.cuda.is_initialized():
        from moesparse.benchmarking.layer import device_is_lost

        if device_is_lost():
            os._exit(1)
