"""Where the loss of a pruned model comes from: one block pruned alone, all but one, one kind of matrix, each alone.

    python -m benchmarks.real_weights.anatomy                       # about 25 CPU minutes on the real testbed
    python -m benchmarks.real_weights.anatomy --testbed embedded --windows 24

The model is pruned once, by the recipe's rules, propagated; then blocks and matrices of the pruned model are set into
the dense one and the other way round. Figures are nats above dense over the same held-out windows (a few of each
domain, so differences below the standard error mean nothing). Beside each block stand the errors that pruning reports,
and how far they predict what the block costs alone; and of each block's inputs the share of energy in the largest
channel. Writes
anatomy.json and anatomy.png beside the results of the testbed.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.results import RESULTS
from benchmarks.studies.protocol import folder_of
from benchmarks.studies.testbed import REAL, Testbed, add_option, open_testbed
from moesparse.calibration.whole import calibrate
from moesparse.models.blocks import find_moe_blocks
from moesparse.pruning.recipe import Recipe
from moesparse.pruning.run import prune

OUTLIERS = 8


def swapped(model: Any, other: Any, chosen: Any) -> Any:
    """A copy of `model` with the matrices of `other` for which chosen(block number, matrix name) holds."""
    made = copy.deepcopy(model)
    for number, (mine, theirs) in enumerate(zip(find_moe_blocks(made), find_moe_blocks(other), strict=True)):
        for matrix, source in zip(mine.matrices, theirs.matrices, strict=True):
            if chosen(number, matrix.name):
                matrix.weight.copy_(source.weight)
    return made


def rank_correlation(first: list[float], second: list[float]) -> float:
    """Spearman's."""
    ranks = [torch.tensor(each).argsort().argsort().double() for each in (first, second)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def outliers(testbed: Testbed, windows: Tensor) -> list[dict[str, float]]:
    """Of every block: the share of its inputs' energy, and of its activations', in the largest channel and the 1%."""
    sums = calibrate(testbed.model, windows, batch_size=testbed.batch)
    found = []
    for statistics in sums.blocks.values():
        row = {}
        for name, energy in statistics.energy.items():
            share = (energy.sum(0) / energy.sum()).sort(descending=True).values
            row |= {f"{name}_largest": float(share[0]), f"{name}_1%": float(share[: max(len(share) // 100, 1)].sum())}
        found.append(row)
    return found


@torch.no_grad()
def measure(testbed: Testbed, recipe: Recipe, count: int, windows: int) -> dict[str, Any]:
    """All figures."""
    heldout = testbed.heldout(windows)
    dense = testbed.score(testbed.model, heldout)
    pruned = copy.deepcopy(testbed.model)
    report = prune(pruned, testbed.draw(count, recipe.seed), recipe, batch_size=testbed.batch)
    numbers = range(len(report.blocks))

    def above(model: Any) -> tuple[float, float]:
        return testbed.score(model, heldout).above(dense)

    result: dict[str, Any] = {"dense": dense.perplexity, "recipe": report.recipe, "all": above(pruned)}
    print(
        f"dense {dense.perplexity:.2f}, pruned {result['all'][0]:.3f} ± {result['all'][1]:.3f} nats above", flush=True
    )
    names = [matrix.name for matrix in find_moe_blocks(pruned)[0].matrices]
    result["matrices"] = {
        name: {
            "alone": above(swapped(testbed.model, pruned, lambda _, each, name=name: each == name)),
            "all_but": above(swapped(pruned, testbed.model, lambda _, each, name=name: each == name)),
        }
        for name in names
    }
    print(result["matrices"], flush=True)
    result["blocks"] = []
    shares = outliers(testbed, testbed.draw(OUTLIERS, recipe.seed))
    for number in numbers:
        errors = {
            tensor.name: sum(tensor.error_after) / len(tensor.error_after)
            for tensor in report.blocks[number].tensors
            if tensor.error_after
        }
        row = {
            "alone": above(swapped(testbed.model, pruned, lambda at, _, number=number: at == number)),
            "all_but": above(swapped(pruned, testbed.model, lambda at, _, number=number: at == number)),
            "errors": errors,
            **shares[number],
        }
        result["blocks"].append(row)
        print(f"block {number}: {json.dumps(row)}", flush=True)
    alone = [row["alone"][0] for row in result["blocks"]]
    saved = [result["all"][0] - row["all_but"][0] for row in result["blocks"]]
    last = [list(row["errors"].values())[-1] if row["errors"] else math.nan for row in result["blocks"]]
    result["rank_correlation"] = {
        "error of down, alone": rank_correlation(last, alone),
        "alone, saved": rank_correlation(alone, saved),
    }
    result["sum_alone"] = sum(alone)
    return result


def figure(result: dict[str, Any], path: Path) -> None:
    """Loss of every block alone, what it saves to leave it dense, and the error that pruning reported."""
    from benchmarks.figures import COLOURS
    from moesparse.report.figures import new_figure

    drawn = new_figure(4.6, 9.0)
    axes = drawn.subplots()
    rows = result["blocks"]
    places = range(len(rows))
    whole = result["all"][0]
    axes.bar([x - 0.2 for x in places], [row["alone"][0] for row in rows], 0.4, color=COLOURS[0], label="pruned alone")
    saved = [whole - row["all_but"][0] for row in rows]
    axes.bar([x + 0.2 for x in places], saved, 0.4, color=COLOURS[1], label="saved by leaving it dense")
    axes.set_xlabel("block")
    axes.set_ylabel("nats")
    axes.grid(axis="y", alpha=0.25)
    other = axes.twinx()
    errors = [list(row["errors"].values())[-1] if row["errors"] else math.nan for row in rows]
    other.plot(places, errors, "k.-", linewidth=0.8, label="relative error of the block's output (right)")
    other.set_ylim(0, None)
    (handles, labels), (more, other_labels) = (each.get_legend_handles_labels() for each in (axes, other))
    axes.legend(handles + more, labels + other_labels, fontsize=8)
    drawn.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_option(parser)
    parser.set_defaults(testbed=REAL)
    parser.add_argument("--saliency", default="auto")
    parser.add_argument("--update", default="auto")
    parser.add_argument("--windows", type=int, default=64, help="calibration windows")
    parser.add_argument("--heldout", type=int, default=2, help="held-out windows of each domain")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS / "cpu", help="folder of rows and figure")
    arguments = parser.parse_args()
    testbed = open_testbed(arguments.testbed)
    recipe = Recipe(weights="2:4", saliency=arguments.saliency, update=arguments.update)
    result = measure(testbed, recipe, arguments.windows, arguments.heldout)
    path = folder_of(arguments.testbed, arguments.output) / "anatomy.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    result |= {"windows": arguments.windows, "heldout_windows_per_domain": arguments.heldout}
    path.write_text(json.dumps(result, indent=1) + "\n")
    figure(result, path.with_suffix(".png"))
    print(f"rank correlations {result['rank_correlation']}, sum of blocks alone {result['sum_alone']:.3f}")


if __name__ == "__main__":
    main()
