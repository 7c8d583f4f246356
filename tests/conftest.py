"""What every test shares."""

import pytest
import torch

# tensors here are tiny: a second thread only waits for the first, and spins on a busy machine
torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
