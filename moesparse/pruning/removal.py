"""Remove experts from the blocks of a model: recorded in one pass of text, chosen, cut, and those that stay refitted.

Experts are judged on the dense model in one pass, layer by layer; then the removal walks the layers again, so that each
refitted block is fitted to the inputs it will really get.
"""

from __future__ import annotations

from dataclasses import asdict

import torch

from moesparse.calibration.data import Calibration, FromText, Saved
from moesparse.calibration.layers import named_sums, read_sums, record_layers
from moesparse.calibration.statistics import ModelStatistics
from moesparse.checkpoints.output import Output
from moesparse.errors import CalibrationError, UsageError
from moesparse.experts.choice import (
    Choice,
    ExpertReport,
    check_budget,
    check_sums_suffice,
    choose_from_domains,
    choose_from_plan,
    choose_from_scores,
    choose_from_windows,
)
from moesparse.experts.origin import Origin
from moesparse.experts.plan_file import ExpertPlan
from moesparse.experts.refit import DEFAULT_RIDGE, RefitReport, check_refit, remove_and_refit_block
from moesparse.experts.surgery import RemovalPlan, SurgeryReport, plan_removal
from moesparse.experts.swaps import RefineReport, refine_choice
from moesparse.models.layers import Layers, RunOptions
from moesparse.models.look import Look
from moesparse.models.stream import LayerStream
from moesparse.progress import ProgressEvent
from moesparse.pruning.plan import any_choice
from moesparse.pruning.recipe import Recipe

__all__ = ["check_removal", "remove_and_refit", "remove_experts"]


def check_removal(layers: Layers, calibration: Calibration, recipe: Recipe) -> None:
    """Refuse what cannot be removed, or chosen from such a calibration, before anything is changed.

    Raises:
        UsageError: a count, share or budget that cannot be; swaps where the model is not whole; text or statistics
            that a plan or scores leave nothing to do for.
        UnsupportedModelError: experts that cannot be placed, or not refitted; named.
        CalibrationError: no text where it takes some; a plan or scores of a model of other sizes.
    """
    check_budget(layers.model, recipe.expert_budget, recipe.expert_floor)
    file = recipe.plan or recipe.scores
    if file is not None:
        # the routers are compared once they are in memory
        file.check(Origin.of(layers.model, layers.blocks, {}))
    if recipe.chooses_without_text is not None:
        _check_without_text(calibration, recipe, recipe.chooses_without_text)
    plan_removal(layers.model, any_choice(layers.blocks, recipe))
    if recipe.refits_experts:
        check_refit(layers.blocks, DEFAULT_RIDGE)
    if recipe.refine_experts and not layers.whole:
        raise UsageError(
            "refine_experts must be False to run layer by layer, got True: swaps are tried on the whole model; load it "
            "and call moesparse.prune"
        )
    if isinstance(calibration, Saved):
        check_sums_suffice(recipe.refits_experts, recipe.refine_experts)
    elif not isinstance(calibration, FromText) and recipe.chooses_experts:
        raise CalibrationError(
            f"calibration must be windows or statistics to choose experts by {recipe.expert_saliency}, got None; only "
            "expert_saliency='aimer' reads the weights alone"
        )
    elif recipe.refine_experts and isinstance(calibration, FromText) and calibration.seen is not None:
        raise UsageError("windows must be text alone to refine the choice, got images")
    elif recipe.refine_experts and isinstance(calibration, FromText) and calibration.mask is not None:
        raise UsageError("windows must be without padding to refine the choice, got an attention mask")


def _check_without_text(calibration: Calibration, recipe: Recipe, name: str) -> None:
    """A choice from a file or from the weights alone: text is for a refit or swaps, and for weights."""
    if isinstance(calibration, Saved):
        raise UsageError(f"calibration must be windows or None with {name}, which says who stays, got statistics")
    text = isinstance(calibration, FromText)
    if recipe.refine_experts and not text:
        raise CalibrationError(f"calibration must be windows to refine the choice of {name}, got None")
    if recipe.refits_experts and not text:
        raise CalibrationError(
            f"calibration must be windows to refit the experts that {name} keeps, got None; pass the windows, or "
            "remove without it (update='none')"
        )
    if not text and recipe.prunes_weights:
        recipe.check_needs_no_data()
    if text and recipe.reads_weights_alone:
        raise UsageError(f"calibration must be None with {name} and update='none', which run no text, got windows")


def remove_experts(
    layers: Layers,
    output: Output,
    stream: LayerStream | None,
    calibration: Calibration,
    recipe: Recipe,
    options: RunOptions,
    look: Look,
    origin: Origin,
) -> tuple[ExpertReport, ExpertPlan]:
    """Remove the experts that matter least from every block.

    Args:
        layers: of the dense model.
        output: takes every layer; the sums of a pass lie aside there.
        stream: at the input of the first layer; None with saved statistics.
        calibration: text, or saved statistics of this model or of its domains.
        recipe: of the experts.
        options: the device to refit on, and `progress`.
        look: that was had at every layer, with `weight_scores` where the criterion reads the weights alone.
        origin: of the model, with its routers.

    Returns:
        The report, and the choice as a plan that other copies of the model can be given.

    Raises:
        CalibrationError: statistics, a plan or scores of another model, or statistics that lack what the criterion
            reads.
    """
    if recipe.plan is not None:
        recipe.plan.check(origin)
        choice = choose_from_plan(recipe.plan)
    elif recipe.scores is not None:
        recipe.scores.check(origin)
        choice = choose_from_scores(layers.blocks, recipe.scores.by(recipe.expert_saliency), recipe.expert_rule)
    elif recipe.chooses_without_text is not None:
        scores = torch.stack([look.weight_scores[block.name] for block in layers.blocks])
        choice = choose_from_scores(layers.blocks, scores, recipe.expert_rule)
    else:
        choice = _choose(layers, output, stream, calibration, recipe, options, look)
    kept, swaps = choice.kept, list[RefineReport]()
    if recipe.refine_experts:
        assert isinstance(calibration, FromText)
        kept, swaps = refine_choice(
            layers.model, kept, calibration.ids, protect=choice.protected, progress=options.progress
        )
    plan = plan_removal(layers.model, kept)
    surgery, fits = remove_and_refit(layers, output, stream if recipe.refits_experts else None, plan, options)
    file = recipe.plan or recipe.scores
    seen = file.statistics if file is not None else calibration.text_hash if recipe.chooses_experts else None
    return ExpertReport(choice, surgery, fits, swaps), ExpertPlan.of(origin, kept, choice.criterion, seen)


def _choose(
    layers: Layers,
    output: Output,
    stream: LayerStream | None,
    calibration: Calibration,
    recipe: Recipe,
    options: RunOptions,
    look: Look,
) -> Choice:
    if isinstance(calibration, Saved):
        return choose_from_domains(layers.blocks, look.fingerprint, calibration.parts, recipe.expert_rule)
    assert isinstance(calibration, FromText)
    assert stream is not None
    for position, recorders in record_layers(layers, stream, options.progress, start=len(output.aside)):
        output.keep_aside(f"statistics-{position:05d}", named_sums(recorders, by_column=False))
    sums, by_window = read_sums(output.aside, len(calibration.ids))
    statistics = ModelStatistics(sums, look.fingerprint, "", None, calibration.ids.numel())
    return choose_from_windows(layers.blocks, statistics, by_window, recipe.expert_rule, calibration.domains)


def remove_and_refit(
    layers: Layers,
    output: Output,
    stream: LayerStream | None,
    plan: RemovalPlan,
    options: RunOptions,
    ridge: float = DEFAULT_RIDGE,
) -> tuple[SurgeryReport, list[RefitReport]]:
    """Carry a removal out layer by layer; what is finished already is cut again, for its shapes, and read.

    Args:
        layers: of the model.
        output: takes every layer with the reports of its refits.
        stream: over the text to refit on, started again here; None removes without a refit.
        plan: of the removal.
        options: the device to refit on, and `progress`.
        ridge: as in `moesparse.experts.refit.refit`.

    Returns:
        The surgery's report and, with a stream, one RefitReport per block.
    """
    done, count, fits = len(output.notes), len(layers), list[RefitReport]()
    stage, tokens = "remove experts", 0
    if stream is not None:
        stream.restart()
    for position in range(count):
        names = {block.name for block in layers.blocks_at(position)}
        here = [number for number, block in enumerate(plan.blocks) if block.name in names]
        options.progress(ProgressEvent(stage, position, count, "layer", tokens, layer=position, layers=count))
        with layers.hold_to_cut(position) if stream is None else layers.hold(position, options.device):
            notes = list(output.notes[position]) if position < done else []
            for number in here:
                if position < done or stream is None:
                    plan.apply_block(number)
                else:
                    notes.append(remove_and_refit_block(stream, position, plan, number, ridge).to_dict())
            if stream is not None and done < count:
                if position < done:
                    output.refill(position, options.device)
                elif (rounding := output.round(position, [plan.kept[number].tolist() for number in here])) is not None:
                    notes = [{**note, "rounding": asdict(rounding)} for note in notes]
                tokens += sum(stream.run(position, keep=True))
            if position >= done:
                output.keep(position, notes, [plan.kept[number].tolist() for number in here])
        fits += [RefitReport(**note) for note in notes]
    options.progress(ProgressEvent(stage, count, count, "layer", tokens, layer=count, layers=count))
    return plan.finish(), fits
