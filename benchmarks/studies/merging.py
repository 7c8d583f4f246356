"""What becomes of the experts that go: removed or merged, then refitted or not, and their routers trained or not.

    python -m benchmarks.studies.merging [--quick] [--seeds 3] [--testbed embedded] [-o FOLDER]
    python -m benchmarks.studies.merging --testbed upcycled --seeds 1 --share 0.25 --recovery none --recovery refit

Writes study_merging.json and study_merging.png. A quarter and a half of the experts go; the methods are those of
`moesparse prune --expert-method` with the criterion of their papers, and removal by three criteria, aimer among them,
which reads no text. "refit" re-solves the down projections, "routers" trains the routers alone on the dense model's
next-token distribution (`moesparse distill --train routers`) over twice as many windows, "both" trains them after the
refit. Of two ways also "before", routers trained first and the refit behind them, and "all", every weight trained in
the same way after the refit. Protocol otherwise: protocol.py.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from benchmarks.studies.protocol import Study, mean_and_spread, parser
from moesparse.distillation import Settings, distill
from moesparse.experts.refit import Calls, refit
from moesparse.models.blocks import find_moe_blocks
from moesparse.models.experts_function import experts_watched
from moesparse.pruning.recipe import Recipe
from moesparse.report import figures

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METHODS = (
    ("remove", "reap"),
    ("remove", "frequency"),
    ("remove", "aimer"),
    ("ream", "reap"),
    ("m-smoe", "frequency"),
    ("hc-smoe", "frequency"),
)
SHARES = (0.25, 0.5)
RECOVERIES = ("none", "routers", "refit", "both", "before", "all")
# of these all, of the others the first four
IN_FULL = (("remove", "reap"), ("ream", "reap"))
ROUTERS = Settings(1e-3, epochs=2, batch_size=8, micro_batch=8, expert_weight=0.0, logit_share=1.0, train="routers")
ALL = replace(ROUTERS, train="all")


@torch.no_grad()
def refit_as_it_routes(model: Any, dense: Any, windows: Tensor, batch: int) -> None:
    """Re-solve the down projections of a pruned model for the output of the dense blocks, block by block.

    `moesparse prune` refits for the routers of the dense model; here the pruned ones route as they are by now. Every
    block is fitted on what it reads behind those refitted before it.
    """
    for block, whole in zip(find_moe_blocks(model), find_moe_blocks(dense), strict=True):
        inputs: list[Tensor] = []
        calls: list[tuple[Tensor, ...]] = []
        handle = block.moe.register_forward_pre_hook(lambda _, read, inputs=inputs: inputs.append(read[0]))
        with experts_watched(block, lambda *call, calls=calls: calls.append(call[:3])):
            for ids in windows.split(batch):
                model(input_ids=ids)
        handle.remove()
        targets: list[Tensor] = []
        with experts_watched(whole, lambda *call, targets=targets: targets.append(call[3])):
            for read in inputs:
                whole.moe(read)
        refit(block, Calls(*(torch.cat(each) for each in zip(*calls, strict=True))), torch.cat(targets))


class Pruned:
    """The model that was pruned last, which training starts from."""

    def __init__(self, study: Study) -> None:
        self.study = study
        self._key: tuple[Any, ...] = ()
        self._model: Any = None

    def model(self, method: str, criterion: str, share: float, seed: int, *, refit: bool) -> nn.Module:
        """A copy of it."""
        key = (method, criterion, share, seed, refit)
        if self._key != key:
            recipe = Recipe(
                weights=None,
                experts=share,
                expert_method=method,
                expert_saliency=criterion,
                update="least-squares" if refit else "none",
                seed=seed,
            )
            windows = None if recipe.reads_weights_alone else self.study.draw(self.study.calibration_windows, seed)
            self._key, self._model = key, self.study.prune_copy(recipe, windows)
        return copy.deepcopy(self._model)

    def measure(self, method: str, criterion: str, share: float, recovery: str, seed: int) -> dict[str, float]:
        """Perplexity after a recovery."""
        study = self.study
        model = self.model(method, criterion, share, seed, refit=recovery in ("refit", "both", "all"))
        if recovery not in ("none", "refit"):
            windows = study.draw(2 * study.calibration_windows, seed)
            distill(
                model, study.model, windows, "global", settings=ALL if recovery == "all" else ROUTERS, progress=None
            )
        if recovery == "before":
            refit_as_it_routes(model, study.model, study.draw(study.calibration_windows, seed), study.batch)
        return {"perplexity": self.study.score(model)}


def run(study: Study, shares: Sequence[float], recoveries: Sequence[str]) -> None:
    """Draw by draw, so that a run that is stopped has whole ones."""
    pruned = Pruned(study)
    study.measure(lambda: {"perplexity": study.score(study.model)}, method="dense")
    for seed in study.seeds:
        for share in shares[-1:] if study.quick else shares:
            for method, criterion in METHODS:
                for recovery in ("none", "routers", "before", "refit", "both", "all"):
                    if recovery not in recoveries:
                        continue
                    if recovery in RECOVERIES[4:] and (method, criterion) not in IN_FULL:
                        continue
                    setting = {"method": method, "criterion": criterion, "share": share}
                    setting |= {"recovery": recovery, "seed": seed}
                    study.measure(partial(pruned.measure, **setting), **setting)


def values(study: Study, method: str, criterion: str, share: float, recovery: str) -> list[float]:
    """Of every draw."""
    rows = study.select(method=method, criterion=criterion, share=share, recovery=recovery)
    return [row["perplexity"] for row in rows]


def show(study: Study) -> None:
    """A table for each share."""
    print(f"dense {study.select(method='dense')[0]['perplexity']:.2f}")
    for share in SHARES:
        if not study.select(share=share):
            continue
        print(f"\n{share:.0%} of the experts gone\n| method, criterion | {' | '.join(RECOVERIES)} |")
        print("|---|" + "---|" * len(RECOVERIES))
        for method, criterion in METHODS:
            cells = []
            for recovery in RECOVERIES:
                found = values(study, method, criterion, share, recovery)
                cells.append("{:.2f} ± {:.2f}".format(*mean_and_spread(found)) if found else "")
            print(f"| {method}, {criterion} | {' | '.join(cells)} |")


def figure(study: Study) -> Figure:
    """Mean and spread of every method and recovery, a panel for each share."""
    drawn = figures.new_figure(4.2)
    panels = drawn.subplots(1, len(SHARES), sharey=True)
    colours = (figures.BLUE, figures.ORANGE, "0.45", "black", figures.BLUE, figures.ORANGE)
    looks = zip(RECOVERIES, colours, "os^DPX", strict=True)
    names = [f"{method}, {criterion}" for method, criterion in METHODS]
    for number, (recovery, colour, marker) in enumerate(looks):
        for panel, share in zip(panels, SHARES, strict=True):
            for place, how in enumerate(METHODS):
                found = values(study, *how, share, recovery)
                if found:
                    mean, bar = mean_and_spread(found)
                    label = recovery if place == 0 else None
                    at = place + 0.13 * (number - 2.5)
                    panel.errorbar([mean], [at], xerr=[bar], fmt=marker, color=colour, capsize=2, label=label)
    for panel, share in zip(panels, SHARES, strict=True):
        panel.axvline(study.select(method="dense")[0]["perplexity"], color="0.4", linestyle="--", linewidth=1)
        panel.set_xscale("log")
        panel.xaxis.set_major_formatter("{x:.0f}")
        panel.xaxis.set_minor_formatter("{x:.0f}")
        panel.tick_params(axis="x", which="both", labelsize=8)
        panel.set_xlabel(f"perplexity, {share:.0%} of the experts gone")
        panel.grid(axis="x", which="both", alpha=0.25)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].invert_yaxis()
    handles, labels = panels[0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside upper right", ncols=len(RECOVERIES), fontsize=9, frameon=False)
    return drawn


def main() -> None:
    options = parser(__doc__)
    options.add_argument(
        "--share", type=float, action="append", choices=SHARES, help="of the experts; all when left out"
    )
    options.add_argument("--recovery", action="append", choices=RECOVERIES, help="all when left out; repeat for more")
    arguments = options.parse_args()
    asked = partial(run, shares=arguments.share or SHARES, recoveries=arguments.recovery or RECOVERIES)
    Study("study_merging", arguments).conduct(asked, show, figure)


if __name__ == "__main__":
    main()
