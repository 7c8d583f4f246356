"""Every test here runs under Triton's interpreter, corrected, with NaN in memory that no kernel has written."""

import interpreter_bf16
import interpreter_speed
import pytest
import torch

interpreter_bf16.install()
interpreter_speed.install()


@pytest.fixture(autouse=True)
def _fill_empty_tensors():
    """torch.empty gives NaN (the largest integer for integer dtypes), so that an output left unwritten shows."""
    mode, fill = torch.get_deterministic_debug_mode(), torch.utils.deterministic.fill_uninitialized_memory
    torch.set_deterministic_debug_mode("warn")
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.set_deterministic_debug_mode(mode)
    torch.utils.deterministic.fill_uninitialized_memory = fill
