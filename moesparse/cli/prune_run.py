"""A run of `moesparse prune`: layer by layer from the files, or on the whole model in memory."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from moesparse.cli import options
from moesparse.cli.console import console, print_json
from moesparse.cli.job import job, refuse_several
from moesparse.cli.model import ModelOnDisk, WholeModel, at_work
from moesparse.cli.plan import planned_windows, tell_plan
from moesparse.cli.show import show_budget
from moesparse.cli.text import CalibrationText, TextOptions, check_without_shares
from moesparse.cli.unfinished import finished_report
from moesparse.errors import UsageError

if TYPE_CHECKING:
    from moesparse.pruning.recipe import Recipe
    from moesparse.pruning.report import Report

__all__ = ["PruneRun"]

_QUANTISED = "The checkpoint is quantised: experts that stay are copied byte for byte, and not refitted."
_QUANTISED_MERGED = (
    "The checkpoint is quantised: merged experts are quantised again, and those that stay are not refitted; --update "
    "names a rule that does."
)
_QUANTISED_PRUNED = (
    "The checkpoint is quantised: experts that stay are not refitted, and of their codes those of pruned weights alone "
    "change; --update names a rule that quantises them again."
)
_MASK_RULE = (
    "Mask rule: {rule}, the default of this device (a CPU: gated-sparsegpt; a GPU: gated-admm, a little better and "
    "slower on a CPU)."
)


@dataclass(frozen=True)
class PruneRun:
    """What is to be done, and where the model lies while it is."""

    model: str
    out: Path
    recipe: Recipe
    text: TextOptions
    statistics: list[str]
    seed: int | None
    allow_pruned: bool
    resume: bool
    dry_run: bool
    max_memory: str
    whole: bool
    base_model: str
    as_json: bool
    names_update: bool

    @property
    def loads(self) -> list[str]:
        """Options by which the whole model is loaded; none of them: it is read layer by layer."""
        given = {
            "--whole": self.whole,
            "--target-bytes": self.recipe.target_bytes is not None,
            "--demonstrations-from-model": self.text.from_model is not None,
            "--refine-experts": self.recipe.refine_experts,
        }
        return [option for option, is_given in given.items() if is_given]

    @property
    def shows_plan(self) -> bool:
        """Whether a plan for a number of bytes is all that is wanted: it takes the text and the model."""
        return self.dry_run and self.recipe.target_bytes is not None

    @property
    def reads(self) -> bool:
        """Whether text goes through the model."""
        return not self.statistics and (self.recipe.target_bytes is not None or not self.recipe.reads_weights_alone)

    def check(self, report: Path | None) -> None:
        """Refuse what cannot go together, and places that cannot be written, before any work."""
        if self.text.sources and self.recipe.removes_experts and self.recipe.reads_weights_alone:
            raise UsageError(
                "--calibration must be left out with --plan, --scores or --expert-saliency aimer and --update none, "
                "which run none"
            )
        if self.statistics and (self.text.sources or self.text.from_model is not None):
            raise UsageError("only one of --statistics and calibration text may be given, got both")
        if report is not None:
            options.check_output_file("--report", report)
        if self.loads and (self.resume or (self.dry_run and not self.shows_plan) or self.max_memory):
            raise UsageError(
                "--resume, --dry-run and --max-memory must be left out where the whole model is loaded: --whole, "
                "--target-bytes (but for --dry-run), --refine-experts and --demonstrations-from-model"
            )
        if self.loads and self.recipe.output_dtype is not None:
            raise UsageError(
                f"--output-dtype must be left out where the whole model is loaded ({', '.join(self.loads)}), got "
                f"{self.recipe.output_dtype}"
            )
        if self.loads and self.recipe.stores_codes:
            raise UsageError(
                f"--fake-quantised must come with --values where the whole model is loaded ({', '.join(self.loads)}), "
                f"got --values {self.recipe.values}: codes are stored layer by layer"
            )
        if self.loads:
            refuse_several(", ".join(self.loads))

    def finished(self) -> dict[str, Any] | None:
        """With --resume: the report in OUT, where a run by this recipe has ended; None where one is still to run.

        Raises:
            CheckpointError: OUT holds the result of another recipe; names the fields that differ.
        """
        from moesparse.checkpoints.history import joined_recipe, read_report
        from moesparse.pruning.run import experts_folder, first_step
        from moesparse.system.unfinished import check_inputs

        held = finished_report(self.out) if self.resume and not self.dry_run else None
        if held is None:
            return None
        model = ModelOnDisk(self.model, self.recipe.output_dtype)
        before = read_report(model.folder) or {}
        wanted = joined_recipe(before.get("recipe"), self._recipe_of(model).to_dict())
        check_inputs(f"OUT is finished: {self.out}", {"recipe": held["recipe"]}, {"recipe": wanted}, resume=True)
        if first_step(self.out) is not None and not job.rank:
            # killed behind its last step but one
            shutil.rmtree(experts_folder(self.out))
        return held

    def layer_by_layer(self) -> Report | None:
        """Print the plan, then prune from folder to folder; None where there is no more to tell."""
        from moesparse.pruning.card import model_card
        from moesparse.pruning.next_token import prepare_next_token_layers
        from moesparse.pruning.plan import plan_run
        from moesparse.pruning.quantised import plan_quantised
        from moesparse.pruning.run import prune_checkpoint, what_is_left
        from moesparse.system.folders import companions
        from moesparse.system.run_folder import check_run_folder

        saved = _load_statistics(self.statistics, self.seed) if self.statistics else None
        limit = options.parse_limit(self.max_memory)
        if not self.dry_run:
            check_run_folder(self.out)
        model = ModelOnDisk(self.model, self.recipe.output_dtype)
        companions(model.folder)
        recipe = self._recipe_of(model)
        if self.dry_run:
            model.check_headers()
        prepare_next_token_layers(model.layers, recipe, saved=saved is not None)
        network, blocks = model.network, model.layers.blocks
        text = self.text if self.reads else replace(self.text, samples=0, length=1)
        if self.reads and not self.dry_run:
            self.text.check(model.source)
        plan = plan_run(network, blocks, recipe, **planned_windows(network, text))
        plan = plan_quantised(plan, model.layers, recipe)
        if tell_plan(plan, self.text.device, recipe, dry_run=self.dry_run, as_json=self.as_json):
            return None
        with at_work(self.out, lambda: what_is_left(self.out), self.text.device, whole=False) as progress:
            found = model.read(self.text, progress) if self.reads else None
            report = prune_checkpoint(
                model.layers,
                self.out,
                saved if found is None else found.windows,
                recipe,
                domains=None if found is None else found.domains,
                card=lambda report: model_card(self.model, report, self.base_model or None),
                complete=lambda report: _with_sources(report, found),
                batch_size=self.text.batch_size,
                device=self.text.device,
                resume=self.resume,
                allow_pruned=self.allow_pruned,
                max_memory=limit,
                progress=progress,
            )
        return report if job.rank == 0 else None

    def _recipe_of(self, model: ModelOnDisk) -> Recipe:
        """The recipe; without a refit where the model is quantised and none was asked for."""
        from moesparse.pruning.quantised import check_quantised

        recipe = self._settled()
        stays_quantised = model.layers.said is not None and recipe.output_dtype is None
        if stays_quantised and recipe.refits_experts and not self.names_update:
            recipe = replace(recipe, update="none")
            if not self.as_json:
                said = _QUANTISED.replace("quantised", "packed") if model.layers.packed else _QUANTISED
                said = _QUANTISED_MERGED if recipe.merges_experts else said
                console.print(_QUANTISED_PRUNED if recipe.prunes_weights else said)
        check_quantised(model.layers, recipe)
        return recipe

    def _settled(self) -> Recipe:
        """The recipe with the mask rule of the device; which one that is, is said where weights are pruned by it."""
        from moesparse.system.processes import device_at_work

        recipe = self.recipe.on(device_at_work(self.text.device), from_sums=bool(self.statistics))
        prunes = recipe.prunes_weights or recipe.target_bytes is not None
        if recipe.saliency != self.recipe.saliency and prunes and not self.as_json and job.rank == 0:
            console.print(_MASK_RULE.format(rule=recipe.saliency))
        return recipe

    def on_whole_model(self) -> Report | None:
        """Load the model, prune it and save it; or only show how a number of bytes would be met."""
        from moesparse.checkpoints.hub import local_folder
        from moesparse.checkpoints.pretrained import save_pretrained
        from moesparse.models.layers import RunOptions
        from moesparse.models.meta import read_config
        from moesparse.pruning.card import model_card
        from moesparse.pruning.driver import check_not_quantized
        from moesparse.pruning.next_token import check_kept_or_dropped
        from moesparse.pruning.run import prune
        from moesparse.pruning.to_budget import BudgetReport, plan_budget
        from moesparse.system.folders import check_output_folder, companions
        from moesparse.system.processes import device_at_work

        saved = _load_statistics(self.statistics, self.seed) if self.statistics else None
        check_output_folder(self.out)
        folder = local_folder(options.model_source(self.model))
        companions(folder)
        check_not_quantized(read_config(folder))
        check_kept_or_dropped(folder, self.recipe)
        if self.reads:
            self.text.check(str(folder))
        recipe = self._settled()
        with at_work(self.out, lambda: "", self.text.device, whole=True) as progress:
            model = WholeModel(self.model)
            found = model.read(self.text, progress) if self.reads else None
            data, domains = (saved, None) if found is None else (found.windows, found.domains)
            asked: dict[str, Any] = {"batch_size": self.text.batch_size, "allow_pruned": self.allow_pruned}
            asked |= {"progress": progress}
            network = model.network
            if self.shows_plan:
                how = RunOptions(device=device_at_work(self.text.device), **asked)
                plan = BudgetReport(plan_budget(network, data, recipe, how, domains)).to_dict()
                print_json("budget", plan) if self.as_json else show_budget(plan, Console())
                return None
            result = prune(network, data, recipe, domains=domains, device=self.text.device, **asked)
            result = _with_sources(result, found)
            if self.text.from_model is not None:
                written = {"tokens from the model": self.text.from_model, "temperature": self.text.temperature}
                result.calibration |= written
            result.surplus = save_pretrained(
                network,
                self.out,
                source=model.source,
                recipe=result.recipe,
                card=model_card(self.model, result, self.base_model or None),
                report=result.to_dict(),
                plan=result.plan,
            )
        return result


def _load_statistics(sources: list[str], seed: int | None) -> Any:
    """Statistics by domain, or those of the one file without a name of its own; their text was drawn by the seed."""
    from moesparse.calibration.statistics import ModelStatistics
    from moesparse.text import parse_source

    named = [parse_source(source) for source in sources]
    check_without_shares("--statistics", named)
    for one in named:
        options.check_input_file("--statistics", Path(one.path))
    domains = [one.domain for one in named]
    if len(set(domains)) != len(domains):
        raise UsageError(f"--statistics must name each domain once, got {', '.join(domains)}: give FILE=DOMAIN")
    found = {one.domain: ModelStatistics.load(one.path) for one in named}
    for one in named:
        drawn = found[one.domain].seed
        if seed is not None and drawn is not None and drawn != seed:
            raise UsageError(
                f"--seed must be {drawn}, by which the text of {one.path} was drawn, or left out, got {seed}; old "
                "statistics do not become those of another seed"
            )
    return found if len(found) > 1 else next(iter(found.values()))


def _with_sources(report: Report, found: CalibrationText | None) -> Report:
    """The report, which says too what was read for the windows."""
    if found is not None:
        report.calibration |= found.noted
    return report
