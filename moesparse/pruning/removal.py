"""Remove experts from a model or merge them: recorded in one pass of text, chosen, cut, and those that stay refitted.

Experts are judged on the dense model in one pass, layer by layer; then the removal walks the layers again, so that each
refitted block is fitted to the inputs it will really get.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from moesparse.calibration.data import Calibration, FromText, Saved
from moesparse.calibration.layers import named_sums, read_sums, record_layers
from moesparse.calibration.statistics import ModelStatistics
from moesparse.checkpoints.output import Output
from moesparse.errors import CalibrationError, UsageError
from moesparse.experts.choice import (
    Choice,
    ExpertReport,
    check_sums_suffice,
    choose_from_domains,
    choose_from_plan,
    choose_from_scores,
    choose_from_windows,
)
from moesparse.experts.merging import Merged, Seen, check_merging, form_groups, merge_experts, observe
from moesparse.experts.origin import Origin
from moesparse.experts.plan_file import ExpertPlan
from moesparse.experts.refit import DEFAULT_RIDGE, RefitReport, check_refit, remove_and_refit_block
from moesparse.experts.router_groups import router_groups
from moesparse.experts.surgery import RemovalPlan, SurgeryReport, plan_removal
from moesparse.experts.swaps import RefineReport, refine_choice
from moesparse.models.layers import Layers, RunOptions
from moesparse.models.look import Look
from moesparse.models.stream import LayerStream
from moesparse.progress import ProgressEvent
from moesparse.pruning.plan import check_counts
from moesparse.pruning.recipe import Recipe

__all__ = ["Merging", "check_removal", "remove_and_refit", "remove_experts"]


def check_removal(layers: Layers, calibration: Calibration, recipe: Recipe) -> None:
    """Refuse what cannot be removed, or chosen from such a calibration, before anything is changed.

    Raises:
        UsageError: a count, share or budget that cannot be; swaps where the model is not whole; text or statistics
            that a plan or scores leave nothing to do for.
        UnsupportedModelError: experts that cannot be placed, or not refitted; named.
        CalibrationError: no text where it takes some; a plan or scores of a model of other sizes.
    """
    file = recipe.plan or recipe.scores
    if file is not None:
        # the routers are compared once they are in memory
        file.check(Origin.of(layers.model, layers.blocks, {}))
    if recipe.chooses_without_text is not None:
        _check_without_text(calibration, recipe, recipe.chooses_without_text)
    check_counts(layers.model, layers.blocks, recipe)
    if recipe.refits_experts:
        check_refit(layers.blocks, DEFAULT_RIDGE)
    if recipe.forms_groups:
        check_merging(layers.blocks, recipe.expert_method)
    if recipe.refine_experts and not layers.whole:
        raise UsageError(
            "refine_experts must be False to run layer by layer, got True: swaps are tried on the whole model; load it "
            "and call moesparse.prune"
        )
    if isinstance(calibration, Saved):
        check_sums_suffice(recipe.refits_experts, recipe.refine_experts, recipe.forms_groups)
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
    if recipe.forms_groups and not text:
        raise CalibrationError(
            f"calibration must be windows to merge experts (expert_method={recipe.expert_method!r}), got None"
        )
    if recipe.refits_experts and not text:
        raise CalibrationError(
            f"calibration must be windows to refit the experts that {name} keeps, got None; pass the windows, or "
            "remove without it (update='none')"
        )
    if not text and recipe.changes_weights:
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
    plan = plan_removal(layers.model, kept, allow_non_uniform=recipe.allow_non_uniform)
    merging = _merging(layers, recipe, choice)
    reads = recipe.refits_experts or recipe.forms_groups
    surgery, fits = remove_and_refit(
        layers, output, stream if reads else None, plan, options, merging=merging, refits=recipe.refits_experts
    )
    file = recipe.plan or recipe.scores
    seen = file.statistics if file is not None else calibration.text_hash if recipe.chooses_experts else None
    method = recipe.plan.method if recipe.plan is not None else recipe.expert_method
    merged = [plan.merged.get(number, ()) for number in range(len(plan.blocks))] if recipe.merges_experts else []
    made = ExpertPlan.of(origin, plan.kept, choice.criterion, seen, method, merged)
    return ExpertReport(choice, surgery, fits, swaps, method), made


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


@dataclass(frozen=True)
class Merging:
    """How experts are merged.

    Attributes:
        method: one of moesparse.experts.merging.MERGED_BY.
        scores: [blocks, E] of the choice; None where a plan has the groups.
        planned: the groups of every block; None where they are to be formed.
        parts: groups of the router.
    """

    method: str
    scores: Tensor | None
    planned: tuple[tuple[Merged, ...], ...] | None
    parts: int

    def carry_out(self, stream: LayerStream | None, position: int, plan: RemovalPlan, number: int) -> None:
        """Merge the experts of a block, which is held and not cut yet.

        Where processes share the stream the first one forms the groups, from the tokens of all.
        """
        block = plan.blocks[number]
        kept = plan.kept[number]
        if self.planned is not None:
            groups = self.planned[number]
        else:
            assert stream is not None
            assert self.scores is not None
            scores, parts = (
                self.scores[number],
                stream.processes.to_first(observe(stream, position, block, self.method)),
            )

            def form() -> tuple[Tensor, tuple[Merged, ...]]:
                seen = [torch.cat(tensors) for tensors in zip(*parts, strict=True)]
                given = Seen(seen[0], seen[1] if len(seen) > 1 else None)
                return form_groups(block, given, self.method, scores, kept, self.parts)

            kept, groups = stream.processes.from_first(form)
        merge_experts(block, groups)
        plan.merge(number, kept, groups)


def _merging(layers: Layers, recipe: Recipe, choice: Choice) -> Merging | None:
    if not recipe.merges_experts:
        return None
    groups = router_groups(layers.blocks[0])
    parts = 1 if groups is None else groups.count
    if recipe.plan is not None:
        return Merging(recipe.plan.method, None, recipe.plan.merged, parts)
    return Merging(recipe.expert_method, choice.scores, None, parts)


def remove_and_refit(
    layers: Layers,
    output: Output,
    stream: LayerStream | None,
    plan: RemovalPlan,
    options: RunOptions,
    ridge: float = DEFAULT_RIDGE,
    *,
    merging: Merging | None = None,
    refits: bool = True,
) -> tuple[SurgeryReport, list[RefitReport]]:
    """Carry a removal out layer by layer; what is finished already is cut again, for its shapes, and read.

    Args:
        layers: of the model.
        output: takes every layer with the reports of its refits.
        stream: over the text to refit on or to form groups on, started again here; None removes without a refit.
        plan: of the removal.
        options: the device to refit on, and `progress`.
        ridge: as in `moesparse.experts.refit.refit`.
        merging: how the others are merged into those that stay; None removes them.
        refits: with a stream, re-solve the down projections that stay.

    Returns:
        The surgery's report and, with a refit, one RefitReport per block.
    """
    done, count, fits = len(output.notes), len(layers), list[RefitReport]()
    stage, tokens = "remove experts" if merging is None else "merge experts", 0
    if stream is not None:
        stream.restart()
    for position in range(count):
        names = {block.name for block in layers.blocks_at(position)}
        here = [number for number, block in enumerate(plan.blocks) if block.name in names]
        options.progress(ProgressEvent(stage, position, count, "layer", tokens, layer=position, layers=count))
        copies = stream is None and merging is None
        with layers.hold_to_cut(position) if copies else layers.hold(position, options.device):
            if position < done:
                notes = list(output.notes[position])
                for number, note in zip(here, notes, strict=True):
                    _note_merged(plan, number, note)
                    plan.apply_block(number)
            else:
                solves = stream if refits else None
                notes = [_cut(solves, stream, position, plan, number, ridge, merging) for number in here]
            kept = [plan.kept[number].tolist() for number in here]
            rounding = None if copies or position < done else output.round(position, kept)
            if rounding is not None:
                notes = [{**note, "rounding": asdict(rounding)} for note in notes]
            if stream is not None and done < count:
                if position < done:
                    output.refill(position, options.device)
                tokens += sum(stream.run(position, keep=True))
            if position >= done:
                output.keep(position, notes, kept)
        fits += [RefitReport(**note["refit"], rounding=note.get("rounding")) for note in notes if note["refit"]]
        for number, note in zip(here, notes, strict=True):
            if not note["refit"]:
                plan.done[number] = replace(plan.done[number], rounding=note.get("rounding"))
    options.progress(ProgressEvent(stage, count, count, "layer", tokens, layer=count, layers=count))
    return plan.finish(), fits


def _cut(
    solves: LayerStream | None,
    stream: LayerStream | None,
    position: int,
    plan: RemovalPlan,
    number: int,
    ridge: float,
    merging: Merging | None,
) -> dict[str, Any]:
    """Merge, cut and refit one block; what a run that goes on has to know of it, JSON."""

    def merge() -> None:
        if merging is not None:
            merging.carry_out(stream, position, plan, number)

    found: dict[str, Any] = {"refit": None}
    if solves is None:
        merge()
        plan.apply_block(number)
    else:
        found["refit"] = remove_and_refit_block(solves, position, plan, number, ridge, merge).to_dict()
        del found["refit"]["rounding"]
    if merging is not None:
        found["kept"] = plan.kept[number].tolist()
        found["merged"] = [group.to_dict() for group in plan.merged[number]]
    return found


def _note_merged(plan: RemovalPlan, number: int, note: Mapping[str, Any]) -> None:
    """What was merged in a block that is finished."""
    if "merged" in note:
        plan.merge(number, torch.tensor(note["kept"]), tuple(map(Merged.from_dict, note["merged"])))
