"""What every test shares."""

import os
import shutil
import tempfile

# tensors here are tiny: a second thread only waits for the first, and spins on a busy machine
os.environ.setdefault("OMP_NUM_THREADS", "1")
# what is remembered of this machine is not for tests to write
os.environ.setdefault("MOESPARSE_CACHE", f"{tempfile.gettempdir()}/moesparse-tests-{os.getpid()}")

import pytest
import torch

torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
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
