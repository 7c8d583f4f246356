"""The expert layer on a CPU: packed 2:4 weights by the compiled kernels beside every dense layer there is.

    make bench-cpu                                           # the shapes below, one thread and two
    python -m benchmarks.speed.bench_cpu --shapes OLMoE-1B-7B --tokens 1 16 --threads 1
    python -m benchmarks.speed.bench_cpu --table             # of the results there are, as in docs/performance.md

Contenders take turns in one process, each turn with another routing (16 of them), so that weights come from memory and
a disturbance hits all alike. Each is compared with fp64 first. A row holds the best and the median of its turns: by the
clock, or with one thread by the thread's own CPU time, which can be compared on a busy machine too. `ratio` is the
fastest dense layer's time over the contender's, in the turns that both had. `read` is a plain read of the packed bytes
of the experts that have tokens. Losses are printed like wins.
"""

from __future__ import annotations

import argparse
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

__all__ = ["main"]

CPU = torch.device("cpu")
DEFAULT_SHAPES = ("Qwen3-30B-A3B", "OLMoE-1B-7B", "DeepSeek-V2-Lite", "gpt-oss-20b", "Mixtral-8x7B")
TOKENS = (1, 4, 16, 64, 512)
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
def _threads(count: int) -> Iterator[None]:
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
            run = (lambda call: _read_experts(native, call)) if name == "read" else CONTENDERS[name][0]
            clock, own = time.perf_counter(), time.thread_time()
            run(call)
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
            "part": f"{threads} threads",
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


def table(rows: list[dict[str, Any]]) -> str:
    """Packed layers in Markdown by their best times, a row for each shape and number of threads."""
    default = ("transformers eager", "transformers grouped_mm")
    dense = tuple(name for name, (_, is_dense) in CONTENDERS.items() if is_dense)
    kept = [row for row in rows if row["routing"] == "uniform"]
    tokens = sorted({row["tokens"] for row in kept})
    lines = [
        f"| a whole layer, {' / '.join(map(str, tokens))} tokens | threads | packed, ms "
        "| times the fastest default dense | times the fastest dense, oneDNN off too | times our own dense |",
        "|---|---|---|---|---|---|",
    ]
    for shape, threads in dict.fromkeys((row["shape"], row["threads"]) for row in kept):
        best = {
            (row["tokens"], row["contender"]): row["best_us"]
            for row in kept
            if (row["shape"], row["threads"]) == (shape, threads)
        }
        columns: list[list[str]] = [[], [], [], []]
        for count in tokens:
            own = best.get((count, "packed"))
            for column, names in zip(columns, ((), default, dense, ("dense native",)), strict=True):
                found = [best[count, name] for name in names if (count, name) in best]
                value = own / 1e3 if own and not names else min(found) / own if own and found else None
                column.append("-" if value is None else f"{value:#.3g}".rstrip("."))
        lines.append(f"| {shape} | {threads} | " + " | ".join(" / ".join(column) for column in columns) + " |")
    return "\n".join(lines)


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
    options.add_argument("--routing", nargs="*", default=["uniform"], choices=ROUTINGS)
    options.add_argument("--contenders", nargs="*", default=list(CONTENDERS), choices=CONTENDERS, metavar="NAME")
    options.add_argument("--seconds", type=float, default=2.0, help="for each contender of a row")
    options.add_argument("--memory", type=float, default=16.0, help="GB; shapes get fewer experts to stay within")
    options.add_argument("--results", type=Path, default=RESULTS, help="folder of the results (benchmarks/results)")
    options.add_argument("--table", action="store_true", help="print the results there are, and measure nothing")
    chosen = options.parse_args(arguments)
    # a row says itself how many threads it had
    machine = {name: value for name, value in environment(CPU).items() if name != "threads"}
    results = ResultFile(device_folder(chosen.results, CPU) / "bench_cpu.json", machine)
    if chosen.table:
        print(table(results.rows))
        return
    native = library()
    if native is None:
        raise SystemExit(f"there are no compiled kernels to measure: {reason_without()}")
    for name in chosen.shapes:
        layer = make_layer(fitted(SHAPES[name], chosen.memory), torch.bfloat16, CPU)
        for threads in chosen.threads:
            for law in chosen.routing:
                for tokens in chosen.tokens:
                    with torch.inference_mode(), _threads(threads):
                        rows = measure(layer, tokens, law, threads, chosen.seconds, chosen.contenders, native)
                    results.put(rows)
                    show(rows)
        del layer


if __name__ == "__main__":
    main()
