"""A packed matrix made dense on this CPU: by the compiled kernels, and by torch as where there are none.

    python -m benchmarks.speed.bench_unpack

One matrix of Mixtral-8x7B, 14336 x 4096, as `moesparse unpack`, `inspect --verify` and prefill unpack it, into memory
that is there. By turns, the best of each; with one thread its own CPU time. Other bits than those of the mask end it.
"""

from __future__ import annotations

import argparse
import itertools
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.results import RESULTS, ResultFile, device_folder
from benchmarks.speed.bench_cpu import CPU, threads_of_torch
from moesparse.benchmarking import environment
from moesparse_kernels import reference
from moesparse_kernels.native_library import library, reason_without, turned_off
from moesparse_kernels.row_order import decode_rows

__all__ = ["main"]

ROWS, COLUMNS = 14336, 4096
KINDS = ((torch.bfloat16, 2, 4), (torch.bfloat16, 4, 8), (torch.float32, 2, 4))


def measure(
    rows: int, columns: int, dtype: torch.dtype, n: int, m: int, threads: int, seconds: float
) -> list[dict[str, Any]]:
    """A row for each of the two ways."""
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(1, rows, columns, generator=random).to(dtype)
    values, index = reference.nm_prune_packed(weight, torch.ones(1, columns), n, m)
    outs = {way: torch.zeros_like(weight[0]) for way in ("native", "torch")}
    times: dict[str, list[float]] = {way: [] for way in outs}

    def once(way: str) -> None:
        started = (time.perf_counter(), time.thread_time())
        decode_rows(values[0], index[0], n, m, outs[way])
        passed = (time.perf_counter() - started[0], time.thread_time() - started[1])
        times[way].append(passed[1] if threads == 1 else passed[0])

    until = time.perf_counter() + seconds
    with threads_of_torch(threads):
        while len(times["native"]) < 5 or time.perf_counter() < until:
            once("native")
            with turned_off():
                once("torch")
    if not torch.equal(*outs.values()) or not torch.equal(
        outs["native"], reference.nm_prune(weight, torch.ones(1, columns), n, m)[0]
    ):
        raise SystemExit(f"{n}:{m} of {dtype} is unpacked to other bits")
    same = {
        "shape": f"{rows} x {columns}",
        "dtype": str(dtype).removeprefix("torch."),
        "op": f"{n}:{m}",
        "threads": threads,
    }
    return [same | {"contender": way, "best_us": min(found) * 1e6, "turns": len(found)} for way, found in times.items()]


def main(arguments: list[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--threads", nargs="*", type=int, default=[1, 2])
    options.add_argument("--seconds", type=float, default=3.0, help="for each row")
    options.add_argument("--size", nargs=2, type=int, default=[ROWS, COLUMNS], metavar=("ROWS", "COLUMNS"))
    options.add_argument("--results", type=Path, default=RESULTS, help="folder of the results (benchmarks/results)")
    chosen = options.parse_args(arguments)
    if library() is None:
        raise SystemExit(f"there are no compiled kernels to measure: {reason_without()}")
    results = ResultFile(device_folder(chosen.results, CPU) / "unpack.json", environment(CPU))
    for (dtype, n, m), threads in itertools.product(KINDS, chosen.threads):
        rows = measure(*chosen.size, dtype, n, m, threads, chosen.seconds)
        results.put(rows)
        for row in rows:
            case = f"{row['shape']} {row['dtype']} {row['op']} {row['threads']} threads"
            print(f"{case} {row['contender']:<8}{row['best_us'] / 1e3:>8.2f} ms", flush=True)


if __name__ == "__main__":
    main()
