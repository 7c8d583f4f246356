"""Perplexity against bits a weight: values rounded by every rule, with a 2:4 mask and without one.

    python -m benchmarks.studies.frontier [--quick] [--seeds 1] [--testbed embedded] [-o FOLDER]
    python -m benchmarks.studies.frontier --seeds 3 --variant text      # whether the gate helps where text is longer

Writes study_frontier.json and study_frontier.png. Bits are those of the expert matrices as their format would take
them: codes, scales, and under a mask one bit a weight. GPTQ is also run in the order of the columns, and without
solving for scales again in the end, neither of which a recipe can ask for, and both GPTQs on 160 windows ("text").
"above" is the mean over windows of the log
loss above the dense model's, with its standard error. Protocol otherwise: study_protocol.py.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

from benchmarks.studies.protocol import Study, curve, finish, mean_and_spread, parser
from benchmarks.studies.testbed import Score
from moesparse.pruning import values as rounding
from moesparse.pruning.recipe import Recipe
from moesparse.pruning.run import prune
from moesparse.report.figures import new_figure
from moesparse.weights.value_rules import VALUE_RULES, choose_values

MASK = {"saliency": "gated-sparsegpt", "update": "least-squares+rescale"}
FORMATS = ("int8", "int4:64", "int3:64", "int2:64")
OTHERS = ("fp8", "fp8:128x128", "mxfp4", "nvfp4", "int4:64:zero", "int3:64:zero", "int2:64:zero")
BEST = "gated-gptq"
VARIANTS: dict[str, dict[str, Any]] = {"columns": {"order": "columns"}, "unsolved": {"resolve": False}, "text": {}}
MORE_WINDOWS = 160


class Point(NamedTuple):
    """A pattern or none, a format of values or none, its rule, and what is different of it."""

    weights: str | None
    values: str | None
    rule: str = ""
    variant: str = ""


def points(quick: bool) -> list[Point]:
    """All that is measured, in order."""
    if quick:
        return [Point(None, "int4:64", rule) for rule in ("rtn", BEST)] + [Point("2:4", "int8", "rtn")]
    found = [Point(None, values, rule) for values in FORMATS for rule in VALUE_RULES]
    found += [Point("2:4", None)]
    found += [Point("2:4", values, rule) for values in FORMATS[:2] for rule in VALUE_RULES]
    found += [Point("2:4", "int3:64", rule) for rule in ("rtn-mse", BEST)]
    found += [Point(None, values, BEST) for values in OTHERS]
    found += [Point(None, values, BEST, variant) for variant in ("columns", "unsolved") for values in FORMATS[1:]]
    found += [Point(None, values, rule, "text") for values in FORMATS[1:] for rule in ("gptq", BEST)]
    return found


@contextmanager
def variant_of(name: str) -> Iterator[None]:
    """GPTQ with what a recipe cannot ask for, while the body runs."""
    rounding.choose_values = partial(choose_values, **VARIANTS.get(name, {}))
    try:
        yield
    finally:
        rounding.choose_values = choose_values


def rounded(study: Study, point: Point, seed: int, dense: Score) -> dict[str, Any]:
    """One model's perplexity, its bits a weight, and how far its loss is above the dense one's."""
    recipe = Recipe(weights=point.weights, values=point.values, value_rule=point.rule or "auto", seed=seed, **MASK)
    model = copy.deepcopy(study.model)
    windows = study.draw(MORE_WINDOWS if point.variant == "text" else study.calibration_windows, seed)
    with variant_of(point.variant):
        report = prune(model, windows, recipe, batch_size=study.batch, progress=None)
    scored = study.scores(model)
    above, error = scored.above(dense)
    # 2:4 in bfloat16: half of the values, and one bit that says which
    bits = 9.0 if report.bits is None else report.bits
    return {"perplexity": scored.perplexity, "bits": bits, "above": above, "above_error": error}


def run(study: Study, variants: Sequence[str] = ("", *VARIANTS)) -> None:
    """Every point of these variants with every draw."""
    row = study.measure(lambda: _dense(study), weights="dense")
    dense = Score(row["nats"])
    for seed in study.seeds:
        for point in points(study.quick):
            if point.variant not in variants:
                continue
            setting = {**point._asdict(), "weights": point.weights or "none", "seed": seed}
            study.measure(partial(rounded, study, point, seed, dense), **setting)


def _dense(study: Study) -> dict[str, Any]:
    scored = study.scores(study.model)
    return {"perplexity": scored.perplexity, "bits": 16.0, "nats": scored.nats}


def by_bits(study: Study, **setting: Any) -> dict[float, list[float]]:
    """Bits a weight -> perplexities of the draws."""
    found: dict[float, list[float]] = {}
    for row in study.select(variant="", **setting):
        found.setdefault(row["bits"], []).append(row["perplexity"])
    return found


def figure(study: Study) -> Any:
    """Perplexity over bits, a line for each rule, with the mask and without."""
    drawn = new_figure(4.2, 8.0)
    axes = drawn.subplots()
    for number, rule in enumerate(VALUE_RULES):
        plain = [by_bits(study, weights="none", values=values, rule=rule) for values in FORMATS]
        curve(axes, {bits: found for each in plain for bits, found in each.items()}, number, rule)
    masked = by_bits(study, weights="2:4", rule=BEST) | by_bits(study, weights="2:4", values=None)
    curve(axes, masked, len(VALUE_RULES), f"2:4, {BEST}", linestyle="--")
    axes.axhline(study.rows[0]["perplexity"], color="#444444", linewidth=1)
    finish(axes, "values of the experts", "bits a weight", "perplexity")
    axes.legend(fontsize=8, frameon=False)
    return drawn


def show(study: Study) -> None:
    """Print a line for every point."""
    print(f"dense {study.rows[0]['perplexity']:.2f}")
    for point in points(study.quick):
        rows = study.select(**{**point._asdict(), "weights": point.weights or "none"})
        if not rows:
            continue
        mean, deviation = mean_and_spread(row["perplexity"] for row in rows)
        above, error = (sum(row[name] for row in rows) / len(rows) for name in ("above", "above_error"))
        name = f"{point.weights or 'none':5} {point.values or 'bf16':13} {point.rule:11} {point.variant:9}"
        print(f"{name} {rows[0]['bits']:6.3f} bits {mean:7.3f} ±{deviation:.3f}   nats {above:+.4f} ±{error:.4f}")


def main(arguments: list[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("--variant", action="append", choices=VARIANTS, help="these alone; repeat for more")
    chosen = options.parse_args(arguments)
    asked = partial(run, variants=chosen.variant or ("", *VARIANTS))
    Study("study_frontier", chosen).conduct(asked, show, figure)


if __name__ == "__main__":
    main()
