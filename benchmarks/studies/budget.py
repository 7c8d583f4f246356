"""A mixed budget against uniform choices at the same bytes, in bf16.

    python -m benchmarks.studies.budget                     # about ten minutes on one core
    python -m benchmarks.studies.budget --quick             # one seed, few windows, nothing written
    python -m benchmarks.studies.budget --testbed real --seeds 1 --target 0.5625      # the bytes of 2:4

For every target the plan of moesparse.pruning.budget is carried out, and so are the uniform choices: each pattern
everywhere with as many experts as fit. Masks by moe-pruner, weights by least-squares+rescale, experts by reap with
refit. A seed is a choice of calibration windows; perplexity is that of held-out windows, geometric mean over the
domains. Writes study_budget.json beside the results of the testbed, whole after every seed, and prints a table. A real
testbed is run in float32, which is faster on a CPU, and its bytes are counted as those of 16 bits.
"""

from __future__ import annotations

import copy
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from benchmarks.studies.experts import Study, cell, opened, parser, path_of, say
from benchmarks.studies.testbed import EMBEDDED
from moesparse.benchmarking import environment
from moesparse.calibration.data import FromText
from moesparse.experts.selection import choose_experts
from moesparse.models.layers import LayersInMemory, RunOptions
from moesparse.pruning.budget import DEFAULT_CHOICES, DENSE, BudgetPlan, search
from moesparse.pruning.recipe import Recipe
from moesparse.pruning.run import prune
from moesparse.pruning.to_budget import measure_costs, recipe_of

TARGETS = (0.4571, 0.5625, 0.7)
COARSER = ("drop", "2:4", "4:8", "6:8", DENSE)
UNIFORM = ("2:4", "4:8", "6:8")


def run(study: Study, targets: Sequence[float]) -> Iterator[list[dict[str, Any]]]:
    """After every seed, one row for each target and contender with its perplexities by seed."""
    rows: dict[tuple[float, str], dict[str, Any]] = {}
    experts, top_k = study.blocks[0].num_experts, study.blocks[0].top_k or 1
    for seed in range(study.seeds):
        recipe = Recipe(saliency="moe-pruner", update="least-squares+rescale", target_bytes=0.5, seed=seed)
        windows = study.calibration(None, seed)
        layers, text = LayersInMemory(study.model), FromText(windows, None)
        costs, scores, _ = measure_costs(layers, text, recipe, RunOptions(batch_size=study.testbed.batch))
        # a checkpoint has 16 bits, in whatever it is run here
        costs = [
            replace(cost, sizes={name: (weights, 2) for name, (weights, _) in cost.sizes.items()}) for cost in costs
        ]
        dense = sum(cost.bytes(dict.fromkeys(cost.sizes, DENSE), experts) for cost in costs)
        measured: dict[str, float] = {}

        def keep(count: int, scores: Any = scores) -> Any:
            return choose_experts(scores, keep=count, top_k=top_k)

        def score(plan: BudgetPlan, recipe: Recipe = recipe, windows: Any = windows, measured: Any = measured) -> float:
            key = json.dumps([plan.keep, plan.patterns])
            if key not in measured:
                model = copy.deepcopy(study.model)
                prune(model, windows, recipe_of(recipe, plan, experts), batch_size=study.testbed.batch)
                measured[key] = study.mean_of(model)
            return measured[key]

        for target in targets:
            limit = int(target * dense)
            plans = {
                "mixed, coarser": search(costs, limit, range(top_k, experts + 1), keep, COARSER).mixed,
                "mixed": search(costs, limit, range(top_k, experts + 1), keep, DEFAULT_CHOICES).mixed,
            }
            for pattern in UNIFORM:
                count = _most(costs, limit, pattern, range(top_k, experts + 1))
                if count is None:
                    continue
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


def _most(costs: Any, limit: int, pattern: str, counts: range) -> int | None:
    """The most experts that fit with one pattern everywhere; None where no number does."""
    fitting = [n for n in counts if sum(cost.bytes(dict.fromkeys(cost.sizes, pattern), n) for cost in costs) <= limit]
    return max(fitting, default=None)


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
    options = parser(__doc__, windows=6, heldout=6)
    options.add_argument("--target", type=float, action="append", help=f"share of the bytes; {TARGETS} when left out")
    arguments = options.parse_args()
    torch.manual_seed(0)
    started = time.perf_counter()
    dtype = torch.bfloat16 if arguments.testbed == EMBEDDED else torch.float32
    study = opened(arguments, (4, 3), dtype)
    result = {
        "command": " ".join(("python", "-m", "benchmarks.studies.budget", *sys.argv[1:])),
        "machine": environment(torch.device("cpu")),
        "protocol": {
            "calibration_windows_per_domain": study.windows,
            "heldout_windows_per_domain": len(next(iter(study.heldout.values()))),
            "window": study.testbed.length,
            "dtype": str(dtype),
        },
        "dense": study.mean(None),
    }
    for seeds, rows in enumerate(run(study, arguments.target or TARGETS), 1):
        result |= {"rows": rows, "seeds": seeds, "seconds": time.perf_counter() - started}
        if not arguments.quick:
            path_of(arguments, "study_budget").write_text(json.dumps(result, indent=1) + "\n")
    show(result)


if __name__ == "__main__":
    main()
