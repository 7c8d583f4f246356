"""How far sparsity goes: 30 to 90% unstructured and five n:m patterns, each mask rule and each weight rule.

    python -m benchmarks.studies.limit [--quick] [--seeds 3] [-o FOLDER]

Writes study_limit.json and study_limit.png: held-out perplexity against the bytes of an expert weight. Bytes count the
kept values in bf16 and one bit a weight that says where they are, for unstructured sparsity too, though this package
packs n:m only; that is 9/16 of dense at 2:4. Protocol: study_protocol.py; random, magnitude, gated-admm: one seed.
"distilled" trains each block of the pruned model towards the dense experts on all of the embedded calibration text (242
windows, two epochs, rate 1e-3); one seed.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from benchmarks.studies.protocol import Study, curve, finish, mean_and_spread, parser
from moesparse.distillation import Settings, distill
from moesparse.pruning.recipe import Recipe
from moesparse.report.figures import new_figure
from moesparse.weights.patterns import Pattern

RATIOS = ("0.3", "0.5", "0.6", "0.7", "0.8", "0.9")
GROUPS = ("1:4", "2:4", "3:4", "4:8", "6:8")
RULES = (
    ("random", "none"),
    ("magnitude", "none"),
    ("wanda", "none"),
    ("moe-pruner", "none"),
    ("moe-pruner", "rescale"),
    ("moe-pruner", "least-squares+rescale"),
    ("sparsegpt", "obs"),
    ("gated-sparsegpt", "obs"),
    ("gated-sparsegpt", "least-squares+rescale"),
    ("gated-admm", "least-squares+rescale"),
)
DISTILLED = ("gated-sparsegpt", "least-squares+rescale")
DISTILLED_PATTERNS = ("0.5", "0.7", "0.9", "1:4", "2:4")
# magnitude does not look at the text, random is far from everything, gated-admm takes twice the time of all others
ONE_SEED = ("random", "magnitude", "gated-admm")
SHOWN = (
    ("magnitude", "none"),
    ("wanda", "none"),
    ("moe-pruner", "none"),
    ("moe-pruner", "rescale"),
    ("moe-pruner", "least-squares+rescale"),
    ("gated-sparsegpt", "least-squares+rescale"),
    ("gated-sparsegpt", "least-squares+rescale distilled"),
)


def bytes_per_weight(pattern: str) -> float:
    """Kept bf16 values and one bit of position."""
    return 2 * Pattern.parse(pattern).density + 1 / 8


def run(study: Study) -> None:
    """Measure every rule at every pattern."""
    patterns = ("0.5", "2:4") if study.quick else (*RATIOS, *GROUPS)
    rules = RULES[3:5] if study.quick else RULES
    study.measure(lambda: {"perplexity": study.score(study.model)}, pattern="dense")
    for seed in study.seeds:
        for mask, update in rules:
            if seed and mask in ONE_SEED:
                continue
            for pattern in patterns:
                recipe = Recipe(weights=pattern, saliency=mask, update=update, seed=seed)
                study.measure(partial(study.pruned, recipe), pattern=pattern, mask=mask, update=update, seed=seed)
    mask, update = DISTILLED
    for pattern in DISTILLED_PATTERNS if not study.quick else ():
        recipe = Recipe(weights=pattern, saliency=mask, update=update, seed=0)
        study.measure(
            partial(distilled, study, recipe), pattern=pattern, mask=mask, update=f"{update} distilled", seed=0
        )


def distilled(study: Study, recipe: Recipe) -> dict[str, Any]:
    """Pruned, and every block trained towards the dense one's experts on all of the calibration text."""
    student = study.prune_copy(recipe, study.draw(study.calibration_windows, recipe.seed))
    settings = Settings(learning_rate=1e-3, epochs=2, batch_size=8, micro_batch=8)
    report = distill(student, study.model, study.testbed.everything(), "blockwise", settings=settings)
    return {"perplexity": study.score(student), "zeros": list(report.zeros)}


def values(study: Study, pattern: str, mask: str, update: str) -> list[float]:
    """Perplexities over seeds."""
    return [row["perplexity"] for row in study.select(pattern=pattern, mask=mask, update=update)]


def figure(study: Study) -> Any:
    """Two panels, perplexity logarithmic: unstructured over bytes, and the n:m patterns in the order of bytes."""
    drawn = new_figure(4.4, 11.0)
    left, right = drawn.subplots(1, 2, sharey=True)
    dense = study.select(pattern="dense")[0]["perplexity"]
    groups = sorted(GROUPS, key=lambda pattern: (bytes_per_weight(pattern), len(pattern), pattern))
    for number, rule in enumerate(SHOWN):
        label = " ".join(rule).removesuffix(" none")
        shift = 0.09 * (number - len(SHOWN) / 2)
        for panel, places, style in (
            # not every ratio was distilled: a line would cross those left out
            (left, {p: bytes_per_weight(p) for p in RATIOS}, {"linestyle": "none"} if "distilled" in rule[1] else {}),
            (right, {p: place + shift for place, p in enumerate(groups)}, {"linestyle": "none"}),
        ):
            points = {place: values(study, p, *rule) for p, place in places.items() if values(study, p, *rule)}
            if points:
                curve(panel, points, number, label, **style)
    for panel in (left, right):
        panel.axhline(dense, color="#444444", linestyle="--", linewidth=1)
    left.set_yscale("log")
    ticks = [15, 17, 20, 25, 30, 40, 60, 100, 150]
    left.set_yticks(ticks, [str(tick) for tick in ticks])
    left.set_yticks([], minor=True)
    left.annotate(f"dense {dense:.1f}", (0.35, dense), fontsize=8, va="bottom")
    right.set_xticks(range(len(groups)), [f"{p}\n{bytes_per_weight(p):.2f}" for p in groups])
    right.legend(fontsize=8, frameon=False)
    finish(left, "unstructured", "bytes per expert weight (bf16 dense: 2)", "held-out perplexity")
    finish(right, "n:m", "pattern and bytes per expert weight", "")
    return drawn


def show(study: Study) -> None:
    """Print the table."""
    patterns = [p for p in (*RATIOS, *GROUPS) if study.select(pattern=p)]
    print(
        f"dense {study.select(pattern='dense')[0]['perplexity']:.2f}\n{'':40}" + "".join(f"{p:>14}" for p in patterns)
    )
    for rule in (*RULES, SHOWN[-1]):
        if not study.select(mask=rule[0], update=rule[1]):
            continue
        held = [values(study, pattern, *rule) for pattern in patterns]
        cells = ["{:8.2f} ±{:4.2f}".format(*mean_and_spread(each)) if each else "" for each in held]
        print(f"{' '.join(rule):40}" + "".join(f"{cell:>14}" for cell in cells))


def main(arguments: list[str] | None = None) -> None:
    options = parser(__doc__).parse_args(arguments)
    Study("study_limit", options).conduct(run, show, figure)


if __name__ == "__main__":
    main()
