"""Which expert criterion keeps the most: every one of them on the embedded model, agnostic and per domain.

    python -m benchmarks.studies.experts                    # about a quarter of an hour on one core
    python -m benchmarks.studies.experts --quick            # one seed, few windows, nothing written
    python -m benchmarks.studies.experts --testbed upcycled --seeds 1 --windows 2 --heldout 2

Experts are really removed and the smaller model is scored on held-out text; a seed is a choice of calibration windows,
for "random" a draw of experts.
"agnostic" calibrates on all domains and reports the geometric mean of the domains' perplexities; "own" calibrates on
one domain and scores that domain, again the geometric mean over domains. Perplexity: windows of 256 tokens (of a real
testbed 512), independent, the first token of each unscored. Writes study_experts.json and study_experts.png beside the
results of the testbed and prints tables.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics as stats
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.results import RESULTS as RESULTS_FOLDER
from benchmarks.studies.protocol import folder_of, geometric
from benchmarks.studies.testbed import EMBEDDED, Testbed, add_option, open_testbed
from moesparse import demo
from moesparse.benchmarking import environment
from moesparse.calibration.statistics import ModelStatistics
from moesparse.calibration.whole import calibrate
from moesparse.checkpoints.output import InPlace
from moesparse.evaluate import perplexity
from moesparse.experts.criteria import EXPERT_CRITERIA, expert_scores, jaccard
from moesparse.experts.selection import choose_experts
from moesparse.experts.surgery import plan_removal, remove_experts
from moesparse.models.blocks import find_moe_blocks
from moesparse.models.layers import LayersInMemory, RunOptions
from moesparse.pruning.removal import remove_and_refit
from moesparse.report import figures

REMOVED = (0.25, 0.5)
REFITTED = ("frequency", "reap", "gated-norm", "gated-energy")
SPECIALISTS = ("scripture", "code")
# what a draw costs differs a lot, so the floor takes more of them than a criterion takes seeds
RANDOM_DRAWS = 12


class Study:
    """The dense model, its texts, and perplexities that were measured already."""

    def __init__(self, testbed: Testbed, seeds: int, windows: int, heldout: int) -> None:
        """Args:
        testbed: what is measured on.
        seeds: choices of calibration windows.
        windows: calibration windows for one domain; agnostic statistics take as many of each domain.
        heldout: held-out windows of each domain.
        """
        self.testbed, self.model, self.domains = testbed, testbed.model, tuple(testbed.domains)
        self.blocks = find_moe_blocks(self.model)
        self.seeds, self.windows = seeds, windows
        self.heldout = testbed.heldout(heldout)
        self._scored: dict[Any, float] = {}
        self._statistics: dict[Any, ModelStatistics] = {}
        self._pruned: tuple[Any, Any] = (None, None)

    def calibration(self, domain: str | None, seed: int) -> Tensor:
        """[n, length] windows of a domain, or of all of them in turn, drawn by the seed."""
        domains = self.domains if domain is None else (domain,)
        return torch.cat([self.draw(name, 1000 * seed + number, self.windows) for number, name in enumerate(domains)])

    def draw(self, domain: str, seed: int, count: int) -> Tensor:
        """[count, length] calibration windows of one domain, drawn by the seed."""
        if self.testbed.name != EMBEDDED:
            return self.testbed.draw(count, seed, domain)
        whole = demo.windows("calibration", domain)
        return whole[torch.randperm(len(whole), generator=torch.Generator().manual_seed(seed))[:count]]

    def statistics(self, domain: str | None, seed: int) -> ModelStatistics:
        key = (domain, seed)
        if key not in self._statistics:
            self._statistics[key] = calibrate(
                self.model, self.calibration(domain, seed), seed=seed, batch_size=self.testbed.batch
            )
        return self._statistics[key]

    def choose(self, scores: Tensor, removed: float) -> list[Tensor]:
        return choose_experts(scores, remove=removed, top_k=self.blocks[0].top_k or 1)

    def kept(self, criterion: str, domain: str | None, seed: int, removed: float) -> list[Tensor]:
        return self.choose(expert_scores(self.statistics(domain, seed), criterion, seed=seed), removed)

    def score(self, kept: list[Tensor] | None, domain: str, refit_on: tuple[str | None, int] | None = None) -> float:
        """Held-out perplexity of one domain after keeping `kept` (None: the dense model), refitted on a text or not."""
        chosen = None if kept is None else tuple(tuple(ids.tolist()) for ids in kept)
        key = (chosen, refit_on)
        if (key, domain) not in self._scored:
            if self._pruned[0] != key:
                self._pruned = (key, self._build(kept, refit_on))
            self._scored[key, domain] = perplexity(
                self._pruned[1], self.heldout[domain], batch_size=self.testbed.batch
            ).perplexity
        return self._scored[key, domain]

    def mean(self, kept: list[Tensor] | None, refit_on: tuple[str | None, int] | None = None) -> float:
        """Geometric mean over the domains."""
        return geometric([self.score(kept, domain, refit_on) for domain in self.domains])

    def mean_of(self, model: Any) -> float:
        """Geometric mean over the domains of any model."""
        return geometric(
            [perplexity(model, text, batch_size=self.testbed.batch).perplexity for text in self.heldout.values()]
        )

    def _build(self, kept: list[Tensor] | None, refit_on: tuple[str | None, int] | None) -> Any:
        if kept is None:
            return self.model
        model = copy.deepcopy(self.model)
        if refit_on is None:
            remove_experts(model, kept)
        else:
            layers, options = LayersInMemory(model), RunOptions(batch_size=self.testbed.batch)
            stream = layers.stream(self.calibration(*refit_on), None, options)
            remove_and_refit(layers, InPlace(layers), stream, plan_removal(model, kept), options)
        return model


def run(study: Study) -> dict[str, Any]:
    """All tables."""
    started = time.perf_counter()
    rows = []
    # the refits are the slow part and come last
    wanted = [(criterion, False) for criterion in EXPERT_CRITERIA] + [(criterion, True) for criterion in REFITTED]
    for criterion, refit in wanted:
        for removed in REMOVED:
            rows.append(_row(study, criterion, removed, refit))
            say(f"{time.perf_counter() - started:6.0f} s  {_line(rows[-1])}")
    return {
        "command": " ".join(("python", "-m", "benchmarks.studies.experts", *sys.argv[1:])),
        "machine": environment(torch.device("cpu")),
        "model": {
            "parameters": sum(p.numel() for p in study.model.parameters()),
            "experts": study.blocks[0].num_experts,
            "layers": len(study.blocks),
        },
        "protocol": {
            "seeds": study.seeds,
            "random_draws": RANDOM_DRAWS,
            "calibration_windows_per_domain": study.windows,
            "heldout_windows_per_domain": len(next(iter(study.heldout.values()))),
            "window": study.testbed.length,
        },
        "dense": {domain: study.score(None, domain) for domain in study.domains} | {"mean": study.mean(None)},
        "criteria": rows,
        "specialists": _specialists(study),
        "seconds": time.perf_counter() - started,
    }


def _row(study: Study, criterion: str, removed: float, refit: bool) -> dict[str, Any]:
    agnostic, own = [], []
    if criterion == "random":
        for seed in range(RANDOM_DRAWS):
            scores = expert_scores(study.statistics(None, 0), criterion, seed=seed)
            agnostic.append(study.mean(study.choose(scores, removed)))
    for seed in range(study.seeds if criterion != "random" else 0):
        kept = study.kept(criterion, None, seed, removed)
        agnostic.append(study.mean(kept, (None, seed) if refit else None))
        each = []
        for domain in study.domains:
            kept = study.kept(criterion, domain, seed, removed)
            each.append(study.score(kept, domain, (domain, seed) if refit else None))
        own.append(geometric(each))
    return {"criterion": criterion, "removed": removed, "refit": refit, "agnostic": agnostic, "own": own}


def _specialists(study: Study) -> list[dict[str, Any]]:
    """Models kept for one domain, scored on both: the kept sets specialise."""
    rows = []
    for removed in REMOVED:
        kept = {domain: study.kept("gated-norm", domain, 0, removed) for domain in SPECIALISTS}
        for domain in SPECIALISTS:
            rows.append(
                {
                    "kept for": domain,
                    "removed": removed,
                    "perplexity": {text: study.score(kept[domain], text) for text in SPECIALISTS},
                    "overlap per layer": jaccard(kept[SPECIALISTS[0]], kept[SPECIALISTS[1]]).tolist(),
                }
            )
    return rows


def show(result: dict[str, Any]) -> None:
    dense = result["dense"]
    domains = ", ".join(f"{name} {value:.2f}" for name, value in dense.items() if name != "mean")
    print(f"\ndense: {dense['mean']:.2f} (geometric mean of {domains})")
    print(
        f"\n{'criterion':<14}{'refit':<7}"
        + "".join(f"{n + f' {r:.0%}':>18}" for n in ("agnostic", "own") for r in REMOVED)
    )
    for criterion in EXPERT_CRITERIA:
        for refit in (False, True):
            rows = [r for r in result["criteria"] if r["criterion"] == criterion and r["refit"] == refit]
            cells = [cell(row[name]) for name in ("agnostic", "own") for row in rows]
            if rows:
                print(f"{criterion:<14}{'yes' if refit else '':<7}" + "".join(f"{cell:>18}" for cell in cells))
    print("\nkept for (gated-norm) -> perplexity, overlap of the two kept sets per layer")
    for row in result["specialists"]:
        figures = ", ".join(f"{name} {value:.1f}" for name, value in row["perplexity"].items())
        overlap = " ".join(f"{value:.2f}" for value in row["overlap per layer"])
        print(f"  {row['kept for']:<10} {row['removed']:.0%} removed: {figures}; {overlap}")


def draw(result: dict[str, Any]) -> Any:
    """Mean and spread of every criterion, one panel for each share removed."""
    figure = figures.new_figure(3.6)
    panels = figure.subplots(1, len(REMOVED), sharey=True)
    names = [c + (" + refit" if refit else "") for c in EXPERT_CRITERIA for refit in (False, True)]
    rows = {(r["criterion"] + (" + refit" if r["refit"] else ""), r["removed"]): r for r in result["criteria"]}
    names = [name for name in names if (name, REMOVED[0]) in rows]
    for panel, removed in zip(panels, REMOVED, strict=True):
        for text, colour, marker in (("agnostic", figures.BLUE, "o"), ("own", figures.ORANGE, "s")):
            cells = [(at, rows[name, removed][text]) for at, name in enumerate(names) if rows[name, removed][text]]
            places, values = zip(*cells, strict=True)
            bars = [stats.stdev(each) if len(each) > 1 else 0.0 for each in values]
            panel.errorbar([stats.fmean(each) for each in values], places, xerr=bars, fmt=marker, color=colour,
                           markeredgecolor="black", markeredgewidth=0.6, capsize=2, label=f"{text} text")  # fmt: skip
        panel.axvline(result["dense"]["mean"], color="0.4", linestyle="--", linewidth=1, label="dense")
        panel.set_xscale("log")
        panel.xaxis.set_major_formatter("{x:.0f}")
        panel.xaxis.set_minor_formatter("{x:.0f}")
        panel.tick_params(axis="x", which="both", labelsize=8)
        panel.set_xlabel(f"perplexity, {removed:.0%} of the experts removed")
        panel.grid(axis="x", which="both", alpha=0.25)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].invert_yaxis()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper right", ncols=3, fontsize=9, frameon=False)
    return figure


def _line(row: dict[str, Any]) -> str:
    refit = " refit" if row["refit"] else ""
    figures = f"{cell(row['agnostic'])}, own {cell(row['own'])}"
    return f"{row['criterion']} {row['removed']:.0%}{refit}: {figures}"


def cell(values: list[float]) -> str:
    if not values:
        return "-"
    deviation = f" ± {stats.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{stats.fmean(values):.2f}{deviation}"


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def parser(description: str | None, *, windows: int = 16, heldout: int = 24) -> argparse.ArgumentParser:
    """The options of the studies that measure on a `Study` of this file."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--quick", action="store_true", help="one seed, fewer windows; a few minutes; writes no file")
    add_option(options)
    options.add_argument("--seeds", type=int, default=3, help="choices of calibration windows")
    options.add_argument("--windows", type=int, default=windows, help="calibration windows of each domain")
    options.add_argument("--heldout", type=int, default=heldout, help="held-out windows of each domain")
    options.add_argument("-o", "--output", type=Path, default=RESULTS_FOLDER / "cpu", help="folder of the results")
    return options


def opened(arguments: argparse.Namespace, quick: tuple[int, int] = (8, 6), dtype: torch.dtype = torch.float32) -> Study:
    """The study that `parser`'s options ask for; `quick` are its windows and held-out windows with --quick."""
    testbed = open_testbed(arguments.testbed, dtype)
    if arguments.quick:
        return Study(testbed, 1, *quick)
    return Study(testbed, arguments.seeds, arguments.windows, arguments.heldout)


def path_of(arguments: argparse.Namespace, name: str) -> Path:
    """Of a result file; its folder is made."""
    path = folder_of(arguments.testbed, arguments.output) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--json", action="store_true", help="print the result as JSON instead of tables")
    arguments = options.parse_args()
    torch.manual_seed(0)
    result = run(opened(arguments))
    if not arguments.quick:
        path = path_of(arguments, "study_experts")
        path.write_text(json.dumps(result, indent=1) + "\n")
        path.with_suffix(".png").write_bytes(figures.to_png(draw(result)))
    if arguments.json:
        print(json.dumps(result, indent=2))
    else:
        show(result)


if __name__ == "__main__":
    main()
