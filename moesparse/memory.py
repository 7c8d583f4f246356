"""Peak memory of this process, on the GPU when one is used and in RAM otherwise."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def available_memory() -> int | None:
    """Bytes of RAM that can be taken without swapping; None where the system does not say."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def reset_peak_memory() -> None:
    """Start a new measurement; where the system cannot (not Linux), the peak stays the process's own."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    try:
        _CLEAR.write_text("5")  # resets VmHWM
    except OSError:
        return


def peak_memory() -> int:
    """Bytes: peak allocated GPU memory when there is a GPU, else peak resident memory, since the last reset."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    # ru_maxrss is in kilobytes everywhere but on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
