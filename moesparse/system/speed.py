"""How fast matrix products are here: measured at the load of this moment, and remembered of one without load.

The memory is `speeds.json` in the folder of `cache_folder`: what this machine was measured at while little else ran, by
device, threads, dtype and versions. Where it cannot be written nothing is remembered.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moesparse._version import __version__
from moesparse.system.cpu_products import fast_products

__all__ = ["Speed", "cache_folder", "gemm_rate", "speed_here"]

FILE = "speeds.json"

_FRESH = timedelta(days=30)
# the load of a CPU below which a measurement counts as one without load, and by how much one must fall below what is
# remembered for the load to be the reason
_IDLE = 0.5
_MUCH_SLOWER = 1.3
_STRETCHES, _STRETCH_SECONDS = 3, 0.1


@dataclass(frozen=True)
class Speed:
    """Multiply-adds times two a second, of one process.

    Attributes:
        rates: of float32, and of the dtype that layers run in; measured now.
        load: processes that wanted a CPU in the last minute, on average; None on a GPU, and where the system does not
            say.
        cpus: that this process may use.
        idle: rates of this machine without load, where they are remembered and much higher than those of now.
        measured: when that was, as YYYY-MM-DD; "" without them.
    """

    rates: tuple[float, float]
    load: float | None
    cpus: int
    idle: tuple[float, float] | None = None
    measured: str = ""


def speed_here(device: torch.device | None, dtype: torch.dtype) -> Speed:
    """Measure a device, in 0.6 s or a few products, and look up what it gave without load.

    Args:
        device: None is the CPU.
        dtype: that layers run in.
    """
    place = device or torch.device("cpu")
    load = _load() if place.type == "cpu" else None
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    dtypes = (torch.float32, dtype)
    rates = {each: gemm_rate(place, each) for each in dict.fromkeys(dtypes)}
    names = {each: _name(place, each) for each in dtypes}
    held = _read()
    now = rates[torch.float32], rates[dtype]
    if load is None or load < _IDLE * cpus:
        for each, rate in rates.items():
            # the best of a month: what is lower was in somebody's way, though the load did not show it
            if names[each] not in held or rate > held[names[each]]["rate"]:
                held[names[each]] = {"rate": rate, "measured": date.today().isoformat()}
        _write(held)
    before = [held[names[each]] for each in dtypes if names[each] in held]
    is_busy = load is None or load >= _IDLE * cpus
    slower = [rate * _MUCH_SLOWER < old["rate"] for old, rate in zip(before, now, strict=False)]
    if not is_busy or len(before) < 2 or not all(slower):
        return Speed(now, load, cpus)
    first, second = before
    return Speed(now, load, cpus, (first["rate"], second["rate"]), min(first["measured"], second["measured"]))


def gemm_rate(
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Multiply-adds times two a second of a product of 1024 x 1024 on a device: the median of three stretches of 0.1 s.

    In half precision it is measured as layers are run, see moesparse.system.cpu_products.
    """
    layer = nn.Linear(1024, 1024, bias=False, device=device, dtype=dtype)
    x = torch.randn(1024, 1024, device=device).to(dtype)
    rates = []
    with torch.no_grad(), fast_products(layer):
        for _ in range(2):
            layer(x)
        for _ in range(_STRETCHES):
            count, seconds = 0, 0.0
            while seconds < _STRETCH_SECONDS:
                started = clock()
                product = layer(x)
                # waits for a GPU
                float(product[0, 0])
                seconds += clock() - started
                count += 1
            rates.append(2 * 1024**3 * count / seconds)
    return statistics.median(rates)


def cache_folder() -> Path:
    """Where moesparse keeps what it can do without: MOESPARSE_CACHE, else "moesparse" in XDG_CACHE_HOME or ~/.cache."""
    own = os.environ.get("MOESPARSE_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moesparse"


def _load() -> float | None:
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def _name(device: torch.device, dtype: torch.dtype) -> str:
    """What a rate is one of: another machine, thread count, dtype or version has its own."""
    if device.type == "cuda":
        where = torch.cuda.get_device_name(device)
    else:
        where = f"{_cpu()} with {torch.get_num_threads()} threads"
    return f"{where}, {str(dtype).removeprefix('torch.')}, torch {torch.__version__}, moesparse {__version__}"


def _cpu() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _read() -> dict[str, dict[str, Any]]:
    """What is remembered and not too old; nothing where the file is none of ours."""
    try:
        found = json.loads((cache_folder() / FILE).read_text())
        oldest = (date.today() - _FRESH).isoformat()
        return {name: each for name, each in found.items() if each["rate"] > 0 and each["measured"] >= oldest}
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return {}


def _write(held: dict[str, dict[str, Any]]) -> None:
    folder = cache_folder()
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f"{FILE}.{os.getpid()}"
        partial.write_text(json.dumps(held, indent=1) + "\n")
        partial.replace(folder / FILE)
