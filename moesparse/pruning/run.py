"""The two doors: prune a model in memory, or a checkpoint on the disk that need not fit there. One pipeline behind.

A checkpoint is read, pruned, run again for the next layer, written and dropped layer by layer; the hidden states of the
calibration set wait in between. The result has the bits that `prune` and `save_pretrained` give for the model as a
whole. A run that is stopped, by whatever, goes on at the layer it had not finished.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from moesparse._version import __version__
from moesparse.calibration.data import Calibration, Given, Saved, calibration_of
from moesparse.calibration.given_text import Text, tokenised
from moesparse.calibration.plan import spills
from moesparse.calibration.statistics import ModelStatistics
from moesparse.checkpoints.card import card_in_form
from moesparse.checkpoints.history import REPORT_FILE, following, read_report
from moesparse.checkpoints.hub import local_folder
from moesparse.checkpoints.output import IntoFolder
from moesparse.errors import CheckpointError, UsageError
from moesparse.experts.plan_file import PLAN_FILE, ExpertPlan
from moesparse.models.blocks import check_module
from moesparse.models.layers import RunOptions
from moesparse.models.on_disk import LayersOnDisk
from moesparse.progress import ProgressLike, reporting
from moesparse.pruning.driver import both_steps, carry_out, carry_out_in_place, check_work
from moesparse.pruning.next_token import check_in_memory, prepare_next_token_layers
from moesparse.pruning.plan import plan_run
from moesparse.pruning.quantised import check_plain_routers, check_quantised
from moesparse.pruning.recipe import Recipe
from moesparse.pruning.report import Report
from moesparse.pruning.to_budget import prune_to_budget
from moesparse.system.folders import JOURNAL_FILE, check_output_folder
from moesparse.system.processes import device_at_work
from moesparse.system.shards import read_json
from moesparse.system.unfinished import check_inputs, what_is_kept

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["experts_folder", "first_step", "prune", "prune_checkpoint", "what_is_left"]


def prune(
    model: nn.Module,
    calibration: Given | Text,
    recipe: Recipe | str | float | None = None,
    *,
    domains: Sequence[str] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    batch_size: int = 8,
    device: torch.device | str | None = None,
    progress: ProgressLike = "auto",
    allow_pruned: bool = False,
) -> Report:
    """Prune every expert matrix of a transformers MoE model, in place.

    Holds besides the model: the hidden states of the calibration set on the CPU, one layer's sums (with second moments
    8 * E * (H^2 + I^2) bytes) and one matrix in fp32 with its mask.

    Args:
        model: a transformers causal language model, on the CPU or a GPU.
        calibration: (n, t) int64 windows, or (windows, attention mask), or `ImageWindows`, or saved statistics of this
            very model, or None where the recipe looks at weights alone (magnitude, no update). To remove experts
            alone, also saved statistics by domain.
            Also text, strings or a `datasets` object, of which `moesparse.text.document_windows` makes windows.
        recipe: what to do, or only its pattern, "2:4" or 0.5; the default is 2:4 by the rules measured best of those
            that the device can afford.
        domains: of each window, for the choice of experts; None is one domain.
        tokenizer: for text; None takes that of the folder which the model was loaded from.
        batch_size: windows in one forward.
        device: where the layer at work goes; None takes the GPU when there is one.
        progress: "bar", "log" (a line for every layer), None for nothing, or a function that is called with every step.
            "auto" shows a bar or lines once the call has taken some seconds.
        allow_pruned: accept a model that already carries pruned experts.

    Returns:
        Report: per tensor sparsity, pattern, residual; per block tokens, time and peak memory.

    Raises:
        UnsupportedModelError: no experts, or experts this package cannot handle; named.
        UsageError: no model, no calibration data or no recipe; a pattern that does not divide a matrix; mtp="prune".
            Raised before anything is changed.
        CalibrationError: the windows or statistics do not fit this model.
    """
    check_module(model)
    recipe = _settled(recipe, device, calibration)
    if recipe.stores_codes:
        # where its values lie in the model's own dtype
        recipe = replace(recipe, fake_quantised=True)
    check_in_memory(getattr(model, "config", None), recipe)
    if recipe.output_dtype is not None:
        raise UsageError(
            f"output_dtype must be left out for a model in memory, got {recipe.output_dtype!r}: it is for the folder "
            "of a quantised checkpoint (moesparse.prune_checkpoint)"
        )
    given = tokenised(calibration, model, tokenizer)
    with reporting(progress) as told:
        options = RunOptions(batch_size, device_at_work(device), allow_pruned, progress=told)
        if recipe.target_bytes is not None:
            return prune_to_budget(model, given, recipe, options, domains)
        return carry_out_in_place(model, calibration_of(given, model, domains), recipe, options)


def prune_checkpoint(
    source: str | os.PathLike[str] | LayersOnDisk,
    out: str | os.PathLike[str],
    calibration: Given | Text,
    recipe: Recipe | str | float | None = None,
    *,
    domains: Sequence[str] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    card: Callable[[Report], str] | None = None,
    batch_size: int = 8,
    device: torch.device | str | None = None,
    resume: bool = False,
    allow_pruned: bool = False,
    max_memory: int | None = None,
    progress: ProgressLike = "auto",
    complete: Callable[[Report], Report] = lambda report: report,
) -> Report:
    """Prune the experts of a checkpoint into a new checkpoint, dense with zeros.

    Holds what lies outside of the decoder layers, one layer with its sums (see `moesparse.prune`) and the hidden
    states of the calibration set; nothing that grows with the number of layers. Reads the source twice.

    A quantised checkpoint stays in its format: a layer is dequantised while it is run, what has not changed is copied
    byte for byte, and weights that were solved for are quantised again. `Recipe.output_dtype` makes a plain one of it.

    A recipe that removes experts needs besides a few numbers of every expert and window, and while a block is refitted
    `memory_for_refit`; with weights to prune as well the smaller model lies beside the output, in a folder of its name
    with ".experts" behind it, until the output is whole.

    Where torch.distributed's default group is there, its processes share the work: all must call with the same
    arguments, and see `source` and `out`. Each runs its own batches and prunes its own experts; the first one writes.
    A process that ends is a ProcessError in the others.

    Args:
        source: a folder with safetensors under the names that transformers saves, a hub id, "demo", or what was made
            of one.
        out: a new or empty folder, or with `resume` one that holds an unfinished run.
        calibration: (n, t) int64 windows, or (windows, attention mask), or `ImageWindows`, or None where the recipe
            looks at weights alone (magnitude, no update). To remove experts without a refit also saved statistics of
            the model, or of its domains by name. Also text, as in `prune`.
        recipe: what to do: weights of one pattern, the removal of experts, or both; or only the pattern.
        domains: of each window, for the choice of experts; None is one domain.
        tokenizer: saved beside the weights, and for text; None takes that of the source.
        card: gives the text of README.md.
        batch_size: windows in one forward.
        device: where the layer at work goes; None takes the GPU when there is one.
        resume: go on with the run in `out`; its source, windows, recipe and batch size must be the same.
        allow_pruned: accept a model that already carries pruned experts.
        max_memory: bytes of RAM to stay within; None is what is available now. The hidden states go to a file in `out`
            when they would not fit beside the rest.
        progress: as in `prune`.
        complete: what the report is to be, given what this run alone would report.

    Returns:
        The report; the seconds are those of this run, peak memory and seconds of a block those of the run that did it.

    Raises:
        UsageError: a recipe that needs the whole model, a pattern that does not divide a matrix, layers that predict
            further tokens and cannot be kept, or a `max_memory` below what the run needs, which is named.
        CheckpointError: the source cannot be read, `out` cannot be written, is in use, or holds another run.
        UnsupportedModelError: the model cannot be handled layer by layer, or is quantised in a way that is not known;
            named.
        CalibrationError: the windows do not fit the model, or it was pruned before.
    """
    recipe = _settled(recipe, device, calibration)
    _check_layered(calibration, recipe)
    layers = LayersOnDisk.of(source if isinstance(source, LayersOnDisk) else local_folder(source), recipe.output_dtype)
    given = tokenised(calibration, layers.model, tokenizer, folder=layers.folder)
    data = calibration_of(given, layers.model, domains)
    check_quantised(layers, recipe)
    prepare_next_token_layers(layers, recipe, saved=isinstance(data, Saved))
    check_work(layers, data, recipe)
    check_plain_routers(layers, recipe)
    with reporting(progress) as told:
        options = RunOptions(batch_size, device_at_work(device), allow_pruned, resume, max_memory, told)
        work = _Work(data, recipe, options, tokenizer, card, read_report(layers.folder))
        if not (recipe.removes_experts and recipe.changes_weights):
            return work.carry_out(layers, Path(out), recipe, complete)
        return work.carry_out_both(layers, Path(out), complete)


def _settled(recipe: Recipe | str | float | None, device: Any, calibration: Given | Text) -> Recipe:
    """The recipe as such a device carries it out with such data."""
    from_sums = isinstance(calibration, ModelStatistics | Mapping)
    return Recipe.of(recipe).on(device_at_work(device), calibrated=calibration is not None, from_sums=from_sums)


def _check_layered(calibration: Given | Text, recipe: Recipe) -> None:
    """Refuse what only a whole model can do, before anything is opened."""
    wants_one = not recipe.removes_experts
    if (
        recipe.target_bytes is not None
        or (wants_one and recipe.weights is None and recipe.values is None)
        or (wants_one and isinstance(calibration, ModelStatistics | Mapping))
    ):
        raise UsageError(
            "recipe must remove experts, or have one pattern for all weights and windows to calibrate on, to run layer "
            f"by layer, got {recipe.to_dict()} and {type(calibration).__name__}"
        )


class _Work:
    """What a run from folder to folder is given.

    Args:
        data: to calibrate on.
        recipe: all of it; the memory must do for every step.
        options: of the run.
        tokenizer, card: of the result.
        before: the report of the source, where it was pruned already.
    """

    def __init__(
        self,
        data: Calibration,
        recipe: Recipe,
        options: RunOptions,
        tokenizer: PreTrainedTokenizerBase | None,
        card: Callable[[Report], str] | None,
        before: dict[str, Any] | None,
    ) -> None:
        self.data, self.recipe, self.options = data, recipe, options
        self.tokenizer, self.card, self.before = tokenizer, card, before

    def inputs(self, layers: LayersOnDisk, step: Recipe) -> dict[str, Any]:
        """All that the result of a step depends on."""
        inputs = {
            "source": layers.signature(),
            "windows": self.data.identity,
            "recipe": step.to_dict(),
            "batch size": self.options.batch_size,
            "release": __version__,
        }
        if step.removes_experts:
            domains = getattr(self.data, "domains", None)
            named = None if domains is None else json.dumps(list(domains)).encode()
            inputs["domains"] = None if named is None else hashlib.sha256(named).hexdigest()[:32]
        return inputs

    def carry_out(
        self,
        layers: LayersOnDisk,
        out: Path,
        step: Recipe,
        complete: Callable[[Report], Report] = lambda report: report,
        *,
        between: bool = False,
    ) -> Report:
        """One step, into a folder.

        Args:
            layers: opened, and used up.
            out: a new or empty folder, or with `resume` an unfinished run's.
            step: of the recipe.
            complete: what the report is to be.
            between: the folder is for the next step, which looks for the inputs in its report.
        """
        windows, length = self.data.size
        processes = layers.processes
        # every step must do with the memory that the whole recipe is planned for
        whole = self.recipe if step.removes_experts else step
        sizes = {"windows": windows, "length": length, "batch_size": self.options.batch_size}
        plan = plan_run(layers.model, layers.blocks, whole, processes=processes.count, **sizes)
        spill = spills(plan, self.options, processes)
        inputs = self.inputs(layers, step)
        how: dict[str, Any] = {"spill": spill, "mtp": step.mtp}
        how["values"] = step.value_format if step.stores_codes else None
        with IntoFolder.open(out, layers, inputs, self.options, **how) as output:
            found = carry_out(layers, output, self.data, step, self.options)
            found.surplus = output.surplus()
            report = complete(found)
            text = None if self.card is None or between else card_in_form(self.card(report), layers.packed)
            noted = report.to_dict() | {"inputs": inputs} if between else following(self.before, report.to_dict())
            written: dict[str, Any] = {"card": text, "report": noted, "plan": found.plan}
            output.finish(noted["recipe"], tokenizer=None if between else self.tokenizer, **written)
        return report

    def carry_out_both(self, layers: LayersOnDisk, out: Path, complete: Callable[[Report], Report]) -> Report:
        """Experts first, into a folder beside the output, and from there the weights of those that stay."""
        between, processes = experts_folder(out), layers.processes

        def clear() -> None:
            if (out / "config.json").exists() and not (out / JOURNAL_FILE).exists():
                # killed behind its last step but one
                shutil.rmtree(between, ignore_errors=True)
            if not (out / JOURNAL_FILE).exists():
                check_output_folder(out)

        processes.from_first(clear)
        removed = self._removed(layers, between)
        smaller = LayersOnDisk(between).open()
        if self.recipe.mtp == "prune":
            smaller.add_next_token_layers(run=True)
        plan = ExpertPlan.load(between / PLAN_FILE)
        report = self.carry_out(
            smaller,
            out,
            self.recipe.without_experts(),
            lambda report: complete(both_steps(self.recipe, removed, plan, report)),
        )
        processes.from_first(lambda: shutil.rmtree(between))
        return report

    def _removed(self, layers: LayersOnDisk, folder: Path) -> dict[str, Any]:
        """The report of the smaller model in a folder; it is made where it is not whole yet."""
        step = self.recipe.without_weights()
        if not (folder / "config.json").exists() or (folder / JOURNAL_FILE).exists():
            return self.carry_out(layers, folder, step, between=True).to_dict()
        held = read_json(folder / REPORT_FILE, "a report")
        if "inputs" not in held:
            raise CheckpointError(f"{folder} must be free for the smaller model, got another checkpoint; move it")
        done = f"an unfinished run left the smaller model in {folder}"
        check_inputs(done, held["inputs"], self.inputs(layers, step), resume=self.options.resume)
        return held


def experts_folder(out: Path) -> Path:
    """Where the smaller model lies while its weights are pruned into `out`."""
    return out.with_name(f"{out.name}.experts")


def first_step(out: Path) -> dict[str, Any] | None:
    """The report of the smaller model that a run of two steps has left beside its output; None where none is whole."""
    file = experts_folder(out) / REPORT_FILE
    held = read_json(file, "a report") if file.is_file() else {}
    return held if "inputs" in held and not file.with_name(JOURNAL_FILE).exists() else None


def what_is_left(out: Path) -> str:
    """What a stopped run has left for going on, in a sentence; "" when nothing."""
    between = experts_folder(out)
    whole = f"the smaller model is kept in {between}" if (between / "config.json").exists() else ""
    return what_is_kept(out) or what_is_kept(between) or whole
