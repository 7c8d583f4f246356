"""Seconds, CPU seconds and peak memory of a run from folder to folder; plain Python, for every environment."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["Clock", "serve"]


def _peak() -> int:
    """Bytes: largest resident memory of this process since the last reset (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status must have a line VmHWM, got none: peak memory is measured on Linux only")


class Clock:
    """Started when it is made; `prune` marks the part between loading and saving, where a contender can tell."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        self._memory = _peak()
        self._wall, self._cpu = time.perf_counter(), time.process_time()
        self._prune: dict[str, float] = {}

    def prune(self, call: Callable[[], Any]) -> Any:
        """Run the call, which neither loads nor saves."""
        wall, cpu = time.perf_counter(), time.process_time()
        result = call()
        self._prune = {"prune_seconds": time.perf_counter() - wall, "prune_cpu_seconds": time.process_time() - cpu}
        return result

    def row(self) -> dict[str, float]:
        """What the run took until now; the peak is over the memory held when the clock was made."""
        return {
            "seconds": time.perf_counter() - self._wall,
            "cpu_seconds": time.process_time() - self._cpu,
            "peak_bytes": _peak() - self._memory,
            **self._prune,
        }


def serve(
    run: Callable[[dict[str, Any], Clock], Any],
    versions: dict[str, str],
    look: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
) -> None:
    """Do the job of this process's one argument and print its row as the last line.

    The job: {"source": folder, "out": folder, "windows": file, "batch_size": int, "options": {...}, "warm_up": {...}},
    where the last names another source, windows and folder: a run that comes first and is not counted, and loads every
    library.

    Args:
        run: does a job; a clock has been started for it.
        versions: of what does the work.
        look: finds out about the job what its folder does not tell, once it is done and measured, where the job has
            "look".
    """
    job = json.loads(sys.argv[1])
    run({**job, **job["warm_up"]}, Clock())
    clock = Clock()
    run(job, clock)
    row = {**clock.row(), "versions": versions}
    if look is not None and job.get("look"):
        row["looked"] = look(job)
    print(json.dumps(row))
