"""How much calibration text is enough, and whose: 1 to 512 sequences, one domain against the mix.

    python -m benchmarks.studies.calibration [--quick] [--seeds 3] [-o FOLDER]

Writes study_calibration.json and study_calibration.png, all at 2:4. Sequences are 120 tokens here, so that the embedded
text has 512 of them; they take turns among the domains. The second part calibrates on 64 sequences of one domain, or of
all in turn, and scores every domain by itself. Protocol otherwise: study_protocol.py.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from benchmarks.studies.protocol import Study, curve, finish, geometric, mean_and_spread, parser
from moesparse.pruning.recipe import Recipe
from moesparse.report.figures import new_figure

PATTERN = "2:4"
LENGTH = 120
SIZES = (1, 4, 16, 64, 256, 512)
BY_DOMAIN = 64
RULES = (
    ("wanda", "none"),
    ("moe-pruner", "none"),
    ("gated-sparsegpt", "obs"),
    ("gated-sparsegpt", "least-squares+rescale"),
)
# what needs column norms only, and what solves with second moments
DOMAIN_RULES = (("moe-pruner", "none"), ("gated-sparsegpt", "least-squares+rescale"))


def by_domain(study: Study, recipe: Recipe, domain: str | None, count: int) -> dict[str, Any]:
    """Perplexity of every domain after calibration on one, or on all (None)."""
    pruned = study.prune_copy(recipe, study.draw(count, recipe.seed, domain, LENGTH))
    return {"perplexity": {name: study.score(pruned, name) for name in study.domains}}


def run(study: Study) -> None:
    """Both parts."""
    sizes, domains = (SIZES, study.domains) if not study.quick else ((1, 8), study.domains[:1])
    study.measure(lambda: {"perplexity": study.score(study.model)}, part="dense")
    for seed in study.seeds:
        for mask, update in RULES if not study.quick else RULES[1:2]:
            recipe = Recipe(weights=PATTERN, saliency=mask, update=update, seed=seed)
            for size in sizes:
                windows = study.draw(size, seed, length=LENGTH)
                setting = {"sequences": size, "mask": mask, "update": update, "seed": seed}
                study.measure(partial(study.pruned, recipe, windows), part="size", **setting)
        for mask, update in DOMAIN_RULES if not study.quick else DOMAIN_RULES[:1]:
            recipe = Recipe(weights=PATTERN, saliency=mask, update=update, seed=seed)
            for domain in (None, *domains):
                setting = {"domain": domain or "mix", "mask": mask, "update": update, "seed": seed}
                count = BY_DOMAIN if not study.quick else 8
                study.measure(partial(by_domain, study, recipe, domain, count), part="domain", **setting)


def sizes_of(study: Study, mask: str, update: str) -> dict[float, list[float]]:
    """Perplexities over seeds by number of sequences."""
    points: dict[float, list[float]] = {}
    for row in study.select(part="size", mask=mask, update=update):
        points.setdefault(row["sequences"], []).append(row["perplexity"])
    return points


def loss(study: Study, mask: str, update: str) -> dict[tuple[str, str], tuple[float, float]]:
    """(calibrated on, scored on) -> mean and spread over seeds of perplexity over the mix's, less one, in percent.

    "others" is the geometric mean over the domains that were not calibrated on.
    """
    ratios: dict[tuple[str, str], list[float]] = {}
    rows = study.select(part="domain", mask=mask, update=update)
    mixed = {row["seed"]: row["perplexity"] for row in rows if row["domain"] == "mix"}
    for row in rows:
        if row["domain"] == "mix":
            continue
        each = {name: value / mixed[row["seed"]][name] for name, value in row["perplexity"].items()}
        each["others"] = geometric([ratio for name, ratio in each.items() if name != row["domain"]])
        for name, ratio in each.items():
            ratios.setdefault((row["domain"], name), []).append(100 * (ratio - 1))
    return {key: mean_and_spread(held) for key, held in ratios.items()}


def figure(study: Study) -> Any:
    """Perplexity over sequences; what one domain alone costs on itself and on the others."""
    import numpy as np

    from benchmarks.figures import COLOURS

    drawn = new_figure(4.2, 11.0)
    left, right = drawn.subplots(1, 2, width_ratios=(1.2, 1))
    for number, rule in enumerate(RULES):
        points = sizes_of(study, *rule)
        if points:
            curve(left, points, number, " ".join(rule).removesuffix(" none"))
    dense = study.select(part="dense")[0]["perplexity"]
    left.axhline(dense, color="#444444", linestyle="--", linewidth=1)
    left.annotate(f"dense {dense:.1f}", (1, dense), fontsize=8, va="bottom")
    left.set_xscale("log", base=2)
    left.set_xticks(SIZES, [str(size) for size in SIZES])
    left.legend(fontsize=8, frameon=False)
    finish(left, f"{PATTERN}, the mix", f"calibration sequences of {LENGTH} tokens", "held-out perplexity")

    domains = [name for name in study.domains if study.select(part="domain", domain=name)]
    bars = [(rule, where) for rule in DOMAIN_RULES for where in ("itself", "others")]
    for number, (rule, where) in enumerate(bars):
        held = loss(study, *rule)
        costs = [held[name, name if where == "itself" else "others"] for name in domains if (name, name) in held]
        right.bar(
            np.arange(len(costs)) + (number - 1.5) * 0.2,
            [mean for mean, _ in costs],
            0.2,
            yerr=[deviation for _, deviation in costs],
            capsize=2,
            label=f"{' '.join(rule).removesuffix(' none')}: on {where}",
            color=COLOURS[number // 2],
            alpha=1.0 if where == "itself" else 0.55,
            hatch=None if where == "itself" else "///",
        )
    right.axhline(0, color="#444444", linewidth=1)
    right.set_xticks(range(len(domains)), domains, fontsize=8)
    low, high = right.get_ylim()
    right.set_ylim(low, high + 0.35 * (high - low))
    right.legend(fontsize=7, frameon=False, loc="upper left", ncols=2)
    finish(right, f"{PATTERN}, {BY_DOMAIN} sequences of one domain", "calibrated on", "perplexity over the mix's, %")
    return drawn


def show(study: Study) -> None:
    """Print both tables."""
    for rule in RULES:
        points = sizes_of(study, *rule)
        cells = ["{:d}: {:.2f} ±{:.2f}".format(size, *mean_and_spread(points[size])) for size in sorted(points)]
        print(f"{' '.join(rule):40}" + "  ".join(cells))
    for rule in DOMAIN_RULES:
        for (calibrated, scored), (mean, deviation) in loss(study, *rule).items():
            if scored in (calibrated, "others"):
                print(f"{' '.join(rule):40}{calibrated:12} on {scored:12} {mean:+7.2f}% ±{deviation:.2f}")


def main(arguments: list[str] | None = None) -> None:
    options = parser(__doc__).parse_args(arguments)
    Study("study_calibration", options, length=LENGTH).conduct(run, show, figure)


if __name__ == "__main__":
    main()
