"""Does the order of methods hold on other architectures: sigmoid with bias, top-1, a shared expert, GEGLU.

    for v in mixtral sigmoid-bias top-1 shared-expert geglu; do
        python benchmarks/demo_model/train.py --work WORK --variant $v --out MODELS/$v \\
            --steps 300 --per-domain 2 --warmup 50 --bias-rate 0.01
    done
    python -m benchmarks.studies.architectures --models MODELS [--quick] [--seeds 3] [-o FOLDER]

Writes study_architectures.json and study_architectures.png. The five models are trained alike, a tenth of the embedded
model's steps on half its batch (benchmarks/demo_model/README.md says how to make WORK; the models are not shipped).
Weights: 2:4 by each rule. Experts: 4 of 16 removed by each criterion, not refitted. Protocol: study_protocol.py.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.studies.protocol import Study, finish, mean_and_spread, parser
from moesparse.calibration.whole import calibrate
from moesparse.experts.criteria import expert_scores
from moesparse.experts.selection import choose_experts
from moesparse.experts.surgery import remove_experts
from moesparse.models.fingerprint import model_fingerprint
from moesparse.pruning.recipe import Recipe
from moesparse.report.figures import new_figure

REFERENCE = "mixtral"
VARIANTS = (REFERENCE, "sigmoid-bias", "top-1", "shared-expert", "geglu")
PATTERN, REMOVED = "2:4", 0.25
RULES = (
    ("random", "none"),
    ("magnitude", "none"),
    ("wanda", "none"),
    ("moe-pruner", "none"),
    ("moe-pruner", "rescale"),
    ("moe-pruner", "least-squares+rescale"),
    ("gated-sparsegpt", "obs"),
    ("gated-sparsegpt", "least-squares+rescale"),
    ("gated-admm", "least-squares+rescale"),
)
CRITERIA = ("random", "frequency", "gate-sum", "ean", "reap", "man", "msan", "gated-norm", "gated-energy", "easy-ep")


def load(folder: Path, variants: Sequence[str]) -> dict[str, Any]:
    """Trained variants by name.

    Raises:
        SystemExit: one of them is missing.
    """
    from transformers import AutoModelForCausalLM

    models = {}
    for name in variants:
        path = folder / name / "model"
        if not (path / "config.json").is_file():
            raise SystemExit(f"--models must hold {name}/model, got {folder}: train it, {Path(__file__).name} says how")
        models[name] = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, local_files_only=True).eval()
    return models


def run(study: Study, models: dict[str, Any]) -> None:
    """Every method on every model."""
    rules, criteria = (RULES, CRITERIA) if not study.quick else (RULES[3:5], CRITERIA[1:3])
    which = {name: {"variant": name, "model": model_fingerprint(model)} for name, model in models.items()}
    for variant, model in models.items():
        study.measure(lambda model=model: {"perplexity": study.score(model)}, **which[variant], part="dense")
    for seed in study.seeds:
        for variant, model in models.items():
            statistics = None
            for rule, update in rules:
                recipe = Recipe(weights=PATTERN, saliency=rule, update=update, seed=seed)
                setting = {**which[variant], "part": "weights", "rule": rule, "update": update, "seed": seed}
                study.measure(partial(study.pruned, recipe, model=model), **setting)
            for criterion in criteria:
                setting = {**which[variant], "part": "experts", "rule": criterion, "seed": seed}
                if study.select(**setting):
                    continue
                windows = study.draw(study.calibration_windows, seed)
                statistics = statistics or calibrate(model, windows, batch_size=study.batch)
                study.measure(partial(without_experts, study, model, statistics, criterion, seed), **setting)


def without_experts(study: Study, model: Any, statistics: Any, criterion: str, seed: int) -> dict[str, float]:
    """Perplexity after a quarter of the experts was removed."""
    scores = expert_scores(statistics, criterion, seed=seed)
    smaller = copy.deepcopy(model)
    remove_experts(smaller, choose_experts(scores, remove=REMOVED, top_k=model.config.num_experts_per_tok))
    return {"perplexity": study.score(smaller)}


def costs(study: Study, variant: str, part: str) -> dict[str, list[float]]:
    """Method -> perplexity over dense, less one, in percent, of every seed."""
    dense = study.select(variant=variant, part="dense")[0]["perplexity"]
    held: dict[str, list[float]] = {}
    for row in study.select(variant=variant, part=part):
        name = f"{row['rule']} {row.get('update', '')}".strip().removesuffix(" none")
        held.setdefault(name, []).append(100 * (row["perplexity"] / dense - 1))
    return held


def agreement(one: dict[str, list[float]], other: dict[str, list[float]]) -> float:
    """Kendall's tau of the mean costs, ties left out: 1 the same order, 0 none in common, -1 the reverse.

    nan when every pair is a tie.
    """
    a, b = ({name: mean_and_spread(values)[0] for name, values in held.items()} for held in (one, other))
    names = [name for name in a if name in b]
    pairs = [(x, y) for i, x in enumerate(names) for y in names[i + 1 :]]
    products = [(a[x] - a[y]) * (b[x] - b[y]) for x, y in pairs]
    signs = [1 if product > 0 else -1 for product in products if product]
    return sum(signs) / len(signs) if signs else math.nan


def figure(study: Study, variants: list[str]) -> Any:
    """Cost by architecture, a line for each method."""
    from benchmarks.figures import COLOURS, MARKERS

    drawn = new_figure(4.8, 11.0)
    panels = drawn.subplots(1, 2)
    for panel, part, title in zip(
        panels, ("weights", "experts"), (f"weights to {PATTERN}", f"{REMOVED:.0%} of the experts removed"), strict=True
    ):
        methods = list(costs(study, variants[0], part))
        for number, method in enumerate(methods):
            summary = [mean_and_spread(costs(study, variant, part)[method]) for variant in variants]
            panel.errorbar(
                [place + 0.05 * (number - len(methods) / 2) for place in range(len(variants))],
                [mean for mean, _ in summary],
                [deviation for _, deviation in summary],
                label=method,
                color=COLOURS[number % len(COLOURS)],
                marker=MARKERS[number % len(MARKERS)],
                fillstyle="full" if number < len(COLOURS) else "none",
                linestyle="none",
                capsize=2,
            )
        panel.set_xticks(range(len(variants)), variants, fontsize=8)
        panel.set_yscale("log")
        ticks = [1, 2, 5, 10, 20, 30, 50, 100, 200, 400]
        panel.set_yticks(ticks, [str(tick) for tick in ticks])
        panel.set_yticks([], minor=True)
        panel.legend(fontsize=7, frameon=False, ncols=2, loc="upper right")
        finish(panel, title, "", "")
        low, high = panel.get_ylim()
        panel.set_ylim(low, high * 6)
    panels[0].set_ylabel("held-out perplexity over dense, %")
    return drawn


def show(study: Study, variants: list[str]) -> None:
    """Print costs and agreement with the reference."""
    for variant in variants:
        print(f"{variant}: dense {study.select(variant=variant, part='dense')[0]['perplexity']:.2f}")
    for part in ("weights", "experts"):
        reference = costs(study, variants[0], part)
        print(f"\n{part:40}" + "".join(f"{variant:>18}" for variant in variants))
        for method in reference:
            cells = ["{:+.1f}% ±{:.1f}".format(*mean_and_spread(costs(study, v, part)[method])) for v in variants]
            print(f"{method:40}" + "".join(f"{cell:>18}" for cell in cells))
        taus = [f"{agreement(reference, costs(study, variant, part)):+.2f}" for variant in variants]
        print(f"{'Kendall tau with ' + variants[0]:40}" + "".join(f"{tau:>18}" for tau in taus))


def main(arguments: list[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("--models", type=Path, required=True, help="folder with VARIANT/model for every variant")
    options.add_argument("--variants", nargs="+", choices=VARIANTS[1:], default=VARIANTS[1:], help="beside mixtral")
    chosen = options.parse_args(arguments)
    models = load(chosen.models, (REFERENCE, *chosen.variants))
    study = Study("study_architectures", chosen, model=models[REFERENCE])
    names = list(models)
    study.conduct(partial(run, models=models), partial(show, variants=names), partial(figure, variants=names))


if __name__ == "__main__":
    main()
