"""Peak memory of pruning a checkpoint layer by layer, against the depth of the model.

    python -m benchmarks.speed.bench_memory                 # 12 and 48 layers (10 GB of disk); 15 CPU minutes
    python -m benchmarks.speed.bench_memory --quick         # small layers: it runs, the figures mean little
    python -m benchmarks.speed.bench_memory --table         # of docs/scale.md, from the result file

Synthetic Mixtral checkpoints (random weights, bf16) that differ in nothing but the number of layers are pruned to
2:4, each in a process of its own, by moe-pruner with rescaling (no second moments; layers of 101 MB) and by
gated-sparsegpt with least squares (with them; 14 MB); and a quarter of their experts is removed with refit (26 MB). The
peak is what the run adds to the resident memory of the process (VmHWM), measured after a run of a tiny model that has
loaded every library; and that of every layer by itself, since the highest of more layers is higher where they differ by
chance. Beside it stand what the plan forecast, and the peak of the same work on the smaller model as a whole. What
torch's CPU libraries keep compiled is bounded as in the command line (moesparse.system.memory), and is part of the
peak. Checkpoints lie in a temporary folder.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.speed.common import RESULTS
from benchmarks.speed.synthetic import make_checkpoint, make_config
from moesparse import Recipe, find_moe_blocks
from moesparse.benchmarking import environment
from moesparse.calibration.plan import Plan
from moesparse.models.meta import meta_model
from moesparse.pruning.plan import plan_run

# name -> recipe, hidden, intermediate, as the table says it
RECIPES: dict[str, tuple[dict[str, Any], int, int, str]] = {
    "moe-pruner": (
        {"weights": "2:4", "saliency": "moe-pruner", "update": "rescale"},
        1024,
        2048,
        "2:4, moe-pruner + rescale",
    ),
    "gated-sparsegpt": (
        {"weights": "2:4", "saliency": "gated-sparsegpt", "update": "least-squares"},
        384,
        768,
        "2:4, gated-sparsegpt + least-squares",
    ),
    "experts": ({"weights": None, "experts": 0.25}, 512, 1024, "a quarter of the experts removed, refit"),
}
WINDOWS, LENGTH, BATCH = 8, 128, 4

_CHILD = """
import json, re, sys, time, torch, transformers
from transformers import AutoModelForCausalLM
import moesparse
from benchmarks.speed.synthetic import random_windows
from moesparse.system.memory import bound_compiled_products, peak_memory, reset_peak_memory
from moesparse.progress import ProgressEvent
source, tiny, out, rules, whole, (WINDOWS, LENGTH, BATCH) = json.loads(sys.argv[1])
torch.set_num_threads(1)
bound_compiled_products()
recipe = moesparse.Recipe(**rules)
windows = random_windows(WINDOWS, LENGTH)
peaks, stage, before = {}, "", 0


def note(event):
    global stage
    peaks[stage] = max(peaks.get(stage, 0), peak_memory() - before)
    reset_peak_memory()
    stage = f"layers.{event.done}" if event.unit == "layer" else event.stage


def run(source, out):
    if whole:
        model, _ = moesparse.load_pretrained(source)
        moesparse.prune(model, windows, recipe, batch_size=BATCH, progress=note)
        moesparse.save_pretrained(model, out)
    else:
        moesparse.prune_checkpoint(source, out, windows, recipe, batch_size=BATCH, progress=note)


run(tiny, out + "-tiny")
reset_peak_memory()
peaks, before, started = {}, peak_memory(), time.process_time()
run(source, out)
seconds = time.process_time() - started
note(ProgressEvent("", 0, 1))
layers = {}
for name, peak in peaks.items():
    if found := re.search(r"layers[.](\\d+)", name):
        layers[int(found[1])] = max(layers.get(int(found[1]), 0), peak)
by_layer = [layers[number] for number in sorted(layers)]
print(json.dumps({"peak": max(peaks.values()), "by_layer": by_layer, "seconds": seconds}))
"""


def measure(
    source: Path,
    tiny: Path,
    out: Path,
    rules: dict[str, Any],
    text: tuple[int, int, int] = (WINDOWS, LENGTH, BATCH),
    *,
    whole: bool,
) -> dict[str, Any]:
    """Peak bytes over the imports and CPU seconds, from a process of its own.

    Args:
        source: checkpoint.
        tiny: one that is pruned first.
        out: new folder; beside it `out`-tiny.
        rules: of the recipe.
        text: windows, their length, windows to run at once.
        whole: the model in memory, not layer by layer.
    """
    arguments = json.dumps([str(source), str(tiny), str(out), rules, whole, text])
    done = subprocess.run([sys.executable, "-c", _CHILD, arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def plan_of(recipe: str, layers: int) -> Plan:
    """From the config alone."""
    rules, hidden, intermediate, _ = RECIPES[recipe]
    with tempfile.TemporaryDirectory() as folder:
        make_config(Path(folder) / "model", layers, hidden, intermediate)
        model = meta_model(Path(folder) / "model")
    blocks = find_moe_blocks(model)
    return plan_run(model, blocks, Recipe(**rules), windows=WINDOWS, length=LENGTH, batch_size=BATCH)


def show(rows: list[dict[str, Any]]) -> None:
    """The table of docs/scale.md: measured, and what is planned now; the layers of a recipe are those of its rows."""
    print(
        "| recipe | a layer | layers | peak | planned | peak, deeper | planned | of the peak | last layers of first |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for recipe, (*_, label) in RECIPES.items():
        found = sorted((row for row in rows if row["recipe"] == recipe and not row["whole"]), key=lambda r: r["layers"])
        if len(found) == 2:
            few, many = found
            plans = [plan_of(recipe, row["layers"]) for row in found]
            peaks = " | ".join(
                f"{row['peak'] / 1e6:.0f} | {plan.peak_in_memory / 1e6:.0f}"
                for row, plan in zip(found, plans, strict=True)
            )
            print(
                f"| {label} | {plans[0].layer / 1e6:.0f} MB | {few['layers']}, {many['layers']} | {peaks} | "
                f"{many['peak'] / few['peak']:.2f} | {_trend(many.get('by_layer'))} |"
            )


def _trend(peaks: list[int] | None) -> str:
    """Mean peak of the last quarter of the layers over that of the first; nothing for rows without."""
    if peaks is None:
        return ""
    quarter = max(len(peaks) // 4, 1)
    return f"{statistics.fmean(peaks[-quarter:]) / statistics.fmean(peaks[:quarter]):.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, nargs=2, default=(12, 48), metavar="LAYERS")
    parser.add_argument("--quick", action="store_true", help="blocks of 1.6 MB: it runs, the figures mean little")
    parser.add_argument("-o", "--output", type=Path, help="result file (results/cpu/bench_memory.json)")
    parser.add_argument(
        "--recipes", nargs="+", choices=RECIPES, default=list(RECIPES), help="the rows of others stay in the file"
    )
    parser.add_argument("--table", action="store_true", help="measure nothing, print the table of the result file")
    parser.add_argument("--streamed", action="store_true", help="leave out the model as a whole")
    options = parser.parse_args()
    file = options.output or RESULTS / "cpu" / "bench_memory.json"
    held = json.loads(file.read_text())["rows"] if file.is_file() else []
    if options.table:
        show(held)
        return
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as work:
        tiny = Path(work) / "tiny"
        make_checkpoint(tiny, 2, 128, 256)
        for recipe in options.recipes:
            _, hidden, intermediate, _ = RECIPES[recipe]
            for layers in options.depths:
                source, out = Path(work) / "model", Path(work) / "out"
                make_checkpoint(source, layers, *((128, 256) if options.quick else (hidden, intermediate)))
                # as a whole the smaller one does: four times the layers take four times as much
                for whole in (False, True) if layers == min(options.depths) and not options.streamed else (False,):
                    found = measure(source, tiny, out, RECIPES[recipe][0], whole=whole)
                    shutil.rmtree(out)
                    shutil.rmtree(f"{out}-tiny")
                    rows.append({"layers": layers, "recipe": recipe, "whole": whole, **found})
                    print(
                        f"{layers} layers, {recipe:15} {'whole' if whole else 'streamed':8} "
                        f"peak {found['peak'] / 1e6:7,.0f} MB, {found['seconds']:.0f} s",
                        flush=True,
                    )
                shutil.rmtree(source)
    streamed = {(row["layers"], row["recipe"]): row["peak"] for row in rows if not row["whole"]}
    few, many = options.depths
    for recipe in options.recipes:
        growth = streamed[many, recipe] / streamed[few, recipe]
        print(f"{recipe}: {many} layers take {growth:.2f} of the peak of {few}")
    rows += [row for row in held if row["recipe"] not in options.recipes]
    file.parent.mkdir(parents=True, exist_ok=True)
    result = {"benchmark": "bench_memory", "environment": environment(torch.device("cpu")), "rows": rows}
    file.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
