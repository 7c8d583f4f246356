"""How much of the router's gate belongs in the sums that weights are chosen and solved by: H = sum g^(2a) x x^T.

    python -m benchmarks.studies.gate [--quick] [--seeds 3] [-o FOLDER]

Writes study_gate.json and study_gate.png, all at 2:4. The exponent a is 1 in every gated rule of the package, 0 leaves
the gate out of mask, least squares and rescaling alike. Tokens run through the model with their own gates: only the
sums change. Once on the 24 windows of the protocol and once on 160, as many as the README's table calibrates on.
Protocol otherwise: study_protocol.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor

from benchmarks.studies.protocol import Study, curve, finish, mean_and_spread, parser
from moesparse.calibration import recorder
from moesparse.pruning.recipe import Recipe
from moesparse.report.figures import new_figure

PATTERN = "2:4"
EXPONENTS = (0.0, 0.5, 1.0)
SPARSEGPT = ("gated-sparsegpt", "least-squares+rescale")
ADMM = ("gated-admm", "least-squares+rescale")
RULES = (SPARSEGPT, ADMM)
# windows, rule, exponents
RUNS = (
    (24, SPARSEGPT, (0.0, 0.25, 0.5, 0.75, 1.0, 1.5)),
    (160, SPARSEGPT, EXPONENTS),
    (24, ADMM, EXPONENTS),
    (160, ADMM, EXPONENTS),
)


@contextmanager
def gates_to_the(exponent: float) -> Iterator[None]:
    """Sums of the body weigh tokens by gate^exponent in place of the gate; what the model computes is untouched."""
    add = recorder._BatchSums.add

    def weighted(sums: Any, expert: int, inputs: dict[str, Tensor], f: Tensor, gates: Tensor) -> None:
        add(sums, expert, inputs, f, gates**exponent)

    recorder._BatchSums.add = weighted  # type: ignore[method-assign]
    try:
        yield
    finally:
        recorder._BatchSums.add = add  # type: ignore[method-assign]


def pruned(study: Study, recipe: Recipe, windows: int, exponent: float) -> dict[str, float]:
    with gates_to_the(exponent):
        model = study.prune_copy(recipe, study.draw(windows, recipe.seed))
    return {"perplexity": study.score(model)}


def run(study: Study) -> None:
    """Every exponent with every rule."""
    runs = ((study.calibration_windows, SPARSEGPT, (0.0, 1.0)),) if study.quick else RUNS
    study.measure(lambda: {"perplexity": study.score(study.model)}, windows=0)
    for windows, (mask, update), exponents in runs:
        for seed in study.seeds:
            recipe = Recipe(weights=PATTERN, saliency=mask, update=update, seed=seed)
            for exponent in exponents:
                setting = {"windows": windows, "mask": mask, "update": update, "exponent": exponent, "seed": seed}
                study.measure(partial(pruned, study, recipe, windows, exponent), **setting)


def cost(study: Study, windows: int, rule: tuple[str, str]) -> dict[float, list[float]]:
    """By exponent: perplexity over that of exponent 1 and the same seed, less one, in percent."""
    rows = study.select(windows=windows, mask=rule[0], update=rule[1])
    whole = {row["seed"]: row["perplexity"] for row in rows if row["exponent"] == 1.0}
    points: dict[float, list[float]] = {}
    for row in rows:
        if row["seed"] in whole:
            points.setdefault(row["exponent"], []).append(100 * (row["perplexity"] / whole[row["seed"]] - 1))
    return points


def windows_of(study: Study) -> list[int]:
    """Numbers of calibration windows that were measured, in order."""
    return sorted({row["windows"] for row in study.rows} - {0})


def figure(study: Study) -> Any:
    """Cost over the exponent, a panel for each amount of text."""
    drawn = new_figure(3.8, 10.0)
    amounts = windows_of(study)
    panels = drawn.subplots(1, len(amounts), sharey=True, squeeze=False)[0]
    for panel, windows in zip(panels, amounts, strict=True):
        for number, rule in enumerate(RULES):
            points = cost(study, windows, rule)
            if points:
                curve(panel, points, number, " ".join(rule).removesuffix(" none"))
        panel.axhline(0, color="#444444", linewidth=1)
        finish(panel, f"{PATTERN}, {windows} calibration windows", "exponent a of the gate", "")
    panels[0].set_ylabel("perplexity over exponent 1, %")
    panels[0].legend(fontsize=8, frameon=False)
    return drawn


def show(study: Study) -> None:
    """Print perplexities at exponent 1, and what the others cost."""
    for windows in windows_of(study):
        for rule in RULES:
            points = cost(study, windows, rule)
            if not points:
                continue
            rows = study.select(windows=windows, mask=rule[0], update=rule[1], exponent=1.0)
            whole, deviation = mean_and_spread(row["perplexity"] for row in rows)
            cells = ["a={:g} {:+.2f}% ±{:.2f}".format(a, *mean_and_spread(points[a])) for a in sorted(points)]
            print(f"{windows:4} {' '.join(rule):40}{whole:.2f} ±{deviation:.2f}   " + "   ".join(cells))


def main(arguments: list[str] | None = None) -> None:
    options = parser(__doc__).parse_args(arguments)
    Study("study_gate", options).conduct(run, show, figure)


if __name__ == "__main__":
    main()
