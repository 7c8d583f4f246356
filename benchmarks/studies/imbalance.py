"""Prune weights or remove experts, at equal bytes, as routing gets more uneven.

    python -m benchmarks.studies.imbalance [--quick] [--seeds 3] [-o FOLDER]

Writes study_imbalance.json and study_imbalance.png. The embedded model routes evenly, so its routers are skewed first:
along the mean of its inputs every router gets an offset per expert, solved so that the r-th most popular of 16 experts
is chosen in proportion to ratio^(-r / 15), in an order drawn by the seed; then the whole model is trained on for 20
steps of 8 windows of the embedded calibration text, so that the experts take up their new roles. Training evens the
routing out again, so the offsets are solved anew before every second step. Ratio None is trained on in the same way
without a skew. Packed 2:4 weights take 9/16 of the bytes and so do 9 of 16 experts; 3:4 and 13
experts take 13/16. Every loss is over the dense model of the same skew. Protocol otherwise: study_protocol.py.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.studies.protocol import Study, curve, finish, geometric, mean_and_spread, parser
from moesparse.calibration.whole import calibrate
from moesparse.models.blocks import MoEBlock, find_moe_blocks
from moesparse.pruning.recipe import Recipe
from moesparse.report.figures import new_figure

RATIOS = (None, 3.0, 6.0, 10.0)
BUDGETS = {"9/16": ("2:4", 9), "13/16": ("3:4", 13)}
WEIGHT_RULES = (("moe-pruner", "none"), ("gated-sparsegpt", "least-squares+rescale"))
EXPERT_RULES = (("frequency", "none"), ("reap", "none"), ("reap", "least-squares"))
STEPS, WINDOWS, RATE = 20, 8, 5e-4
HOLD = 2
"""Steps after which the skew is solved anew."""


def router_inputs(model: Any, block: MoEBlock, windows: Tensor) -> Tensor:
    """[tokens, hidden] that one router sees."""
    held: list[Tensor] = []
    handle = block.moe.gate.register_forward_pre_hook(lambda _module, inputs: held.append(inputs[0].detach()))
    try:
        with torch.no_grad():
            for batch in windows.split(16):
                model.model(batch, use_cache=False)
    finally:
        handle.remove()
    return torch.cat([each.reshape(-1, each.shape[-1]) for each in held])


def offsets(logits: Tensor, lever: Tensor, target: Tensor, top_k: int) -> Tensor:
    """What to add, times `lever` (tokens,), to the logits (tokens, E) so that the shares (E,) become the target."""
    added = torch.zeros(logits.shape[1])
    for step in range(150):
        chosen = (logits + lever[:, None] * added).topk(top_k, dim=-1).indices.flatten()
        share = torch.bincount(chosen, minlength=len(target)) / len(chosen)
        # smaller and smaller steps: shares jump as tokens change sides
        added += logits.std() * 0.3 / (1 + step / 20) * (target.log() - share.clamp(min=1e-4).log())
    return added


@torch.no_grad()
def skew(model: Any, ratio: float, seed: int, windows: Tensor) -> None:
    """Give every router the shares that the module's docstring says on these windows, one after the other."""
    generator = torch.Generator().manual_seed(seed)
    for block in find_moe_blocks(model):
        experts = block.num_experts
        order = torch.randperm(experts, generator=generator)
        target = torch.empty(experts)
        target[order] = ratio ** (-torch.arange(experts) / (experts - 1))
        seen, weight = router_inputs(model, block, windows), block.moe.gate.weight
        mean = seen.mean(0)
        direction = mean / mean.square().sum()
        added = offsets(seen @ weight.T, seen @ direction, target / target.sum(), block.moe.gate.top_k)
        weight += added[:, None] * direction


def train_on(model: Any, windows: Tensor, seed: int, steps: int, hold: Callable[[], None]) -> None:
    """AdamW over the calibration text, the rate falling to zero; `hold` is called before every second step."""
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.0)
    for step, batch in enumerate(windows[order].split(WINDOWS)[:steps]):
        if step % HOLD == 0:
            hold()
        for group in optimizer.param_groups:
            group["lr"] = RATE * (1 - step / steps)
        logits = model(batch, use_cache=False).logits
        F.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


@cache
def skewed(study: Study, ratio: float | None, seed: int) -> Any:
    """The dense model at one ratio."""
    model = copy.deepcopy(study.model)
    windows = study.draw(study.calibration_windows, seed)

    def hold() -> None:
        if ratio is not None:
            skew(model, ratio, seed, windows)

    train_on(model, study.testbed.everything(), seed, 2 if study.quick else STEPS, hold)
    return model.eval()


def dense(study: Study, ratio: float | None, seed: int) -> dict[str, float]:
    """Perplexity, and how uneven the routing became: the most used expert's tokens over the least used one's."""
    model = skewed(study, ratio, seed)
    measured = calibrate(model, study.draw(study.calibration_windows, seed), batch_size=study.batch)
    counts = [block.tokens for block in measured.blocks.values()]
    imbalance = geometric([float(count.max() / count.min().clamp(min=1)) for count in counts])
    return {"perplexity": study.score(model), "imbalance": imbalance}


def run(study: Study) -> None:
    """Every ratio with every rule at both budgets."""
    ratios, budgets = (RATIOS, BUDGETS) if not study.quick else (RATIOS[2:3], {"9/16": BUDGETS["9/16"]})
    for seed in study.seeds:
        for ratio in ratios:
            at = {"ratio": ratio, "seed": seed}
            study.measure(partial(dense, study, ratio, seed), budget="dense", **at)
            for budget, (pattern, keep) in budgets.items():
                for rule, update in WEIGHT_RULES[: 1 if study.quick else None]:
                    recipe = Recipe(weights=pattern, saliency=rule, update=update)
                    setting = {"budget": budget, "rule": rule, "update": update}
                    study.measure(partial(pruned, study, recipe, ratio, seed), **setting, **at)
                for rule, update in EXPERT_RULES[: 1 if study.quick else None]:
                    recipe = Recipe(weights=None, keep_experts=keep, expert_saliency=rule, update=update)
                    setting = {"budget": budget, "rule": rule, "update": update}
                    study.measure(partial(pruned, study, recipe, ratio, seed), **setting, **at)


def pruned(study: Study, recipe: Recipe, ratio: float | None, seed: int) -> dict[str, float]:
    windows = study.draw(study.calibration_windows, seed)
    return {"perplexity": study.score(study.prune_copy(recipe, windows, skewed(study, ratio, seed)))}


def losses(study: Study, budget: str, rule: str, update: str) -> dict[float, list[float]]:
    """By mean imbalance of a ratio: perplexity over dense, less one, in percent, of every seed."""
    points: dict[float, list[float]] = {}
    for ratio in RATIOS:
        whole = {row["seed"]: row for row in study.select(budget="dense", ratio=ratio)}
        rows = study.select(budget=budget, rule=rule, update=update, ratio=ratio)
        if rows:
            place = geometric([whole[row["seed"]]["imbalance"] for row in rows])
            points[place] = [100 * (row["perplexity"] / whole[row["seed"]]["perplexity"] - 1) for row in rows]
    return points


def figure(study: Study) -> Any:
    """Loss over imbalance, one panel for each budget."""
    drawn = new_figure(4.2, 10.0)
    panels = drawn.subplots(1, len(BUDGETS))
    for panel, (budget, (pattern, keep)) in zip(panels, BUDGETS.items(), strict=True):
        for number, (rule, update) in enumerate((*WEIGHT_RULES, *EXPERT_RULES)):
            points = losses(study, budget, rule, update)
            weights = number < len(WEIGHT_RULES)
            what = f"{pattern} {rule} {update}" if weights else f"{keep} of 16: {rule}"
            what = what.removesuffix(" none") + (" + refit" if not weights and update != "none" else "")
            if points:
                curve(panel, points, number, what, linestyle="-" if weights else "--")
        panel.set_xscale("log")
        panel.set_xticks([1, 2, 3, 5, 10], ["1", "2", "3", "5", "10"])
        panel.set_xticks([], minor=True)
        panel.set_yscale("log")
        panel.set_yticks([1, 2, 5, 10, 20, 50, 100, 200], ["1", "2", "5", "10", "20", "50", "100", "200"])
        panel.set_yticks([], minor=True)
        if panel.has_data():
            panel.legend(fontsize=8, frameon=False)
        finish(panel, f"{budget} of the expert bytes", "tokens of the most over the least used expert", "")
    panels[0].set_ylabel("perplexity over dense, %")
    return drawn


def show(study: Study) -> None:
    """Print dense models and losses."""
    for row in study.select(budget="dense"):
        print(f"ratio {row['ratio']}, seed {row['seed']}: {row['imbalance']:.1f}:1, dense {row['perplexity']:.2f}")
    for budget in BUDGETS:
        for rule, update in (*WEIGHT_RULES, *EXPERT_RULES):
            points = {place: mean_and_spread(held) for place, held in losses(study, budget, rule, update).items()}
            cells = [f"{place:.1f}:1 {mean:+.1f}% ±{deviation:.1f}" for place, (mean, deviation) in points.items()]
            print(f"{budget:6} {rule + ' ' + update:40}" + "   ".join(cells))


def main(arguments: list[str] | None = None) -> None:
    options = parser(__doc__).parse_args(arguments)
    Study("study_imbalance", options, steps=STEPS, windows=WINDOWS, rate=RATE, hold=HOLD).conduct(run, show, figure)


if __name__ == "__main__":
    main()
