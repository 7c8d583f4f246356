"""The expert layer on a CPU: packed 2:4 weights by the compiled kernels beside every dense layer there is.

    make bench-cpu                                           # the shapes below, one thread and two
    make bench-cpu ARGS="--shapes OLMoE-1B-7B --tokens 1 16 --threads 1 --routing uniform"
    python -m benchmarks.speed.cpu_tables                    # of the results there are, as in README and docs

Contenders take turns in one process, each turn with another routing (16 of them), so that weights come from memory and
a disturbance hits all alike. Each is compared with fp64 first. A row holds the best and the median of its turns: by the
clock, or with one thread by the thread's own CPU time, which can be compared on a busy machine too. `ratio` is the
fastest dense layer's time over the contender's, in the turns that both had. `read` is a plain read of the packed bytes
of the experts that have tokens. Rows that were measured together have the same `run`. Losses are printed like wins.

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
import torch.nn.functional as F

from benchmarks.results import RESULTS, ResultFile, device_folder
from moesparse.benchmarking import SHAPES, Shape, environment
from moesparse.benchmarking.layer import ROUTINGS, ExpertLayer, RoutedCall, make_layer
from moesparse_kernels import moe_dense, moe_nm
from moesparse_kernels.native_library import Native, library, reason_without, turned_off

__all__ = ["CALLS", "CONTENDERS", "CPU", "main", "threads_of_torch"]

CPU = torch.device("cpu")
DEFAULT_SHAPES = ("Qwen3-30B-A3B", "OLMoE-1B-7B", "DeepSeek-V2-Lite", "gpt-oss-20b", "Mixtral-8x7B")
TOKENS = (1, 4, 16, 64, 256, 512)
CALLS = 16
# dense and packed weights of a layer, and what making them takes for a moment
_BYTES_PER_WEIGHT = 2 + 9 / 8 + 1

Run = Callable[[RoutedCall], torch.Tensor]


def _torch_eager(call: RoutedCall) -> torch.Tensor:
    """What transformers' experts do when they are run as they are: a loop over those with tokens, torch's linear."""
    layer = call.layer
    x, ids, gates = call.routed
    module: Any = layer.transformers_module
    out = torch.zeros_like(x)
    chosen = F.one_hot(ids, layer.shape.num_experts).permute(2, 1, 0)
    for e in chosen.sum(dim=(-1, -2)).nonzero().flatten().tolist():
        choice, token = torch.where(chosen[e])
        bias = (None, None) if layer.gate_up_bias is None else (layer.gate_up_bias[e], layer.down_bias[e])  # type: ignore[index]
        hidden = module._apply_gate(F.linear(x[token], layer.gate_up[e], bias[0]))
        rows = F.linear(hidden, layer.down[e], bias[1]) * gates[token, choice, None]
        out.index_add_(0, token, rows.to(out.dtype))
    return out


def _without_onednn(call: RoutedCall) -> torch.Tensor:
    with torch.backends.mkldnn.flags(enabled=False):
        return _torch_eager(call)


def _grouped_mm(call: RoutedCall) -> torch.Tensor:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    return ALL_EXPERTS_FUNCTIONS["grouped_mm"](call.layer.transformers_module, *call.routed)


def _packed(backend: str) -> Run:
    def run(call: RoutedCall) -> torch.Tensor:
        layer = call.layer
        return moe_nm(*call.routed, layer.packed_gate_up, layer.packed_down, **layer.options, backend=backend)

    return run


def _dense_native(call: RoutedCall) -> torch.Tensor:
    layer = call.layer
    return moe_dense(*call.routed, layer.gate_up, layer.down, **layer.options, backend="native")


def _packed_before(call: RoutedCall) -> torch.Tensor:
    with turned_off():
        return _packed("reference")(call)


# name -> the call, and whether it is a dense layer anybody has without this package
CONTENDERS: dict[str, tuple[Run, bool]] = {
    "packed": (_packed("auto"), False),
    "packed native": (_packed("native"), False),
    "packed before": (_packed_before, False),
    "dense native": (_dense_native, False),
    "transformers eager": (_torch_eager, True),
    "transformers grouped_mm": (_grouped_mm, True),
    "eager, oneDNN off": (_without_onednn, True),
}


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
        errors[name] = calls[0].verify(CONTENDERS[name][0](calls[0]), slack=2.0)
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
            do = (lambda call: _read_experts(native, call)) if name == "read" else CONTENDERS[name][0]
            clock, own = time.perf_counter(), time.thread_time()
            do(call)
            turns[name].append((time.perf_counter() - clock, time.thread_time() - own))
            spent[name] += turns[name][-1][0]
    moved = {True: calls[0].moved(True), False: calls[0].moved(False)}
    kind = 1 if threads == 1 else 0
    times = {name: [turn[kind] for turn in found] for name, found in turns.items()}
    dense = [name for name in wanted if CONTENDERS[name][1]]
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
            "gb_s": moved[name == "read" or name.startswith("packed")] / min(times[name]) / 1e9,
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
    results = ResultFile(device_folder(chosen.results, CPU) / "bench_cpu.json", environment(CPU))
    native = library()
    if native is None:
        raise SystemExit(f"there are no compiled kernels to measure: {reason_without()}")
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
