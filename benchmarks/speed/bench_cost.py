"""What pruning a checkpoint costs: seconds = a * tokens * active parameters + b * weights, fitted and checked.

    python -m benchmarks.speed.bench_cost --windows 8         # four sizes on a CPU, 6 minutes
    python -m benchmarks.speed.bench_cost --replan            # what the plan says now of the runs in the file
    python -m benchmarks.speed.bench_cost --dry --results out # tiny: everything runs, the figures mean nothing
    make gpu PART=cost                                        # whole blocks of published shapes on the GPU

Synthetic Mixtral checkpoints (random weights, bf16) are pruned to 2:4 from folder to folder, reading and writing
included. A token passes each active parameter of the decoder layers once for the sums and once for the next layer's
input (but for the last one), and once more to rescale; weights are those of the experts. Magnitude runs nothing and is
all weights. a and b are fitted by least
squares of the relative error to the moe-pruner runs of the first two sizes; the others are forecast: a larger one, and
one of many small experts. On a CPU seconds are CPU seconds of one thread, on a GPU those of the clock. gated-sparsegpt
adds second moments and a factorisation, whose cost grows with the matrices' width: the formula does not hold for it,
and its rows show by how much. The plan's seconds are those at the rates of matrix products measured beside each run, by
the same clock. A quarter of the experts is removed as well: by their sums alone, which is one pass and
no work on weights, and with the refit, which the formula leaves out.
"""

from __future__ import annotations

import math
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import moesparse
from benchmarks.results import RESULTS, ResultFile, device_folder
from benchmarks.speed.common import parser
from benchmarks.speed.synthetic import make_checkpoint, make_config, random_windows
from moesparse.benchmarking import environment
from moesparse.calibration.plan import head_size
from moesparse.models.meta import meta_model
from moesparse.pruning.plan import plan_run
from moesparse.system.memory import bound_compiled_products, peak_memory, reset_peak_memory
from moesparse.system.speed import gemm_rate

# recipe, passes over all layers, passes less over the last one
RECIPES: dict[str, tuple[dict[str, Any], int, int]] = {
    "magnitude, none": ({"weights": "2:4", "saliency": "magnitude", "update": "none"}, 0, 0),
    "moe-pruner, none": ({"weights": "2:4", "saliency": "moe-pruner", "update": "none"}, 2, 1),
    "moe-pruner, rescale": ({"weights": "2:4", "saliency": "moe-pruner", "update": "rescale"}, 3, 1),
    "gated-sparsegpt, obs": ({"weights": "2:4", "saliency": "gated-sparsegpt", "update": "obs"}, 2, 1),
    "reap 25%": ({"weights": None, "experts": 0.25, "update": "none"}, 1, 0),
    "reap 25%, refit": ({"weights": None, "experts": 0.25, "update": "least-squares"}, 4, 0),
}
FITTED = ("moe-pruner, none", "moe-pruner, rescale")
# layers, hidden, intermediate, experts, top_k, heads
CPU_SIZES = {
    "small": (3, 512, 1024, 8, 2, 8),
    "medium": (3, 1024, 2048, 8, 2, 8),
    "large": (2, 1536, 3072, 8, 2, 12),
    "many experts": (2, 768, 288, 64, 8, 12),
}
GPU_SIZES = {
    "OLMoE-1B-7B": (2, 2048, 1024, 64, 8, 16),
    "Qwen3-30B-A3B": (2, 2048, 768, 128, 8, 32),
    "Mixtral-8x7B": (1, 4096, 14336, 8, 2, 32),
}
DRY_SIZES = {"small": (1, 64, 64, 4, 2, 4), "large": (2, 64, 128, 4, 2, 4)}
DRY_RATES = [1e9, 1e9]
LENGTH = {"cpu": 256, "cuda": 2048}
WINDOWS = {"cpu": (4, 12), "cuda": (32, 128)}
BATCH = 8


def measure(
    source: Path,
    out: Path,
    size: str,
    name: str,
    windows: torch.Tensor,
    device: str,
    rates: list[float] | None = None,
) -> dict[str, Any]:
    """Seconds of one run, peak bytes of the process, and what the plan knew of it before.

    `rates`: of products in fp32 and in bf16, measured when None.
    """
    recipe = moesparse.Recipe(**RECIPES[name][0])
    clock = time.process_time if device == "cpu" else time.perf_counter
    if rates is None:
        rates = [gemm_rate(torch.device(device), dtype, clock) for dtype in (torch.float32, torch.bfloat16)]
    reset_peak_memory()
    began = clock()
    calibration = None if recipe.reads_weights_alone else windows
    moesparse.prune_checkpoint(source, out, calibration, recipe, batch_size=BATCH, device=device)
    seconds = clock() - began
    shutil.rmtree(out)
    row = {"part": "cost", "shape": size, "contender": name, "windows": list(windows.shape)}
    return planned(source, row | {"seconds": seconds, "peak": peak_memory(), "rates": rates})


def planned(source: Path, row: dict[str, Any]) -> dict[str, Any]:
    """A row with what the formula and the plan know from config.json alone."""
    rules, passes, less = RECIPES[row["contender"]]
    recipe = moesparse.Recipe(**rules)
    windows, length = (0, 1) if recipe.reads_weights_alone else row["windows"]
    model = meta_model(source)
    blocks = moesparse.find_moe_blocks(model)
    plan = plan_run(model, blocks, recipe, windows=windows, length=length, batch_size=BATCH)
    return row | {
        "tokens": plan.tokens,
        "passes": passes - less / plan.layers,
        "active": plan.active_parameters - head_size(model),
        "weights": sum(matrix.weight.numel() for block in blocks for matrix in block.matrices),
        "planned_seconds": plan.seconds(*row["rates"]),
        "planned_flops": plan.flops,
    }


def plan_again(row: dict[str, Any], size: tuple[int, ...]) -> dict[str, Any]:
    layers, hidden, intermediate, experts, top_k, heads = size
    with tempfile.TemporaryDirectory() as work:
        make_config(Path(work) / "model", layers, hidden, intermediate, experts=experts, top_k=top_k, heads=heads)
        return planned(Path(work) / "model", row)


def fit(rows: list[dict[str, Any]]) -> tuple[float, float]:
    """a, seconds for a token, an active parameter and a pass; b, seconds for a weight."""
    work = torch.tensor([[row["passes"] * row["tokens"] * row["active"], row["weights"]] for row in rows]).double()
    seconds = torch.tensor([row["seconds"] for row in rows]).double()
    a, b = torch.linalg.lstsq(work / seconds[:, None], torch.ones(len(rows), 1).double()).solution.flatten().tolist()
    return a, b


def forecast(row: dict[str, Any], a: float, b: float) -> float:
    """Seconds of the formula; work on weights is that of pruning them."""
    prunes = RECIPES[row["contender"]][0]["weights"] is not None
    return a * row["passes"] * row["tokens"] * row["active"] + b * row["weights"] * prunes


def fitted(rows: list[dict[str, Any]], sizes: Sequence[str]) -> list[dict[str, Any]]:
    """Rows in the order of sizes and recipes, with `fitted`, a, b, and `forecast`; no forecast without rows to fit."""
    rows = sorted(rows, key=lambda row: (list(sizes).index(row["shape"]), list(RECIPES).index(row["contender"])))
    seen = [row for row in rows if row["shape"] in sizes[:2] and row["contender"] in FITTED]
    a, b = fit(seen) if len(seen) > 1 else (math.nan, math.nan)
    return [{**row, "fitted": row in seen, "a": a, "b": b, "forecast": forecast(row, a, b)} for row in rows]


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Measured against forecast, one marker for a recipe."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(5.6, 4.4))
    colours = ("#56B4E9", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
    for name, marker, colour in zip(RECIPES, "posD^v", colours, strict=True):
        for seen in (True, False):
            chosen = [row for row in rows if row["contender"] == name and row["fitted"] == seen]
            if chosen:
                axes.plot(
                    [row["forecast"] for row in chosen],
                    [row["seconds"] for row in chosen],
                    marker,
                    color=colour,
                    fillstyle="full" if seen else "none",
                    label=name + ("" if seen else " (not fitted)"),
                )
    ends = [min(row["seconds"] for row in rows), max(row["seconds"] for row in rows)]
    axes.plot(ends, ends, color="#444444", linewidth=1, linestyle="--")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("a * tokens * active * passes + b * weights, seconds")
    axes.set_ylabel("measured, seconds")
    axes.legend(fontsize=7, frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def show(rows: list[dict[str, Any]]) -> None:
    """The table of docs/performance.md."""
    print(f"\na = {rows[0]['a']:.3g} s per token, active parameter and pass; b = {rows[0]['b']:.3g} s per weight")
    print("\n| size | recipe | tokens | active | weights | seconds | a, b say | plan says |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['shape']} | {row['contender']} | {row['tokens']:,} | {row['active'] / 1e6:.1f} M | "
            f"{row['weights'] / 1e6:.0f} M | {row['seconds']:.1f} | {row['forecast']:.1f} | "
            f"{row['planned_seconds']:.1f} |"
        )


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument(
        "--recipes", nargs="+", choices=RECIPES, default=list(RECIPES), help="moe-pruner's are fitted"
    )
    arguments.add_argument("--windows", type=int, nargs="+", help="sizes of the calibration set")
    arguments.add_argument("--name", default="cost", help="of the result file and the figure (cost)")
    arguments.add_argument("--replan", action="store_true", help="measure nothing: plan the runs in the file again")
    arguments.add_argument("--device", choices=("cpu", "cuda"), help="the GPU when there is one")
    options = arguments.parse_args()
    if options.dry and options.results is None:
        raise SystemExit("--dry needs --results FOLDER: its numbers do not belong in benchmarks/results")
    device = options.device or ("cuda" if torch.cuda.is_available() and not options.dry else "cpu")
    sizes = DRY_SIZES if options.dry else CPU_SIZES if device == "cpu" else GPU_SIZES
    chosen = [name for name in sizes if not options.shapes or name in options.shapes]
    if not chosen:
        raise SystemExit(f"--shapes must name some of {', '.join(sizes)}; got {', '.join(options.shapes)}")
    folder = device_folder(options.results or RESULTS, torch.device(device))
    file = ResultFile(folder / f"{options.name}.json", environment(torch.device(device)))
    if options.replan:
        file.rows = [plan_again(row, sizes[row["shape"]]) for row in file.rows]
        file.put([])
        chosen = []
    bound_compiled_products()
    if device == "cpu":
        torch.set_num_threads(1)
    warm, rates = options.dry, DRY_RATES if options.dry else None
    for size in chosen:
        layers, hidden, intermediate, experts, top_k, heads = sizes[size]
        with tempfile.TemporaryDirectory() as work:
            source, out = Path(work) / "model", Path(work) / "out"
            make_checkpoint(source, layers, hidden, intermediate, experts=experts, top_k=top_k, heads=heads)
            # a dry run needs a second size to fit, not all of its recipes
            names = options.recipes if size == chosen[0] or not options.dry else FITTED[:1]
            for name in names:
                length = 64 if options.dry else LENGTH[device]
                counts = options.windows or ((2,) if options.dry else WINDOWS[device])
                for count in counts if RECIPES[name][1] else counts[:1]:
                    if file.has(shape=size, windows=[count, length], contenders=[name]) and not options.again:
                        continue
                    windows = random_windows(count, length)
                    if not warm:  # libraries load, kernels compile
                        measure(source, out, size, name, windows, device)
                        warm = True
                    row = measure(source, out, size, name, windows, device, rates)
                    file.put([row])
                    print(f"{size}, {name}, {count} windows: {row['seconds']:.1f} s", flush=True)
    rows = fitted(file.rows, list(sizes))
    show(rows)
    draw(rows, folder / f"{options.name}.png")


if __name__ == "__main__":
    main()
