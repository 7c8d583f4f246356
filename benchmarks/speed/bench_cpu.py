"""The expert layer on a CPU: packed 2:4 weights by the compiled kernels beside every dense layer there is.

    make bench-cpu                                           # the shapes below, one thread and two
    make bench-cpu ARGS="--shapes OLMoE-1B-7B --tokens 1 16 --threads 1 --routing uniform"
    MOESPARSE_NATIVE_PATH=avx2 make bench-cpu                # another instruction path than the CPU's best
    python -m benchmarks.speed.cpu_tables                    # of the results there are, as in README and docs

Contenders take turns in one process, each turn with another routing (16 of them), so that weights come from memory and
a disturbance hits all alike. Each is compared with fp64 first. A row holds the best and the median of its turns: by the
clock, or with one thread by the thread's own CPU time, which can be compared on a busy machine too. `ratio` is the
fastest dense layer's time over the contender's, in the turns that both had. `read` is a plain read of the packed bytes
of the experts that have tokens. Rows that were measured together have the same `run`. Losses are printed like wins.

What another path than the best one does is a result file of its own, bench_cpu_avx2.json; torch uses what the CPU has.

A run that was cut off goes on where it stopped: what this commit has measured is left out, unless --again is given.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.results import RESULTS, ResultFile, device_folder
from benchmarks.speed.cpu_contenders import CONTENDERS
from moesparse.benchmarking import SHAPES, Shape, environment
from moesparse.benchmarking.layer import ROUTINGS, ExpertLayer, RoutedCall, make_layer
from moesparse_kernels.native_library import Native, library, reason_without

__all__ = ["CALLS", "CPU", "main", "threads_of_torch"]

CPU = torch.device("cpu")
DEFAULT_SHAPES = ("Qwen3-30B-A3B", "OLMoE-1B-7B", "DeepSeek-V2-Lite", "gpt-oss-20b", "Mixtral-8x7B")
TOKENS = (1, 4, 16, 64, 256, 512)
CALLS = 16
# dense and packed weights of a layer, those of 8 and 4 bits, and what making them takes for a moment
_BYTES_PER_WEIGHT = 2 + 9 / 8 + 2 + 1


@contextmanager
def threads_of_torch(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _read_experts(native: Native, call: RoutedCall) -> None:
    for expert in call.top_k_index.unique().tolist():
        for weight in (call.layer.packed_gate_up, call.layer.packed_down):
            native.read(weight.values[expert])
            native.read(weight.index[expert])


def _ratio(dense: list[float], own: list[float], of: Callable[[list[float]], float]) -> float:
    """Over the turns that both had, which had the same routings."""
    both = min(len(dense), len(own))
    return of(dense[:both]) / of(own[:both])


def measure(
    layer: ExpertLayer, tokens: int, law: str, threads: int, seconds: float, wanted: list[str], native: Native
) -> list[dict[str, Any]]:
    """Rows of one shape, number of tokens, law of routing and number of threads."""
    run = round(time.time())
    calls = [RoutedCall.make(layer, tokens, law, seed) for seed in range(CALLS)]
    errors = {}
    for name in wanted:
        errors[name] = CONTENDERS[name].check(calls[0])
        if not errors[name]["ok"]:
            raise SystemExit(f"{name} is wrong at {tokens} tokens of {layer.shape.name}: {errors[name]}")
    turns: dict[str, list[tuple[float, float]]] = {name: [] for name in [*wanted, "read"]}
    spent = dict.fromkeys(turns, 0.0)
    for turn in range(10**6):
        # the slow ones have fewer turns; all have three
        due = [name for name in turns if turn < 3 or spent[name] < seconds]
        if not due:
            break
        call = calls[turn % CALLS]
        for name in due:
            do = (lambda call: _read_experts(native, call)) if name == "read" else CONTENDERS[name].run
            clock, own = time.perf_counter(), time.thread_time()
            do(call)
            turns[name].append((time.perf_counter() - clock, time.thread_time() - own))
            spent[name] += turns[name][-1][0]
    kind = 1 if threads == 1 else 0
    times = {name: [turn[kind] for turn in found] for name, found in turns.items()}
    dense = [name for name in wanted if CONTENDERS[name].baseline]
    rows = []
    for name in turns:
        row = {
            "shape": layer.shape.name,
            "experts": layer.shape.num_experts,
            "dtype": "bfloat16",
            "tokens": tokens,
            "routing": law,
            "threads": threads,
            "contender": name,
            "run": run,
            "clock": "thread time" if kind else "wall",
            "best_us": min(times[name]) * 1e6,
            "median_us": statistics.median(times[name]) * 1e6,
            "turns": len(times[name]),
            "load_now": round(os.getloadavg()[0], 1),
            "gb_s": CONTENDERS["packed" if name == "read" else name].moved(calls[0]) / min(times[name]) / 1e9,
        }
        if name != "read":
            row["relative_error"] = errors[name]["relative_error"]
        if dense:
            for key, of in (("ratio", min), ("ratio_median", statistics.median)):
                row[key] = min(_ratio(times[other], times[name], of) for other in dense)
        rows.append(row)
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    first = rows[0]
    print(
        f"{first['shape']}, {first['experts']} experts, {first['tokens']} tokens, {first['routing']}, "
        f"{first['threads']} threads, {first['clock']}, load {first['load_now']}"
    )
    for row in rows:
        ratio = f"{row['ratio']:6.2f}x {row['ratio_median']:6.2f}x" if "ratio" in row else ""
        print(
            f"    {row['contender']:<24}{row['best_us'] / 1e3:>10.2f} ms best{row['median_us'] / 1e3:>10.2f} median "
            f"{row['gb_s']:>7.1f} GB/s  {ratio}",
            flush=True,
        )


def fitted(shape: Shape, gigabytes: float) -> Shape:
    """The shape with as many experts as fit; fewer change what a call reads once tokens reach them all."""
    per_expert = 3 * shape.hidden * shape.intermediate * _BYTES_PER_WEIGHT
    fit = int(gigabytes * 1e9 / per_expert)
    if fit >= shape.num_experts:
        return shape
    if fit < shape.top_k:
        raise SystemExit(f"--memory must hold {shape.top_k} experts of {shape.name}, got {gigabytes:g} GB")
    return replace(shape, name=f"{shape.name} ({fit} experts)", num_experts=fit)


def main(arguments: list[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--shapes", nargs="*", default=DEFAULT_SHAPES, choices=SHAPES, metavar="NAME")
    options.add_argument("--tokens", nargs="*", type=int, default=TOKENS)
    options.add_argument("--threads", nargs="*", type=int, default=sorted({1, min(2, os.cpu_count() or 1)}))
    options.add_argument("--routing", nargs="*", default=ROUTINGS, choices=ROUTINGS)
    options.add_argument("--contenders", nargs="*", default=list(CONTENDERS), choices=CONTENDERS, metavar="NAME")
    options.add_argument("--seconds", type=float, default=2.0, help="for each contender of a row")
    options.add_argument("--memory", type=float, default=16.0, help="GB; shapes get fewer experts to stay within")
    options.add_argument("--results", type=Path, default=RESULTS, help="folder of the results (benchmarks/results)")
    options.add_argument("--again", action="store_true", help="measure also what this commit has measured already")
    chosen = options.parse_args(arguments)
    native = library()
    if native is None:
        raise SystemExit(f"there are no compiled kernels to measure: {reason_without()}")
    name = "bench_cpu" if native.path == native.paths[0] else f"bench_cpu_{native.path}"
    results = ResultFile(device_folder(chosen.results, CPU) / f"{name}.json", environment(CPU))
    for name in chosen.shapes:
        shape, layer = fitted(SHAPES[name], chosen.memory), None
        for threads, law, tokens in itertools.product(chosen.threads, chosen.routing, chosen.tokens):
            key = {"shape": shape.name, "threads": threads, "routing": law, "tokens": tokens}
            if results.has(contenders=chosen.contenders, **key) and not chosen.again:
                continue
            layer = layer or make_layer(shape, torch.bfloat16, CPU)
            with torch.inference_mode(), threads_of_torch(threads):
                rows = measure(layer, tokens, law, threads, chosen.seconds, chosen.contenders, native)
            results.put(rows)
            show(rows)


if __name__ == "__main__":
    main()
