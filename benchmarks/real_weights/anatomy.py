"""Where the loss of a pruned model comes from: one block pruned alone, all but one, one kind of matrix, each alone.

    python -m benchmarks.real_weights.anatomy                       # about 25 CPU minutes on the real testbed
    python -m benchmarks.real_weights.anatomy --testbed embedded --windows 24
    python -m benchmarks.real_weights.anatomy --pruned FOLDER       # that benchmarks.studies.weights --keep left

The model is pruned once, by the recipe's rules, propagated; then blocks and matrices of the pruned model are set into
the dense one and the other way round. Figures are nats above dense over the same held-out windows (a few of each
domain, so differences below the standard error mean nothing). Beside each block stand the squared errors of its output
on the dense model's inputs, over the output's energy and over that of the hidden states behind the layer, which is what
the budget search estimates a loss by, and how far each predicts what the block costs alone; and of each block's inputs
the share of energy in the largest channel. Writes anatomy.json and anatomy.png beside the results of the testbed.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.results import RESULTS
from benchmarks.studies.protocol import folder_of
from benchmarks.studies.testbed import REAL, Testbed, add_option, open_testbed
from moesparse.calibration.whole import calibrate
from moesparse.checkpoints.pretrained import load_pretrained
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
def output_errors(model: Any, pruned: Any, windows: Tensor, batch: int) -> list[dict[str, float]]:
    """Of every block, on what it reads in the dense model: sum |f - f_V|^2 over sum |f|^2, and over the layer's."""
    blocks = list(zip(find_moe_blocks(model), find_moe_blocks(pruned), strict=True))
    sums = torch.zeros(len(blocks), 3, dtype=torch.float64)

    def note(number: int, other: Any, inputs: Any, output: Any) -> None:
        mine, its = (each[0] if isinstance(each, tuple) else each for each in (output, other(*inputs)))
        sums[number, 0] += (mine - its).double().square().sum()
        sums[number, 1] += mine.double().square().sum()

    def behind(number: int, output: Any) -> None:
        sums[number, 2] += (output[0] if isinstance(output, tuple) else output).double().square().sum()

    handles = []
    for number, (block, other) in enumerate(blocks):
        handles.append(
            block.moe.register_forward_hook(
                lambda _, inputs, output, number=number, other=other: note(number, other.moe, inputs, output)
            )
        )
        layer = model.get_submodule(block.layer)
        handles.append(layer.register_forward_hook(lambda _, __, output, number=number: behind(number, output)))
    for ids in windows.split(batch):
        model(input_ids=ids)
    for handle in handles:
        handle.remove()
    return [{"output": float(error / whole), "stream": float(error / layer)} for error, whole, layer in sums]


@torch.no_grad()
def measure(testbed: Testbed, pruned: Any, windows: int, seed: int = 0) -> dict[str, Any]:
    """All figures of a pruned model."""
    heldout = testbed.heldout(windows)
    dense = testbed.score(testbed.model, heldout)

    def above(model: Any) -> tuple[float, float]:
        return testbed.score(model, heldout).above(dense)

    result: dict[str, Any] = {"dense": dense.perplexity, "all": above(pruned)}
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
    shares = outliers(testbed, testbed.draw(OUTLIERS, seed))
    errors = output_errors(testbed.model, pruned, torch.cat(list(heldout.values())), testbed.batch)
    for number, (share, error) in enumerate(zip(shares, errors, strict=True)):
        row = {
            "alone": above(swapped(testbed.model, pruned, lambda at, _, number=number: at == number)),
            "all_but": above(swapped(pruned, testbed.model, lambda at, _, number=number: at == number)),
            "errors": error,
            **share,
        }
        result["blocks"].append(row)
        print(f"block {number}: {json.dumps(row)}", flush=True)
    alone = [row["alone"][0] for row in result["blocks"]]
    saved = [result["all"][0] - row["all_but"][0] for row in result["blocks"]]
    result["rank_correlation"] = {
        f"{name}, {what}": rank_correlation(first, second)
        for what, second in (("alone", alone), ("saved", saved))
        for name, first in (
            *(
                (f"error over {kind}", [row["errors"][kind] for row in result["blocks"]])
                for kind in ("output", "stream")
            ),
            *((("alone", alone),) if what == "saved" else ()),
        )
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
    errors = [row["errors"]["stream"] for row in rows]
    other.plot(places, errors, "k.-", linewidth=0.8, label="error of its output over the stream's energy (right)")
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
    parser.add_argument("--pruned", type=Path, metavar="FOLDER", help="already pruned, in place of pruning")
    parser.add_argument("--heldout", type=int, default=2, help="held-out windows of each domain")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS / "cpu", help="folder of rows and figure")
    arguments = parser.parse_args()
    testbed = open_testbed(arguments.testbed)
    if arguments.pruned is None:
        recipe = Recipe(weights="2:4", saliency=arguments.saliency, update=arguments.update)
        pruned = copy.deepcopy(testbed.model)
        prune(pruned, testbed.draw(arguments.windows, recipe.seed), recipe, batch_size=testbed.batch)
    else:
        pruned = load_pretrained(arguments.pruned, dtype=torch.float32)[0].eval()
    result = measure(testbed, pruned, arguments.heldout)
    path = folder_of(arguments.testbed, arguments.output) / "anatomy.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    how = {"pruned": arguments.pruned.name} if arguments.pruned else {"windows": arguments.windows}
    result |= {**how, "heldout_windows_per_domain": arguments.heldout}
    path.write_text(json.dumps(result, indent=1) + "\n")
    figure(result, path.with_suffix(".png"))
    print(f"rank correlations {result['rank_correlation']}, sum of blocks alone {result['sum_alone']:.3f}")


if __name__ == "__main__":
    main()
