"""Does the choice of weights stand when the router wavers: noise and temperature on its logits, text of one domain.

    python -m benchmarks.studies.stability [--quick] [--seeds 3] [-o FOLDER]

Writes study_stability.json and study_stability.png, all at 2:4. The router is disturbed while the model is calibrated
and pruned, and then left as it was: logits get Gaussian noise, its deviation in units of the logits' own over experts,
or are divided by a temperature (the chosen experts stay, their gates move). Overlap is the share of kept weights that
the undisturbed run keeps too; two random 2:4 masks share 50%. "other windows" draws the calibration text anew: what the
luck of the draw does by itself. Protocol otherwise: study_protocol.py.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.studies.protocol import Study, curve, finish, mean_and_spread, parser
from moesparse.models.blocks import find_moe_blocks
from moesparse.pruning.recipe import Recipe
from moesparse.pruning.run import prune
from moesparse.report.figures import new_figure

PATTERN = "2:4"
NOISES = (0.25, 0.5, 1.0, 2.0)
TEMPERATURES = (0.25, 0.5, 2.0, 4.0)
RULES = (("wanda", "none"), ("moe-pruner", "none"), ("gated-sparsegpt", "least-squares+rescale"))
KINDS = ("noise", "temperature", "domain", "other windows")


@contextmanager
def disturbed(model: Any, *, noise: float = 0.0, temperature: float = 1.0, seed: int = 0) -> Iterator[list[float]]:
    """Route by disturbed logits in the body.

    Args:
        model: a Mixtral: softmax over the logits, top-k, gates normalised to sum 1.
        noise: deviation of the noise over that of the token's logits over experts.
        temperature: what the logits are divided by, after the noise.
        seed: of the noise.

    Yields:
        for every router call the share of slots that went to another expert.
    """
    moved: list[float] = []

    def reroute(layer: int, _module: nn.Module, _inputs: Any, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        logits, gates, chosen = output
        # anew in every call: a layer that is run again on the same batch must route it the same way
        generator = torch.Generator().manual_seed(1000 * seed + layer)
        deviation = logits.float().std(dim=-1, keepdim=True)
        wild = (logits + noise * deviation * torch.randn(logits.shape, generator=generator)) / temperature
        probs, experts = wild.softmax(-1).topk(chosen.shape[-1], dim=-1)
        stayed = (experts.unsqueeze(-1) == chosen.unsqueeze(-2)).any(-1)
        moved.append(1 - stayed.float().mean().item())
        return logits, (probs / probs.sum(-1, keepdim=True)).to(gates), experts

    handles = [
        block.moe.gate.register_forward_hook(partial(reroute, layer))
        for layer, block in enumerate(find_moe_blocks(model))
    ]
    try:
        yield moved
    finally:
        for handle in handles:
            handle.remove()


def overlap(model: Any, reference: Any) -> float:
    """Share of the expert weights kept in `model` that `reference` keeps too."""
    both = kept = 0
    for block, other in zip(find_moe_blocks(model), find_moe_blocks(reference), strict=True):
        for matrix, base in zip(block.matrices, other.matrices, strict=True):
            mask = matrix.weight != 0
            both += int((mask & (base.weight != 0)).sum())
            kept += int(mask.sum())
    return both / kept


def run(study: Study) -> None:
    """Every disturbance with every rule."""
    rules = RULES if not study.quick else RULES[1:2]
    conditions: list[tuple[str, Any]] = [("none", None), ("other windows", None)]
    conditions += [("noise", value) for value in (NOISES if not study.quick else (1.0,))]
    conditions += [("temperature", value) for value in (TEMPERATURES if not study.quick else (4.0,))]
    conditions += [("domain", name) for name in (study.domains if not study.quick else study.domains[:1])]
    study.measure(lambda: {"perplexity": study.score(study.model)}, kind="dense")
    for seed in study.seeds:
        for mask, update in rules:
            recipe = Recipe(weights=PATTERN, saliency=mask, update=update, seed=seed)
            for kind, value in conditions:
                setting = {"kind": kind, "value": value, "mask": mask, "update": update, "seed": seed}
                study.measure(partial(disturb_and_prune, study, recipe, kind, value), **setting)


@cache
def undisturbed(study: Study, recipe: Recipe) -> Any:
    """What the others are compared with."""
    return study.prune_copy(recipe, study.draw(study.calibration_windows, recipe.seed))


def disturb_and_prune(study: Study, recipe: Recipe, kind: str, value: Any) -> dict[str, float]:
    """Overlap with the undisturbed masks, perplexity, and the share of slots that the disturbance moved."""
    other = recipe.seed + 100 * (kind == "other windows")
    windows = study.draw(study.calibration_windows, other, value if kind == "domain" else None)
    router = {kind: value} if kind in ("noise", "temperature") else {}
    model = copy.deepcopy(study.model)
    with disturbed(model, seed=recipe.seed, **router) as moved:
        prune(model, windows, recipe, batch_size=study.batch)
    return {
        "overlap": overlap(model, undisturbed(study, recipe)),
        "perplexity": study.score(model),
        "moved": sum(moved) / len(moved),
    }


def values(study: Study, name: str, **setting: Any) -> list[float]:
    return [row[name] for row in study.select(**setting)]


def cost(study: Study, rule: tuple[str, str], kind: str, value: Any) -> list[float]:
    """Perplexity over that of the undisturbed run of the same seed, less one, in percent."""
    setting = {"mask": rule[0], "update": rule[1]}
    plain = {row["seed"]: row["perplexity"] for row in study.select(kind="none", **setting)}
    rows = study.select(kind=kind, value=value, **setting)
    return [100 * (row["perplexity"] / plain[row["seed"]] - 1) for row in rows]


def figure(study: Study) -> Any:
    """Above, how much of the mask stays; below, what it costs."""
    from benchmarks.figures import COLOURS, MARKERS

    drawn = new_figure(5.6, 11.0)
    panels = drawn.subplots(2, 3, sharey="row", width_ratios=(1, 1, 1.2))
    for number, (mask, update) in enumerate(RULES):
        setting = {"mask": mask, "update": update}
        label = f"{mask} {update}".removesuffix(" none")
        for column, kind in enumerate(("noise", "temperature")):
            places = {row["value"] for row in study.select(kind=kind, **setting)}
            if not places:
                continue
            kept = {
                place: [100 * v for v in values(study, "overlap", kind=kind, value=place, **setting)]
                for place in places
            }
            costs = {place: cost(study, (mask, update), kind, place) for place in places}
            curve(panels[0][column], kept, number, label)
            curve(panels[1][column], costs, number, label)
        names = [
            name for name in (*study.domains, "other windows") if study.select(value=name, **setting) or " " in name
        ]
        for place, name in enumerate(names):
            kind, value = ("domain", name) if name in study.domains else (name, None)
            kept = [100 * v for v in values(study, "overlap", kind=kind, value=value, **setting)]
            for row, held in enumerate((kept, cost(study, (mask, update), kind, value))):
                if held:
                    mean, deviation = mean_and_spread(held)
                    style = {"color": COLOURS[number], "marker": MARKERS[number], "linestyle": "none", "capsize": 2}
                    panels[row][2].errorbar(place + 0.15 * (number - 1), mean, deviation, **style)
        panels[1][2].set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=8)
    for column, (title, xlabel) in enumerate(
        (
            ("noise on the logits", "deviation of the noise / of the logits"),
            ("temperature of the logits", "temperature"),
            ("text of one domain", ""),
        )
    ):
        finish(panels[0][column], title, "", "kept weights in common, %" if not column else "")
        finish(panels[1][column], "", xlabel, "perplexity over undisturbed, %" if not column else "")
        panels[1][column].axhline(0, color="#444444", linewidth=1)
    panels[0][2].set_xticks([])
    for row in panels:
        row[1].set_xscale("log", base=2)
        row[1].set_xticks(TEMPERATURES, [f"{value:g}" for value in TEMPERATURES])
    panels[0][0].legend(fontsize=8, frameon=False)
    return drawn


def show(study: Study) -> None:
    """Print overlap and cost."""
    for mask, update in RULES:
        setting = {"mask": mask, "update": update}
        for kind in KINDS:
            for value in dict.fromkeys(row["value"] for row in study.select(kind=kind, **setting)):
                kept, spread = mean_and_spread(values(study, "overlap", kind=kind, value=value, **setting))
                mean, deviation = mean_and_spread(cost(study, (mask, update), kind, value))
                moved, _ = mean_and_spread(values(study, "moved", kind=kind, value=value, **setting))
                print(
                    f"{mask + ' ' + update:40}{kind:14}{value or '':<12} in common {kept:.1%} ±{spread:.1%}  "
                    f"cost {mean:+6.2f}% ±{deviation:.2f}  slots moved {moved:.0%}"
                )


def main(arguments: list[str] | None = None) -> None:
    options = parser(__doc__).parse_args(arguments)
    Study("study_stability", options).conduct(run, show, figure)


if __name__ == "__main__":
    main()
