"""Which expert criterion keeps the most: every one of them on the embedded model, agnostic and per domain.

    python benchmarks/study_experts.py [--quick] [--json]

Experts are really removed and the smaller model is scored on held-out text; a seed is a choice of calibration windows.
"agnostic" calibrates on all domains and reports the geometric mean of the domains' perplexities; "own" calibrates on
one domain and scores that domain, again the geometric mean over domains. Perplexity: windows of 256 tokens,
independent, the first token of each unscored. Writes benchmarks/results/cpu/study_experts.json and prints tables.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics as stats
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moesparse import demo
from moesparse.blocks import find_moe_blocks
from moesparse.calibration import calibrate
from moesparse.evaluate import perplexity
from moesparse.refit import remove_and_refit
from moesparse.saliency.experts import (
    EXPERT_CRITERIA,
    bootstrap_stability,
    expert_scores,
    jaccard,
)
from moesparse.selection import choose_experts
from moesparse.statistics import ModelStatistics
from moesparse.surgery import remove_experts

RESULTS = Path(__file__).parent / "results" / "cpu" / "study_experts.json"
REMOVED = (0.25, 0.5)
REFITTED = ("frequency", "reap", "gated-norm")
SPECIALISTS = ("scripture", "code")


class Study:
    """The dense model, its texts, and perplexities that were measured already."""

    def __init__(self, seeds: int, windows: int, heldout: int) -> None:
        """Args:
        seeds: choices of calibration windows.
        windows: calibration windows for one domain; agnostic statistics take as many of each domain.
        heldout: held-out windows of each domain.
        """
        self.model, _ = demo.load()
        self.blocks = find_moe_blocks(self.model)
        self.seeds, self.windows = seeds, windows
        self.heldout = {domain: _spread(demo.windows("heldout", domain), heldout) for domain in demo.DOMAINS}
        self._scored: dict[Any, float] = {}
        self._statistics: dict[Any, ModelStatistics] = {}
        self._pruned: tuple[Any, Any] = (None, None)

    def calibration(self, domain: str | None, seed: int) -> Tensor:
        """[n, 256] windows of a domain, or of all of them in turn, drawn by the seed."""
        parts = []
        for number, name in enumerate(demo.DOMAINS if domain is None else (domain,)):
            whole = demo.windows("calibration", name)
            generator = torch.Generator().manual_seed(1000 * seed + number)
            parts.append(whole[torch.randperm(len(whole), generator=generator)[: self.windows]])
        return torch.cat(parts)

    def statistics(self, domain: str | None, seed: int) -> ModelStatistics:
        key = (domain, seed)
        if key not in self._statistics:
            self._statistics[key] = calibrate(self.model, self.calibration(domain, seed), seed=seed)
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
            self._scored[key, domain] = perplexity(self._pruned[1], self.heldout[domain], batch_size=16).perplexity
        return self._scored[key, domain]

    def mean(self, kept: list[Tensor] | None, refit_on: tuple[str | None, int] | None = None) -> float:
        """Geometric mean over the domains."""
        return _geometric([self.score(kept, domain, refit_on) for domain in demo.DOMAINS])

    def _build(self, kept: list[Tensor] | None, refit_on: tuple[str | None, int] | None) -> Any:
        if kept is None:
            return self.model
        model = copy.deepcopy(self.model)
        if refit_on is None:
            remove_experts(model, kept)
        else:
            remove_and_refit(model, kept, self.calibration(*refit_on), batch_size=16)
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
            _say(f"{time.perf_counter() - started:6.0f} s  {_line(rows[-1])}")
    return {
        "model": {"parameters": sum(p.numel() for p in study.model.parameters()), "experts": 16, "layers": 4},
        "protocol": {
            "seeds": study.seeds,
            "calibration_windows_per_domain": study.windows,
            "heldout_windows_per_domain": len(next(iter(study.heldout.values()))),
            "window": 256,
            "torch": torch.__version__,
        },
        "dense": {domain: study.score(None, domain) for domain in demo.DOMAINS} | {"mean": study.mean(None)},
        "criteria": rows,
        "specialists": _specialists(study),
        "demonstrations": _demonstrations(study),
        "seconds": time.perf_counter() - started,
    }


def _row(study: Study, criterion: str, removed: float, refit: bool) -> dict[str, Any]:
    agnostic, own = [], []
    for seed in range(study.seeds):
        kept = study.kept(criterion, None, seed, removed)
        agnostic.append(study.mean(kept, (None, seed) if refit else None))
        if criterion == "random":
            continue
        each = []
        for domain in demo.DOMAINS:
            kept = study.kept(criterion, domain, seed, removed)
            each.append(study.score(kept, domain, (domain, seed) if refit else None))
        own.append(_geometric(each))
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


def _demonstrations(study: Study) -> list[dict[str, Any]]:
    """How firm the choice is with few windows: bootstrap over them."""
    rows = []
    for domain in SPECIALISTS:
        each = [calibrate(study.model, window[None]) for window in study.calibration(domain, 0)[:25]]
        for count in (5, 10, 25):
            if count > len(each):
                continue
            stability = bootstrap_stability(each[:count], "gated-norm", lambda scores: study.choose(scores, 0.5))
            rows.append({"domain": domain, "windows": count, "overlap per layer": stability.overlap.tolist()})
    return rows


def show(result: dict[str, Any]) -> None:
    dense = result["dense"]
    print(f"\ndense: {dense['mean']:.2f} (geometric mean of {', '.join(f'{d} {dense[d]:.2f}' for d in demo.DOMAINS)})")
    print(
        f"\n{'criterion':<14}{'refit':<7}"
        + "".join(f"{n + f' {r:.0%}':>18}" for n in ("agnostic", "own") for r in REMOVED)
    )
    for criterion in EXPERT_CRITERIA:
        for refit in (False, True):
            rows = [r for r in result["criteria"] if r["criterion"] == criterion and r["refit"] == refit]
            cells = [_cell(row[name]) for name in ("agnostic", "own") for row in rows]
            if rows:
                print(f"{criterion:<14}{'yes' if refit else '':<7}" + "".join(f"{cell:>18}" for cell in cells))
    print("\nkept for (gated-norm) -> perplexity, overlap of the two kept sets per layer")
    for row in result["specialists"]:
        figures = ", ".join(f"{name} {value:.1f}" for name, value in row["perplexity"].items())
        overlap = " ".join(f"{value:.2f}" for value in row["overlap per layer"])
        print(f"  {row['kept for']:<10} {row['removed']:.0%} removed: {figures}; {overlap}")
    print("\nbootstrap over windows (gated-norm, 50% removed): overlap with the choice from all, per layer")
    for row in result["demonstrations"]:
        print(f"  {row['domain']:<10} {row['windows']:>3}: " + " ".join(f"{v:.2f}" for v in row["overlap per layer"]))


def _line(row: dict[str, Any]) -> str:
    refit = " refit" if row["refit"] else ""
    figures = f"{_cell(row['agnostic'])}, own {_cell(row['own'])}"
    return f"{row['criterion']} {row['removed']:.0%}{refit}: {figures}"


def _cell(values: list[float]) -> str:
    if not values:
        return "-"
    spread = f" ± {stats.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{stats.fmean(values):.2f}{spread}"


def _geometric(values: list[float]) -> float:
    return math.exp(stats.fmean(math.log(value) for value in values))


def _spread(windows: Tensor, count: int) -> Tensor:
    """`count` windows, evenly spaced, so that every document of the split is met."""
    return windows[torch.linspace(0, len(windows) - 1, min(count, len(windows))).long()]


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one seed, fewer windows; a few minutes; writes no file")
    parser.add_argument("--json", action="store_true", help="print the result as JSON instead of tables")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    result = run(Study(1, 8, 6) if arguments.quick else Study(3, 16, 12))
    if not arguments.quick:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    if arguments.json:
        print(json.dumps(result, indent=2))
    else:
        show(result)


if __name__ == "__main__":
    main()
