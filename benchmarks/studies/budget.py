"""A mixed budget against uniform choices at the same bytes, on the embedded model in bf16.

    python -m benchmarks.studies.budget                     # about ten minutes on one core
    python -m benchmarks.studies.budget --quick             # one seed, few windows, nothing written

For every target the plan of moesparse.pruning.budget is carried out, and so are the uniform choices: each pattern
everywhere with as many experts as fit. Masks by moe-pruner, weights by least-squares+rescale, experts by reap with
refit. A seed is a choice of calibration windows; perplexity is that of held-out windows of 256 tokens, geometric mean
over the domains. Writes benchmarks/results/cpu/study_budget.json, whole after every seed, and prints a table.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.results import RESULTS as RESULTS_FOLDER
from benchmarks.studies.experts import Study, cell, say
from moesparse import demo
from moesparse.benchmarking import environment
from moesparse.calibration.data import FromText
from moesparse.experts.selection import choose_experts
from moesparse.models.layers import LayersInMemory, RunOptions
from moesparse.pruning.budget import DEFAULT_CHOICES, DENSE, BudgetPlan, search
from moesparse.pruning.recipe import Recipe
from moesparse.pruning.run import prune
from moesparse.pruning.to_budget import measure_costs, recipe_of

RESULTS = RESULTS_FOLDER / "cpu" / "study_budget.json"
TARGETS = (0.4571, 0.5625, 0.7)
COARSER = ("drop", "2:4", "4:8", "6:8", DENSE)
UNIFORM = ("2:4", "4:8", "6:8")


def run(study: Study) -> Iterator[list[dict[str, Any]]]:
    """After every seed, one row for each target and contender with its perplexities by seed."""
    rows: dict[tuple[float, str], dict[str, Any]] = {}
    for seed in range(study.seeds):
        recipe = Recipe(saliency="moe-pruner", target_bytes=0.5, seed=seed)
        windows = study.calibration(None, seed)
        layers, text = LayersInMemory(study.model), FromText(windows, None)
        costs, scores, _ = measure_costs(layers, text, recipe, RunOptions(batch_size=16))
        dense = sum(cost.bytes(dict.fromkeys(cost.sizes, DENSE), 16) for cost in costs)
        measured: dict[str, float] = {}

        def keep(count: int, scores: Any = scores) -> Any:
            return choose_experts(scores, keep=count, top_k=2)

        def score(plan: BudgetPlan, recipe: Recipe = recipe, windows: Any = windows, measured: Any = measured) -> float:
            key = json.dumps([plan.keep, plan.patterns])
            if key not in measured:
                model = copy.deepcopy(study.model)
                prune(model, windows, recipe_of(recipe, plan, 16), batch_size=16)
                measured[key] = study.mean_of(model)
            return measured[key]

        for target in TARGETS:
            limit = int(target * dense)
            plans = {
                "mixed, coarser": search(costs, limit, range(2, 17), keep, COARSER).mixed,
                "mixed": search(costs, limit, range(2, 17), keep, DEFAULT_CHOICES).mixed,
            }
            for pattern in UNIFORM:
                count = _most(costs, limit, pattern)
                plans[f"uniform {pattern}"] = search(costs, limit, [count], keep, ("drop", pattern)).uniform
            for name, plan in plans.items():
                row = rows.setdefault(
                    (target, name),
                    {"target": target, "choice": name, "plans": [], "estimated": [], "loss": [], "perplexity": []},
                )
                perplexity = score(plan)
                row["plans"].append({"keep": plan.keep, "patterns": _short(plan), "share": plan.bytes / dense})
                row["estimated"].append(plan.loss)
                row["loss"].append(math.log(perplexity / study.mean(None)))
                row["perplexity"].append(perplexity)
                say(
                    f"seed {seed}, {target:g}, {name}: {plan.keep} experts, {plan.bytes / dense:.4f} of the bytes, "
                    f"{perplexity:.2f}, {row['loss'][-1]:.4f} nats, estimated {plan.loss:.4f}"
                )
        yield list(rows.values())


def _most(costs: Any, limit: int, pattern: str) -> int:
    """The most experts that fit with one pattern everywhere."""
    sizes = [sum(cost.bytes(dict.fromkeys(cost.sizes, pattern), count) for cost in costs) for count in range(17)]
    return max(count for count in range(17) if sizes[count] <= limit)


def _short(plan: BudgetPlan) -> list[str]:
    return ["/".join(matrices.values()) for matrices in plan.patterns.values()]


def show(result: dict[str, Any]) -> None:
    print(f"dense {result['dense']:.2f}")
    print(f"{'target':<8}{'choice':<24}{'experts':>8}{'share':>8}{'perplexity':>18}{'nats':>9}{'estimated':>11}")
    for row in result["rows"]:
        counts = sorted({plan["keep"] for plan in row["plans"]})
        share = sum(plan["share"] for plan in row["plans"]) / len(row["plans"])
        loss, estimated = (sum(row[name]) / len(row[name]) for name in ("loss", "estimated"))
        kept = "-".join(map(str, counts))
        figures = f"{kept:>8}{share:>8.4f}{cell(row['perplexity']):>18}{loss:>9.4f}{estimated:>11.4f}"
        print(f"{row['target']:<8g}{row['choice']:<24}{figures}")
    for row in result["rows"]:
        if row["choice"].startswith("mixed"):
            print(f"{row['target']:g} {row['choice']}, seed 0: {' '.join(row['plans'][0]['patterns'])}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, fewer windows; writes no file")
    parser.add_argument("--windows", type=int, default=6, help="calibration windows of each domain")
    parser.add_argument("--heldout", type=int, default=6, help="held-out windows of each domain")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    started = time.perf_counter()
    dtype = torch.bfloat16
    study = Study(1, 4, 3, dtype) if arguments.quick else Study(3, arguments.windows, arguments.heldout, dtype)
    result = {
        "command": " ".join(("python", "-m", "benchmarks.studies.budget", *sys.argv[1:])),
        "machine": environment(torch.device("cpu")),
        "protocol": {
            "calibration_windows_per_domain": study.windows,
            "heldout_windows_per_domain": len(study.heldout[demo.DOMAINS[0]]),
            "window": 256,
            "dtype": str(dtype),
        },
        "dense": study.mean(None),
    }
    for seeds, rows in enumerate(run(study), 1):
        result |= {"rows": rows, "seeds": seeds, "seconds": time.perf_counter() - started}
        if not arguments.quick:
            arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    show(result)


if __name__ == "__main__":
    main()
