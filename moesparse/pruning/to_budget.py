"""Prune a model into a number of bytes: measure what each choice would cost, search, prune, compare with uniform."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moesparse.calibration.data import FromText, Given, calibration_of
from moesparse.calibration.layers import named_sums, read_sums, record_layers
from moesparse.calibration.statistics import ExpertStatistics, ModelStatistics
from moesparse.calibration.windows import ImageWindows
from moesparse.checkpoints.output import InPlace
from moesparse.errors import CalibrationError, UsageError
from moesparse.evaluate.on_text import perplexity
from moesparse.experts.choice import choose_rule, score_windows
from moesparse.experts.criteria import super_experts
from moesparse.models.blocks import MoEBlock
from moesparse.models.layer_counts import check_equal_counts
from moesparse.models.layers import Layers, LayersInMemory, RunOptions
from moesparse.models.look import Look
from moesparse.models.modes import placed
from moesparse.models.stream import LayerStream
from moesparse.progress import ProgressEvent
from moesparse.pruning.budget import (
    DENSE,
    DROP,
    BlockCosts,
    BudgetPlan,
    BudgetSearch,
    matrix_sizes,
    packed_bytes,
    search,
    target_in_bytes,
)
from moesparse.pruning.driver import carry_out_in_place
from moesparse.pruning.recipe import Recipe
from moesparse.pruning.recipe_checks import check_patterns
from moesparse.pruning.report import Report
from moesparse.weights.mask_rules import choose_masks, moments_needed, obs_gate
from moesparse.weights.patterns import Pattern
from moesparse.weights.weight_rules import moments_of, output_energy, parse_update, update_weights

__all__ = ["BudgetReport", "measure_costs", "plan_budget", "prune_to_budget", "recipe_of"]

_QUICK = {"admm": "wanda", "gated-admm": "moe-pruner"}
"""Mask rules that stand in for the slow ones in the estimate; their errors are larger, for every pattern alike."""

_ASIDE = 8
"""One calibration window of so many is kept for the comparison."""


@dataclass(frozen=True)
class BudgetReport:
    """What came of a target.

    Attributes:
        search: the plans and what they were estimated to cost.
        compared: the uniform plan was carried out too.
        windows: calibration windows kept aside for the losses below, 0 when nothing was compared.
        dense, mixed, uniform: nats per token on them; None when not measured.
        kept: "mixed" or "uniform": which of the two the model is now.
        experts_bytes: of the packed experts it has now.
    """

    search: BudgetSearch
    windows: int = 0
    dense: float | None = None
    mixed: float | None = None
    uniform: float | None = None

    @property
    def compared(self) -> bool:
        return self.mixed is not None and self.uniform is not None

    @property
    def kept(self) -> str:
        return (
            "uniform" if self.mixed is not None and self.uniform is not None and self.uniform < self.mixed else "mixed"
        )

    @property
    def plan(self) -> BudgetPlan:
        """The one that was kept."""
        return self.search.uniform if self.kept == "uniform" else self.search.mixed

    def describe(self) -> str:
        """One sentence: does the mixed choice beat the uniform one at no more bytes."""
        found, uniform = self.search.mixed, self.search.uniform
        if found.patterns == uniform.patterns and found.keep == uniform.keep:
            return "the uniform choice is the best that was found at these bytes"
        shares = f"{found.bytes / self.search.dense:.3f} against {uniform.bytes / self.search.dense:.3f} of the bytes"
        if self.mixed is None or self.uniform is None or self.dense is None:
            return (
                f"not measured against the uniform choice; estimated {found.loss:.4f} against {uniform.loss:.4f} nats "
                f"per token ({shares})"
            )
        verdict = (
            "the mixed choice beats the uniform one"
            if self.kept == "mixed"
            else "the mixed choice does NOT beat the uniform one, which was kept"
        )
        gain = f"{self.mixed - self.dense:.4f} against {self.uniform - self.dense:.4f} nats per token over dense"
        return f"{verdict} on {self.windows} windows kept aside: {gain} ({shares})"

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        measured = {name: getattr(self, name) for name in ("windows", "dense", "mixed", "uniform")}
        return {**self.search.to_dict(), "kept": self.kept, "measured": measured, "summary": self.describe()}


def measure_costs(
    layers: Layers, text: FromText, recipe: Recipe, options: RunOptions
) -> tuple[list[BlockCosts], Tensor, list[tuple[int, int]]]:
    """One pass over the dense model, layer by layer: what each pattern costs in each block, and the experts' scores.

    Patterns are tried by the recipe's own rules, alternating solvers by a quick one (`_QUICK`). Holds one layer's
    second moments, 8 * E * (H^2 + I^2) bytes, and one matrix in fp32 with its mask.

    Returns:
        costs of every block, [blocks, E] scores by the recipe's criterion, super-experts to protect.
    """
    patterns = [Pattern.parse(choice) for choice in recipe.choices if ":" in choice]
    rule = _QUICK.get(recipe.saliency, recipe.saliency)
    solver = parse_update(recipe.update)[0]
    solver = "least-squares" if solver == "asymmetric" else solver
    moments = "both" if moments_needed(rule, solver) in ("plain", "both") else "gated"
    output, costs = InPlace(layers), list[BlockCosts]()
    look = Look(layers, options)
    stream = text.stream(layers, options, look, None)
    for position, recorders in record_layers(layers, stream, options.progress, moments=moments):
        for recorder in recorders:
            block, statistics = recorder.block, recorder.statistics
            errors = {
                matrix.name: {
                    str(pattern): _share_off(block, matrix, statistics, pattern, rule, solver, recipe.seed)
                    for pattern in patterns
                }
                for matrix in block.matrices
            }
            energy = statistics.gated_norm_sq_sum.double().cpu()
            costs.append(BlockCosts(block.name, matrix_sizes(block), _residual(stream), energy, errors))
        output.keep_aside(f"statistics-{position:05d}", named_sums(recorders, by_column=False))
    sums, by_window = read_sums(output.aside, len(text.ids))
    found = ModelStatistics(sums, look.fingerprint, "", None, text.ids.numel())
    _, scores = score_windows(found, by_window, recipe.expert_rule, text.domains)
    return costs, scores, super_experts(found) if recipe.protect_experts else []


def _residual(stream: LayerStream) -> float:
    """Energy of the hidden states that wait, padding left out."""
    total = 0.0
    for states, real in zip(stream.hidden, stream.token_masks, strict=True):
        rows = states.flatten(0, -2)
        total += float((rows if real is None else rows[real.to(rows.device)]).double().square().sum())
    return total


@torch.no_grad()
def _share_off(
    block: MoEBlock, matrix: Any, statistics: ExpertStatistics, pattern: Pattern, rule: str, solver: str, seed: int
) -> Tensor:
    """[E] float64: tr(D M D^T) / tr(W M W^T) for the gated moment M, D what the pattern changes; 0 without tokens."""
    name, weight, sums = f"{block.name}.{matrix.name}", matrix.weight, statistics
    mask = choose_masks(weight, rule, pattern, sums, matrix.input, seed=seed, name=name).mask
    new = update_weights(weight, mask, solver, sums, matrix.input, gate=obs_gate(rule), name=name).weight
    moment = moments_of(sums, matrix.input, "gated", name)
    whole = output_energy(weight, moment).double().cpu()
    off = output_energy(weight.float() - new.float(), moment).double().cpu()
    return torch.where(whole > 0, off / whole.clamp_min(torch.finfo(torch.float64).tiny), 0.0).clamp(0, 1)


def plan_budget(
    model: nn.Module, given: Given, recipe: Recipe, options: RunOptions, domains: Sequence[str] | None = None
) -> BudgetSearch:
    """Find how a model would meet `recipe.target_bytes`; the model is left as it is.

    Args:
        model: a transformers causal language model.
        given: windows [n, t], or (windows, attention mask).
        recipe: with a target.
        options: of the pass.
        domains: of each window; None is one domain.

    Raises:
        UsageError: a target or choices that cannot be met; a pattern that does not divide a matrix.
        CalibrationError: calibration is no text.
    """
    if recipe.target_bytes is None:
        raise UsageError("recipe must have target_bytes to be planned for, got None")
    layers = LayersInMemory(model)
    blocks = layers.blocks
    check_equal_counts(blocks)
    text = calibration_of(given, model, domains)
    if not isinstance(text, FromText):
        raise CalibrationError(
            f"calibration must be windows for target_bytes, got {type(given).__name__}: errors are measured on "
            "second moments and hidden states that saved statistics do not hold"
        )
    target = target_in_bytes(recipe.target_bytes, sum(_dense_bytes(block) for block in blocks))
    for choice in (choice for choice in recipe.choices if ":" in choice):
        check_patterns(blocks, partial(_always, Pattern.parse(choice)))
    costs, scores, protect = measure_costs(layers, text, recipe, options)
    counts = [blocks[0].num_experts]
    if DROP in recipe.choices:
        counts = _counts(blocks, protect, recipe.divisible_by)

    def keep(count: int) -> list[Tensor]:
        return choose_rule(blocks, keep=count, protect=protect)(scores)

    return search(costs, target, counts, keep, recipe.choices)


def _always(pattern: Pattern, block: str, matrix: str) -> Pattern:
    return pattern


def _dense_bytes(block: MoEBlock) -> int:
    sizes = matrix_sizes(block)
    return packed_bytes(sizes, dict.fromkeys(sizes, DENSE), block.num_experts)


def _counts(blocks: Sequence[MoEBlock], protect: Sequence[tuple[int, int]], divisible_by: int | None) -> list[int]:
    """Every count of experts that may stay: at least top_k, equal in a router's groups, room for the protected.

    Raises:
        UsageError: none is divisible.
    """
    experts = blocks[0].num_experts
    found = []
    for count in range(1, experts + 1):
        with suppress(UsageError):
            choose = choose_rule(blocks, keep=count, protect=protect, divisible_by=divisible_by)
            choose(torch.zeros(len(blocks), experts))
            found.append(count)
    if not found:
        raise UsageError(
            f"divisible_by must divide a count that may stay of the {experts} experts of a block, got {divisible_by}"
        )
    return found


def prune_to_budget(
    model: nn.Module, given: Given, recipe: Recipe, options: RunOptions, domains: Sequence[str] | None = None
) -> Report:
    """`moesparse.prune` for a recipe with target_bytes.

    With `recipe.compare_uniform` one window of eight is kept aside; a copy of the model is pruned to the best uniform
    plan, both are scored on those windows, and the model becomes the better of the two.
    """
    started = time.perf_counter()
    aside = None
    if recipe.compare_uniform and isinstance(given, Tensor | tuple | ImageWindows):
        given, aside, domains = _split(given, domains)
    found = plan_budget(model, given, recipe, options, domains)
    if (found.mixed.keep, found.mixed.patterns) == (found.uniform.keep, found.uniform.patterns):
        aside = None

    def carried_out(network: nn.Module, plan: BudgetPlan) -> Report:
        data = calibration_of(given, network, domains)
        return carry_out_in_place(network, data, recipe_of(recipe, plan, found.experts), options)

    def score(network: nn.Module) -> float:
        assert aside is not None
        with _on_device_if_it_fits(network, options.device):
            figure = perplexity(
                network, aside, batch_size=options.batch_size, progress=options.progress, name="windows kept aside"
            )
        return figure.nll / figure.tokens

    result = BudgetReport(found)
    other, other_report = None, None
    if aside is not None:
        result = replace(result, windows=len(aside[0]), dense=score(model))
        options.progress(ProgressEvent("prune uniformly, to compare", 0, 1))
        other = copy.deepcopy(model)
        other_report = carried_out(other, found.uniform)
        result = replace(result, uniform=score(other))
    report = carried_out(model, found.mixed)
    if aside is not None:
        result = replace(result, mixed=score(model))
    if result.kept == "uniform":
        assert other is not None
        assert other_report is not None
        for name, child in other.named_children():
            setattr(model, name, child)
        model.config = other.config
        report = other_report
    filled = {name: report.recipe.get(name) for name in ("keep_experts", "patterns")}
    report.recipe = recipe.to_dict() | filled
    report.budget = result.to_dict()
    report.seconds = time.perf_counter() - started
    return report


def recipe_of(recipe: Recipe, plan: BudgetPlan, experts: int) -> Recipe:
    """The recipe that carries a plan out."""
    pruned = any(pattern != DENSE for matrices in plan.patterns.values() for pattern in matrices.values())
    drops = plan.keep < experts
    return replace(
        recipe,
        target_bytes=None,
        patterns=plan.patterns if pruned else None,
        keep_experts=plan.keep if drops else None,
        refine_experts=recipe.refine_experts and drops,
        divisible_by=recipe.divisible_by if drops else None,
    )


def _split(calibration: Any, domains: Sequence[str] | None) -> tuple[Any, tuple[Tensor, Tensor | None], Any]:
    """The windows to calibrate on, those kept aside, and the domains of the first."""
    if isinstance(calibration, ImageWindows):
        raise UsageError(
            "calibration must be text alone to keep some of it aside for the comparison with a uniform choice, got "
            "images: give compare_uniform=False"
        )
    ids, mask = calibration if isinstance(calibration, tuple) else (calibration, None)
    if len(ids) < 2:
        raise UsageError(
            f"windows must be at least 2 to keep one aside for the comparison with a uniform choice, got {len(ids)}; "
            "give more, or set compare_uniform=False"
        )
    aside = torch.zeros(len(ids), dtype=torch.bool)
    aside[min(_ASIDE, len(ids)) - 1 :: _ASIDE] = True

    def part(rows: Tensor) -> tuple[Tensor, Tensor | None]:
        return ids[rows], None if mask is None else mask[rows]

    left = None if domains is None else [name for name, away in zip(domains, aside.tolist(), strict=True) if not away]
    return part(~aside), part(aside), left


def _on_device_if_it_fits(model: nn.Module, device: Any) -> AbstractContextManager[Any]:
    """The model on the device, where there is room for all of it; else where it is."""
    if device is None or torch.device(device).type != "cuda":
        return nullcontext()
    size = sum(parameter.nbytes for parameter in model.parameters())
    # a tenth for activations and logits
    return placed(model, device) if 1.1 * size < torch.cuda.mem_get_info(device)[0] else nullcontext()
