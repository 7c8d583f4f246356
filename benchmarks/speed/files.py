"""What the benchmarks of whole files share: random bytes, a cold page cache, the copy that others are measured by."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.results import RESULTS
from moesparse.benchmarking import environment

__all__ = ["by_turns", "copy_runs", "drop_from_cache", "pruned", "random_bytes", "run_benchmark", "watched"]

Run = tuple[Path, int, int]
"""Bytes of a file: first, and behind the last."""

_POOL_BYTES, _AT_ONCE, _BUFFER = 2**26, 2**26, 2**24
# how often the memory of a process is read, in seconds
_EVERY = 0.02


def random_bytes(count: int, start: int, pool: list[bytes]) -> Iterator[bytes]:
    """So many bytes out of a pool of 64 MiB that is drawn once; another start gives other bytes.

    Two bits are always zero: read as FP8 or bfloat16 the numbers are finite, and so are their products.
    """
    if not pool:
        pool.append((np.random.default_rng(0).integers(0, 256, _POOL_BYTES, np.uint8) & 0xBE).tobytes())
    while count:
        at = start * 4099 % (_POOL_BYTES // 2)
        data = pool[0][at : at + min(count, _POOL_BYTES // 2)]
        yield data
        count, start = count - len(data), start + 1


def drop_from_cache(files: Iterable[Path]) -> None:
    """Have the system forget what it holds of these files, which were flushed: the next reading is the disk's."""
    for path in files:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copy_runs(runs: Sequence[Run], out: Path) -> float:
    """Seconds to copy bytes into one new file and flush it, within the kernel as `cp` does."""
    started = time.perf_counter()
    with out.open("xb", buffering=0) as new:
        for path, start, stop in joined(runs):
            with path.open("rb", buffering=0) as old:
                while start < stop:
                    done = os.copy_file_range(old.fileno(), new.fileno(), min(stop - start, _AT_ONCE), start)
                    if not done:
                        raise OSError(f"{path} has become shorter")
                    start += done
        os.fsync(new.fileno())
    return time.perf_counter() - started


def joined(runs: Iterable[Run]) -> list[Run]:
    """The same bytes with those that lie side by side as one run."""
    found: list[Run] = []
    for path, start, stop in sorted(runs):
        if found and found[-1][0] == path and found[-1][2] == start:
            found[-1] = (path, found[-1][1], stop)
        else:
            found.append((path, start, stop))
    return found


def pruned(source: Path, out: Path, plan: Path) -> dict[str, Any]:
    """`watched`, of the removal by a plan in one thread."""
    command = [sys.executable, "-m", "moesparse", "prune", str(source), str(out), "--plan", str(plan), "--json"]
    return watched(command, {"OMP_NUM_THREADS": "1"})


def by_turns(
    runs: Sequence[Run], work: Path, remove: Callable[[], dict[str, Any]], check: Callable[[], None], turns: int
) -> dict[str, Any]:
    """A copy of the bytes that stay and their removal's command by turns, each from a cold cache.

    Args:
        runs: the bytes that stay.
        work: a folder of the disk.
        remove: gives what `pruned` gives.
        check: looks at the result and removes it, for there may be no room for a copy beside it.
        turns: of the command, between one copy more.

    Returns:
        What `pruned` gave in its quickest turn, the seconds of all turns, and the ratio of the quickest ones.
    """
    files = sorted({path for path, *_ in runs})

    def copied() -> float:
        drop_from_cache(files)
        seconds = copy_runs(runs, work / "copy")
        (work / "copy").unlink()
        print(f"copied in {seconds:.1f} s", flush=True)
        return seconds

    copies, found, loads = [copied()], list[dict[str, Any]](), list[float]()
    for _ in range(turns):
        drop_from_cache(files)
        loads.append(os.getloadavg()[0])
        found.append(remove())
        print(f"removed in {found[-1]['seconds']:.1f} s, load {loads[-1]:.1f}", flush=True)
        check()
        copies.append(copied())
    best = min(found, key=lambda turn: turn["seconds"])
    return best | {
        "copied": sum(stop - start for _, start, stop in runs),
        "copy_seconds": copies,
        "removal_seconds": [turn["seconds"] for turn in found],
        "loads": loads,
        "ratio": best["seconds"] / min(copies),
        "anonymous": max(turn["anonymous"] for turn in found),
    }


def run_benchmark(
    name: str,
    doc: str | None,
    measure: Callable[[Path, float], dict[str, Any]],
    gigabytes: float,
    arguments: list[str] | None,
) -> None:
    """The command line of a benchmark of one row.

    Args:
        name: of the benchmark and its result file.
        doc: what it says of itself.
        measure: gives the row, of a work folder and gigabytes.
        gigabytes: where the command names none.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=gigabytes, help=f"that are read ({gigabytes:g})")
    parser.add_argument("--work", type=Path, help="a folder on the disk to be measured (a temporary one)")
    parser.add_argument("-o", "--output", type=Path, help=f"result file (results/cpu/{name}.json)")
    parser.add_argument("--show", action="store_true", help="measure nothing, print what the result file holds")
    options = parser.parse_args(arguments)
    file = options.output or RESULTS / "cpu" / f"{name}.json"
    if not options.show:
        work = Path(tempfile.mkdtemp(dir=options.work))
        try:
            row = measure(work, options.gigabytes)
        finally:
            shutil.rmtree(work)
        file.parent.mkdir(parents=True, exist_ok=True)
        result = {"benchmark": name, "environment": environment(torch.device("cpu")), "rows": [row]}
        file.write_text(json.dumps(result, indent=1) + "\n")
    for row in json.loads(file.read_text())["rows"]:
        show(row)


def show(row: dict[str, Any]) -> None:
    """A row of `by_turns` in words, beside the same command on next to nothing, "bare"."""
    copies, removals = (", ".join(f"{each:.0f}" for each in row[f"{what}_seconds"]) for what in ("copy", "removal"))
    bare, loads = row["bare"], ", ".join(f"{each:.1f}" for each in row["loads"])
    print(
        f"{row['bytes_before'] / 1e9:.1f} GB, {row['layers']} layers, {row['tensors']:,} tensors -> "
        f"{row['bytes_after'] / 1e9:.1f} GB\n"
        f"removals {removals} s ({row['cpu_seconds']:.0f} s of CPU; load {loads}), copies {copies} s: ratio "
        f"{row['ratio']:.2f}; next to nothing takes {bare['seconds']:.0f} s ({bare['cpu_seconds']:.0f} s of CPU)\n"
        f"memory: {row['anonymous'] / 1e6:.0f} MB of its own (next to nothing {bare['anonymous'] / 1e6:.0f}), "
        f"{row['mapped'] / 1e6:.0f} MB mapped ({bare['mapped'] / 1e6:.0f}); a layer has {row['layer_bytes'] / 1e6:.0f}"
    )


def watched(command: Sequence[str], environment: dict[str, str] | None = None) -> dict[str, Any]:
    """Run a command; its seconds, CPU seconds, and the most memory it had.

    Returns:
        "seconds", "cpu_seconds", and bytes: "resident" at most (VmHWM), and of what was sampled every 20 ms the most
        that was its own ("anonymous") and that was mapped from files ("mapped").

    Raises:
        RuntimeError: the command failed; with what it said.
    """
    peaks = {"VmHWM": 0, "RssAnon": 0, "RssFile": 0}
    before, started = os.times(), time.perf_counter()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | (environment or {})
    ) as process:
        status = Path(f"/proc/{process.pid}/status")
        while process.poll() is None:
            for line in status.read_text().splitlines():
                name, _, value = line.partition(":")
                if name in peaks:
                    peaks[name] = max(peaks[name], int(value.split()[0]) * 1024)
            time.sleep(_EVERY)
        out, error = process.communicate()
    seconds, after = time.perf_counter() - started, os.times()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {error or out}")
    used = after.children_user + after.children_system - before.children_user - before.children_system
    memory = {"resident": peaks["VmHWM"], "anonymous": peaks["RssAnon"], "mapped": peaks["RssFile"]}
    return {"seconds": seconds, "cpu_seconds": used, **memory}
