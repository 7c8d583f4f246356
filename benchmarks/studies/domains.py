"""Calibration text for a choice of experts: how domains mix, whose text, and how much of it.

    python -m benchmarks.studies.domains                    # about a quarter of an hour on one core
    python -m benchmarks.studies.domains --quick            # one seed, few windows, nothing written

Experts are really removed, without refit, and the smaller model is scored on held-out text, as in study_experts.py.

- mixing: "pooled" and "equal" on all domains, once with as much text of each and once with eight times as much of one.
- own text: half of each window is the model's own continuation of the first half, greedy or drawn, against the text of
  the domain itself, and against as much text in prompts alone.
- amount: choices from the first 5, 10, 15 and 25 windows of a domain: the bootstrap overlap that the tool reports, the
  overlap with the choice from all its windows, and the perplexity each choice gives.
- super-experts: the largest output of every expert over the median of all.

A seed is a choice of calibration windows. Writes study_domains.json beside the testbed's results and prints tables.
"""

from __future__ import annotations

import json
import statistics as stats
import sys
import time
from typing import Any

import torch
from torch import Tensor

from benchmarks.studies.experts import REMOVED, Study, cell, opened, parser, path_of, say
from benchmarks.studies.protocol import geometric
from benchmarks.studies.testbed import EMBEDDED
from moesparse import demo
from moesparse.benchmarking import environment
from moesparse.calibration.demonstrations import continue_prompts
from moesparse.calibration.whole import calibrate
from moesparse.experts.criteria import (
    STABLE_OVERLAP,
    bootstrap_stability,
    expert_scores,
    jaccard,
    stack_sums,
    super_experts,
)
from moesparse.experts.domains import MIXES, mixed_scores

CRITERIA = ("reap", "gated-norm", "gated-energy")
LOUD = "novel"
AMOUNTS = (5, 10, 15, 25)
MOST_WINDOWS = 40
OWN_CRITERION = "gated-norm"
TEMPERATURES = (0.0, 1.0)


def mixing(study: Study) -> list[dict[str, Any]]:
    """Both mixes, with even text and with `LOUD` in the majority."""
    rows = []
    for text in ("even", f"mostly {LOUD}"):
        few = max(1, study.windows // 4)
        parts = []
        for seed in range(study.seeds):
            each = {}
            for domain in study.domains:
                count = study.windows if text == "even" else 8 * few if domain == LOUD else few
                each[domain] = calibrate(study.model, study.draw(domain, seed, count))
            parts.append(each)
        for criterion in CRITERIA:
            for mix in MIXES:
                for removed in REMOVED:
                    values = []
                    for each in parts:
                        sums = {domain: stack_sums(one, criterion) for domain, one in each.items()}
                        values.append(study.mean(study.choose(mixed_scores(sums, criterion, mix), removed)))
                    row = {"text": text, "criterion": criterion, "mix": mix, "removed": removed, "perplexity": values}
                    rows.append(row)
                    say(f"{text}, {criterion}, {mix}, {removed:.0%}: {cell(values)}")
    return rows


def own_text(study: Study) -> list[dict[str, Any]]:
    """Calibrated on each domain and scored on it: the text itself, or what the model makes of its first half."""
    length = study.testbed.length
    sources: dict[str, Any] = {"text": lambda windows, seed: windows}
    for temperature in TEMPERATURES:

        def written(windows: Tensor, seed: int, temperature: float = temperature) -> Any:
            return continue_prompts(
                study.model,
                windows[:, : length // 2],
                length // 2,
                temperature=temperature,
                seed=seed,
                batch_size=study.testbed.batch,
            )

        sources[f"model, temperature {temperature:g}"] = written
    sources["prompts alone"] = lambda windows, seed: windows[:, : length // 2]
    rows = []
    for name, make in sources.items():
        parts = [
            {domain: calibrate(study.model, make(study.calibration(domain, seed), seed)) for domain in study.domains}
            for seed in range(study.seeds)
        ]
        for removed in REMOVED:
            values = [
                geometric(
                    [
                        study.score(study.choose(expert_scores(one, OWN_CRITERION), removed), domain)
                        for domain, one in each.items()
                    ]
                )
                for each in parts
            ]
            rows.append({"source": name, "removed": removed, "perplexity": values})
            say(f"{name}, {removed:.0%}: {cell(values)}")
    return rows


def amount(study: Study) -> list[dict[str, Any]]:
    """How firm and how good a choice from few windows is, half of the experts removed, mean over domains and draws."""

    def choose(scores: Tensor) -> list[Tensor]:
        return study.choose(scores, 0.5)

    every: dict[str, list[Any]] = {}
    for domain in study.domains:
        # of a real testbed, which has more than anybody runs, as many as the embedded model has
        embedded = study.testbed.name == EMBEDDED
        windows = demo.windows("calibration", domain) if embedded else study.draw(domain, 0, MOST_WINDOWS)
        every[domain] = [calibrate(study.model, window[None]) for window in windows]
    whole = {domain: choose(_pooled(parts)) for domain, parts in every.items()}
    rows = []
    for count in (*AMOUNTS, None):
        overlap, least, truth, values = [], [], [], []
        stable = 0
        for seed in range(study.seeds if count else 1):
            scored = []
            for number, (domain, parts) in enumerate(every.items()):
                generator = torch.Generator().manual_seed(1000 * seed + number)
                drawn = [parts[i] for i in torch.randperm(len(parts), generator=generator)[:count]]
                kept = choose(_pooled(drawn))
                firm = bootstrap_stability(drawn, OWN_CRITERION, choose, seed=seed)
                overlap.append(float(firm.overlap.mean()))
                least.append(float(firm.overlap.min()))
                stable += firm.stable
                truth.append(float(jaccard(kept, whole[domain]).mean()))
                scored.append(study.score(kept, domain))
            values.append(geometric(scored))
        row = {
            "windows": count or "all",
            "choices": len(overlap),
            "bootstrap overlap": stats.fmean(overlap),
            "in the least stable block": min(least),
            "called stable": stable,
            "overlap with all windows": stats.fmean(truth),
            "perplexity": values,
        }
        rows.append(row)
        say(f"{row['windows']} windows: bootstrap {row['bootstrap overlap']:.2f}, {cell(values)}")
    return rows


def _pooled(parts: list[Any]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return expert_scores(total, OWN_CRITERION)


def outliers(study: Study) -> dict[str, Any]:
    """Whether the embedded model has super-experts."""
    statistics = study.statistics(None, 0)
    largest = torch.stack([block.maxima["output"] for block in statistics.blocks.values()]).double()
    return {
        "found": super_experts(statistics),
        "median": float(largest.median()),
        "largest over median, per block": (largest.amax(1) / largest.median()).tolist(),
    }


def show(result: dict[str, Any]) -> None:
    print("\nmixing: perplexity on all domains")
    for text in dict.fromkeys(row["text"] for row in result["mixing"]):
        for criterion in CRITERIA:
            for mix in MIXES:
                rows = [r for r in result["mixing"] if (r["text"], r["criterion"], r["mix"]) == (text, criterion, mix)]
                print(f"  {text:<14}{criterion:<14}{mix:<8}" + "".join(f"{cell(r['perplexity']):>18}" for r in rows))
    print(f"\nown text ({OWN_CRITERION}): perplexity on the domain calibrated on")
    for name in dict.fromkeys(row["source"] for row in result["own text"]):
        rows = [row for row in result["own text"] if row["source"] == name]
        print(f"  {name:<24}" + "".join(f"{cell(row['perplexity']):>18}" for row in rows))
    print(
        f"\namount ({OWN_CRITERION}, 50% removed): windows, bootstrap overlap (least), called stable, overlap with all"
    )
    for row in result["amount"]:
        print(
            f"  {row['windows']!s:>4}  {row['bootstrap overlap']:.2f} ({row['in the least stable block']:.2f})  "
            f"{row['called stable']}/{row['choices']}  {row['overlap with all windows']:.2f}  {cell(row['perplexity'])}"
        )
    ratios = " ".join(f"{ratio:.1f}" for ratio in result["super-experts"]["largest over median, per block"])
    print(f"\nsuper-experts: {result['super-experts']['found'] or 'none'}; largest over median, per block: {ratios}")


def main() -> None:
    arguments = parser(__doc__).parse_args()
    torch.manual_seed(0)
    study = opened(arguments)
    started = time.perf_counter()
    result = {
        "command": " ".join(("python", "-m", "benchmarks.studies.domains", *sys.argv[1:])),
        "machine": environment(torch.device("cpu")),
        "protocol": {
            "seeds": study.seeds,
            "calibration_windows_per_domain": study.windows,
            "heldout_windows_per_domain": len(next(iter(study.heldout.values()))),
            "window": study.testbed.length,
            "stable from": STABLE_OVERLAP,
        },
        "dense": study.mean(None),
        "mixing": mixing(study),
        "own text": own_text(study),
        "amount": amount(study),
        "super-experts": outliers(study),
    }
    result["seconds"] = time.perf_counter() - started
    if not arguments.quick:
        path_of(arguments, "study_domains").write_text(json.dumps(result, indent=1) + "\n")
    show(result)


if __name__ == "__main__":
    main()
