"""Memory of this process: its peak, on the GPU when one is used and in RAM otherwise, and what libraries may keep.

torch is imported where it is needed: the command line says its --help without it.
"""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from pathlib import Path

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")

# compiled products kept by oneDNN and by torch's layer over it, 1024 each where nothing is said
_KEPT_PRODUCTS = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64", "LRU_CACHE_CAPACITY": "16"}


def bound_compiled_products() -> None:
    """Have a CPU keep few compiled matrix products; to be called before the first one, and in programs only.

    A product is compiled for every shape, and experts get ever other numbers of tokens: the caches fill up with what is
    never used again, hundreds of megabytes over the layers of a model, and save no time. Variables of the environment
    that are set stay as they are.
    """
    for name, value in _KEPT_PRODUCTS.items():
        os.environ.setdefault(name, value)


def return_free_memory() -> None:
    """Have glibc give the system what it holds free; nothing where there is another library.

    What comes and goes with a layer leaves holes in the heap between small things that stay: a process that nothing was
    kept in grew by a megabyte a layer.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def available_memory() -> int | None:
    """Bytes of RAM that can be taken without swapping; None where the system does not say."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def reset_gpu_peak() -> None:
    """Start a new measurement on a GPU. That of RAM goes on: the system's own figure (`time -v`) would fall with it."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def reset_peak_memory() -> None:
    """Start a new measurement, for a benchmark; where the system cannot (not Linux) it goes on."""
    import torch

    if torch.cuda.is_available():
        reset_gpu_peak()
        return
    try:
        # resets VmHWM
        _CLEAR.write_text("5")
    except OSError:
        return


def peak_memory() -> int:
    """Bytes: peak allocated GPU memory when there is a GPU, else peak resident memory, since the last reset."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return _status("VmHWM:") or _largest()


def resident_memory() -> int:
    """Bytes of this process in RAM, libraries included; its peak where the system does not say more (not Linux)."""
    return _status("VmRSS:") or _largest()


def _status(name: str) -> int | None:
    try:
        for line in _STATUS.read_text().splitlines():
            if line.startswith(name):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def _largest() -> int:
    # in kilobytes everywhere but on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
