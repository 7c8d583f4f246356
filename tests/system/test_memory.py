"""What the process gives back to the system."""

import sys
from pathlib import Path

import pytest
import torch

from moesparse.system.memory import return_free_memory


def resident():
    """Bytes of memory of this process that is no file's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_holes_between_what_stays_go_back():
    # 64 kB each: on the heap, where a block between two that stay is not returned by itself
    pieces = [torch.ones(2**14) for _ in range(2000)]
    held, kept = resident(), pieces[::20]
    del pieces
    return_free_memory()
    assert held - resident() > 100e6
    assert all(bool((piece == 1).all()) for piece in kept)
