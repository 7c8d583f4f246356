"""How much of what a mask costs comes back: weight rules, distillation, and both, on one testbed.

    python -m benchmarks.studies.recovery                     # 2:4 and 50%, three seeds; 25 CPU minutes
    python -m benchmarks.studies.recovery --pattern 2:4 --seeds 1
    python -m benchmarks.studies.recovery --figure            # draw again from what was measured

A seed draws the calibration windows (160 of the embedded model's 242, of 256 tokens): the text that masks, weights and
distillation see. Distillation takes the preset "small". Perplexity: 12 windows a domain, evenly spaced over its
held-out text, scored independently, first token unscored; geometric mean over the domains. Rows are written as they
are measured, so a stopped run goes on. Seconds are CPU seconds of one thread.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.results import RESULTS as RESULTS_FOLDER
from benchmarks.studies.protocol import folder_of, mean_and_spread
from benchmarks.studies.testbed import Testbed, add_option, open_testbed
from moesparse.distillation import PRESETS, Settings, distill
from moesparse.pruning.recipe import Recipe
from moesparse.pruning.run import prune
from moesparse.system.memory import peak_memory, reset_peak_memory

RESULTS = RESULTS_FOLDER / "cpu"
PATTERNS = ("2:4", "0.5")
STARTS = {
    "mask": ("moe-pruner", "none"),
    "rescale": ("moe-pruner", "rescale"),
    "least-squares": ("moe-pruner", "least-squares"),
    "default": ("gated-admm", "least-squares+rescale"),
}
RECOVERIES: dict[str, tuple[str, Settings | str] | None] = {
    "nothing": None,
    "blockwise": ("blockwise", "small"),
    "paper's loss": ("global", Settings(2e-3, epochs=2, batch_size=8, micro_batch=8)),
    "global": ("global", "small"),
}
"""By name: mode and settings of `distill`."""
HELDOUT = 12
GOAL = 1.02


def measure(testbed: Testbed, model: nn.Module, windows: int = HELDOUT) -> float:
    """Geometric mean over domains of held-out perplexity, of as many windows of each."""
    return testbed.score(model, testbed.heldout(windows)).perplexity


def run(
    testbed: Testbed, pattern: str, start: tuple[str, str], seed: int, wanted: list[str]
) -> dict[str, dict[str, Any]]:
    """One pruned model, and what each of `wanted` makes of it."""
    teacher, windows = testbed.model, testbed.calibration(seed)
    student = copy.deepcopy(teacher)
    began = time.process_time()
    prune(
        student,
        windows,
        Recipe(weights=pattern, saliency=start[0], update=start[1], seed=seed),
        batch_size=testbed.batch,
    )
    pruning = time.process_time() - began
    found = {}
    for recovery in wanted:
        model, row = copy.deepcopy(student), {"seconds": pruning}
        how = RECOVERIES[recovery]
        if how is not None:
            reset_peak_memory()
            began = time.process_time()
            report = distill(model, teacher, windows, how[0], settings=how[1])
            row |= {"seconds": time.process_time() - began, "peak_bytes": peak_memory(), "warnings": report.warnings}
            first, last = report.rows[0], report.rows[-1]
            row |= {part: [first[part], last[part]] for part in ("ce", "kl") if part in first}
        row["perplexity"] = measure(testbed, model)
        found[recovery] = row
    return found


def won_back(result: dict[str, Any], pattern: str, value: float) -> float:
    """Share of what moe-pruner's mask alone costs that is won back."""
    alone = mean(result, pattern, STARTS["mask"], "nothing")
    return (alone - value) / (alone - result["dense"])


def values(result: dict[str, Any], pattern: str, start: tuple[str, str], recovery: str) -> list[float]:
    rows = result["rows"].get(f"{pattern} {' '.join(start)} {recovery}", {})
    return [row["perplexity"] for row in rows.values()]


def mean(result: dict[str, Any], pattern: str, start: tuple[str, str], recovery: str) -> float:
    return statistics.fmean(values(result, pattern, start, recovery))


def show(result: dict[str, Any]) -> None:
    """The table of docs/recovery.md."""
    print(f"\ndense {result['dense']:.2f}, goal {result['dense'] * GOAL:.2f}\n")
    print("| pattern | mask and weight rule | distillation | perplexity | gap won back | CPU s | peak GiB |")
    print("|---|---|---|---|---|---|---|")
    for pattern in PATTERNS:
        for start in STARTS.values():
            for recovery in RECOVERIES:
                rows = result["rows"].get(f"{pattern} {' '.join(start)} {recovery}", {})
                if not rows:
                    continue
                found = values(result, pattern, start, recovery)
                back = won_back(result, pattern, statistics.fmean(found))
                seconds = statistics.fmean(row["seconds"] for row in rows.values())
                peaks = [row["peak_bytes"] for row in rows.values() if "peak_bytes" in row]
                peak = f"{max(peaks) / 2**30:.2f}" if peaks else ""
                print(
                    f"| {pattern} | {' + '.join(start)} | {recovery} | {plus_minus(found)} | "
                    f"{back:.0%} | {seconds:.0f} | {peak} |"
                )


def plus_minus(found: list[float]) -> str:
    """Mean and spread, the mean alone of a single value."""
    mean, deviation = mean_and_spread(found)
    return f"{mean:.2f} ± {deviation:.2f}" if len(found) > 1 else f"{mean:.2f}"


def draw(result: dict[str, Any], path: Path) -> None:
    """Perplexity of every start, as pruned and distilled: one panel a pattern."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    patterns = [pattern for pattern in PATTERNS if values(result, pattern, STARTS["mask"], "nothing")]
    figure, axes = plt.subplots(1, len(patterns), figsize=(5.2 * len(patterns), 3.6), squeeze=False)
    for panel, pattern in zip(axes[0], patterns, strict=True):
        for offset, recovery in enumerate(RECOVERIES):
            places, heights, errors = [], [], []
            for place, start in enumerate(STARTS.values()):
                found = values(result, pattern, start, recovery)
                if found:
                    places.append(place + 0.21 * (offset - 1.5))
                    heights.append(mean_and_spread(found)[0])
                    errors.append(mean_and_spread(found)[1])
            label = {"nothing": "as pruned", "paper's loss": "global, paper's loss"}.get(recovery, recovery)
            panel.bar(places, heights, 0.2, yerr=errors, label=label)
        panel.axhline(result["dense"], color="black", linewidth=1, label="dense")
        panel.axhline(result["dense"] * GOAL, color="black", linewidth=1, linestyle=":", label="dense + 2%")
        panel.set_xticks(
            range(len(STARTS)), ["\n".join(start).replace("+", "\n+") for start in STARTS.values()], fontsize=8
        )
        panel.set_ylim(bottom=result["dense"] * 0.97)
        panel.set_title(f"{pattern}" if ":" in pattern else f"{float(pattern):.0%} unstructured")
        panel.set_ylabel("held-out perplexity")
    axes[0][-1].legend(fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_option(parser)
    parser.add_argument("--pattern", action="append", choices=PATTERNS, help="both when left out")
    parser.add_argument("--start", action="append", choices=STARTS, help="all when left out")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--figure", action="store_true", help="measure nothing; table and figure from the results")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS, help="folder of rows and figure")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {"rows": {}}
    path = folder_of(arguments.testbed, arguments.output) / "study_recovery.json"
    if path.is_file():
        result = json.loads(path.read_text())
    if not arguments.figure:
        testbed = open_testbed(arguments.testbed)
        result["settings"] = {mode: settings.to_dict() for mode, settings in PRESETS["small"].items()}
        if "dense" not in result:
            result["dense"] = measure(testbed, testbed.model)
        for pattern in arguments.pattern or PATTERNS:
            for seed in range(arguments.seeds):
                for start in [STARTS[name] for name in arguments.start or STARTS]:
                    rows = {
                        name: result["rows"].setdefault(f"{pattern} {' '.join(start)} {name}", {})
                        for name in RECOVERIES
                    }
                    wanted = [name for name in RECOVERIES if str(seed) not in rows[name]]
                    for name, row in run(testbed, pattern, start, seed, wanted).items() if wanted else ():
                        rows[name][str(seed)] = row
                        print(
                            pattern, *start, name, seed, f"{row['perplexity']:.2f} {row['seconds']:.0f} s", flush=True
                        )
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_text(json.dumps(result, indent=1) + "\n")
    show(result)
    draw(result, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
