"""What a timing needs: a clock that waits for the device, the device's two ceilings, and the record of the machine.

On a GPU a call is captured in a CUDA graph where it can be, so that host time stays out. The L2 cache is flushed before
every run by reading four times its size: reading leaves no dirty lines behind, whose writing back would be timed too.
Events stand around the run; warm-up and compilation happen before. On a CPU the clock is the host's and the caches are
warm.
"""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from moesparse.system.installation import installed_version
from moesparse_kernels.native_library import native_path

__all__ = ["Ceilings", "Timing", "environment", "measure_ceilings", "time_call"]

_MIN_REPEATS, _MAX_REPEATS = 10, 100


@dataclass(frozen=True)
class Timing:
    """Seconds of one call.

    Attributes:
        median: of the repeats.
        low: their 20% quantile.
        high: their 80% quantile.
        repeats: calls timed.
        graph: whether a CUDA graph was replayed; else the time holds the host's work too.
    """

    median: float
    low: float
    high: float
    repeats: int
    graph: bool

    def as_row(self) -> dict[str, Any]:
        """us, us_20, us_80, repeats, graph."""
        return {
            "us": self.median * 1e6,
            "us_20": self.low * 1e6,
            "us_80": self.high * 1e6,
            "repeats": self.repeats,
            "graph": self.graph,
        }


@cache
def _flush_buffer(device: torch.device) -> torch.Tensor:
    # an int32 for each byte of the cache: four times its size
    return torch.ones(torch.cuda.get_device_properties(device).L2_cache_size, dtype=torch.int32, device=device)


def _capture(call: Callable[[], Any]) -> torch.cuda.CUDAGraph | None:
    """A graph of the call, or None when it cannot be captured."""
    here, stream = torch.cuda.current_stream(), torch.cuda.Stream()
    stream.wait_stream(here)
    with torch.cuda.stream(stream):
        call()
    here.wait_stream(stream)
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    try:
        with torch.cuda.graph(graph, pool=pool):
            call()
    except RuntimeError:
        # torch leaves its capture stream current and the pool open, and then no later call could be captured
        torch.cuda.set_stream(here)
        with contextlib.suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(here.device_index, pool)  # type: ignore[attr-defined]
            torch._C._cuda_releasePool(here.device_index, pool)  # type: ignore[attr-defined]
        torch.cuda.synchronize()
        return None
    return graph


def _quantiles(seconds: list[float], graph: bool) -> Timing:
    low, median, high = torch.tensor(seconds, dtype=torch.float64).quantile(
        torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    )
    return Timing(float(median), float(low), float(high), len(seconds), graph)


def time_call(
    call: Callable[[], Any],
    device: torch.device,
    *,
    graph: bool = True,
    flush: bool = True,
    budget: float = 0.06,
) -> Timing:
    """Median seconds of a call and their 20-80% range.

    Args:
        call: what is timed; its result is dropped.
        device: where it runs.
        graph: replay a CUDA graph when the call can be captured. False for calls that wait for the device.
        flush: empty the L2 cache before every run.
        budget: seconds to spend on the timed runs; there are 10 at least and 100 at most.
    """
    call()
    if device.type != "cuda":
        seconds: list[float] = []
        while len(seconds) < 5 or (sum(seconds) < budget and len(seconds) < _MAX_REPEATS):
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
        return _quantiles(seconds, graph=False)

    torch.cuda.synchronize(device)
    captured = _capture(call) if graph else None
    run = call if captured is None else captured.replay
    buffer = _flush_buffer(device) if flush else None

    def timed(repeats: int) -> list[float]:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        for start, stop in events:
            if buffer is not None:
                buffer.sum()
            start.record()
            run()
            stop.record()
        torch.cuda.synchronize(device)
        return [start.elapsed_time(stop) / 1e3 for start, stop in events]

    estimate = sorted(timed(3))[1]
    return _quantiles(
        timed(min(_MAX_REPEATS, max(_MIN_REPEATS, round(budget / max(estimate, 1e-6))))), graph=captured is not None
    )


@dataclass(frozen=True)
class Ceilings:
    """The two rates of a device that bound every kernel, measured.

    Attributes:
        copy: bytes per second of a large copy, bytes read plus bytes written.
        matmul: dense floating-point operations per second of a large bf16 product of random matrices.
    """

    copy: float
    matmul: float

    def floor(self, moved: float, flops: float) -> float:
        """Seconds no dense kernel goes below: the larger of bytes over `copy` and operations over `matmul`."""
        return max(moved / self.copy, flops / self.matmul)

    def as_row(self) -> dict[str, Any]:
        return {"copy_gb_s": self.copy / 1e9, "matmul_tflop_s": self.matmul / 1e12}


def measure_ceilings(device: torch.device) -> Ceilings:
    """Copy 1 GiB and multiply 8192-square bf16 matrices; on a CPU 32 MiB and 256-square."""
    on_gpu = device.type == "cuda"
    source = torch.randint(0, 2**31 - 1, (2**28 if on_gpu else 2**23,), dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    copy = time_call(lambda: target.copy_(source), device, flush=False, budget=0.1)
    size = 8192 if on_gpu else 256
    left, right = (torch.randn(size, size, device=device).to(torch.bfloat16) for _ in range(2))
    matmul = time_call(lambda: left @ right, device, flush=False, budget=0.2)
    return Ceilings(2 * source.nbytes / copy.median, 2 * size**3 / matmul.median)


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=20, cwd=Path(__file__).resolve().parents[2]
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


@cache
def _commit() -> str:
    """$MOESPARSE_COMMIT, else git's last commit to the code, "-dirty" when it differs, else "unknown"."""
    if os.environ.get("MOESPARSE_COMMIT"):
        return os.environ["MOESPARSE_COMMIT"]
    # results and launch tables are what a run writes: they do not make the code another
    code = ("--", "kernels", "moesparse", "benchmarks", ":!benchmarks/results", ":!*/configs/*.json")
    commit = _output("git", "log", "-1", "--format=%h", *code)
    changed = _output("git", "status", "--porcelain", "--untracked-files=no", *code)
    return commit + ("-dirty" if changed else "") if commit else "unknown"


def environment(device: torch.device) -> dict[str, Any]:
    """The machine and the software, as one flat record; on a GPU with its clocks as they are now, in MHz."""
    record: dict[str, Any] = {
        "device": platform.machine() + " CPU",
        "torch": torch.__version__,
        "triton": installed_version("triton"),
        "transformers": installed_version("transformers"),
        "python": platform.python_version(),
        "commit": _commit(),
    }
    if device.type != "cuda":
        threads, load = torch.get_num_threads(), round(os.getloadavg()[0], 1)
        return record | {"threads": threads, "load": load, "native_path": native_path()}
    properties = torch.cuda.get_device_properties(device)
    fields = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit")
    query = _output(
        "nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits", "-i", str(device.index or 0)
    )
    values = query.split(", ") if query else [None] * len(fields)
    return record | {
        "device": torch.cuda.get_device_name(device),
        "cuda": torch.version.cuda,
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        **{field.replace(".", "_"): value for field, value in zip(fields, values, strict=True)},
    }
