"""`moesparse calibrate MODEL STATS`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moesparse.cli import options
from moesparse.cli.console import console, print_json, quiet_libraries
from moesparse.cli.job import job, refuse_several
from moesparse.cli.model import ModelOnDisk, WholeModel, at_work
from moesparse.cli.plan import planned_windows, tell_plan
from moesparse.cli.show import show_domains
from moesparse.cli.text import CalibrationText, TextOptions
from moesparse.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from moesparse.calibration.statistics import ModelStatistics
    from moesparse.experts.origin import Origin

HELP = """Run text through a dense model once and save the sums that every criterion is computed from.

The checkpoint is read layer by layer: it need not fit in memory, and a run that was stopped goes on with --resume
from what it has left in STATISTICS.unfinished. --demonstrations-from-model and --whole load the whole model. A file
that is there is not written over; with --resume it is finished, and it is said what it holds. With torchrun several
processes share the text.

From Python, moesparse.ModelStatistics.load reads the file, and files of the same model add up.

Examples:

  moesparse calibrate demo out/demo.stats

  moesparse calibrate mixtral/ out/law.stats --calibration law.jsonl=law

  moesparse calibrate demo out/demo.stats --experts 0.5 --budget global --expert-floor 4

  moesparse calibrate demo out/demo.stats --experts 0.25 --plan out/plan.json --scores out/scores.json
"""
CHOICE = "A choice of experts to show"


def calibrate(
    model: options.Model,
    statistics: Annotated[Path, typer.Argument(help="The safetensors file to write.")],
    calibration: options.Calibration = None,
    chat: options.Chat = False,
    pack: options.Pack = True,
    demonstrations_from_model: options.FromModel = None,
    temperature: options.Temperature = 0.0,
    experts: Annotated[
        float | None, options.option(CHOICE, "Also show which experts would stay if this share went, per domain too.")
    ] = None,
    keep_experts: Annotated[int | None, options.option(CHOICE, "Or: if this many of every block stayed.")] = None,
    divisible_by: Annotated[
        int | None,
        options.option(CHOICE, "How many stay must be a multiple of this, see moesparse prune.", metavar="N"),
    ] = None,
    expert_saliency: Annotated[str, options.option(CHOICE, "Criterion of that choice, see moesparse prune.")] = "reap",
    mix: Annotated[str, options.option(CHOICE, options.MIX_HELP)] = "pooled",
    budget: Annotated[
        str, options.option(CHOICE, "Of that choice: per-layer, or global, over all blocks together.")
    ] = "per-layer",
    expert_floor: Annotated[
        int | None, options.option(CHOICE, "Fewest experts of a block under the global budget.")
    ] = None,
    plan: Annotated[
        Path | None,
        options.option(
            CHOICE,
            "Also write that choice to this file, for moesparse prune --plan on any copy of the model.",
            metavar="FILE",
        ),
    ] = None,
    scores: Annotated[
        Path | None,
        options.option(
            options.RESULT,
            "Also write the score of every expert by every criterion to this file, as JSON: small, to be published, "
            "and for moesparse prune --scores.",
            metavar="FILE",
        ),
    ] = None,
    moments: Annotated[
        str,
        options.option(options.RESULT, "Second moments to keep too: none, plain, gated or both."),
    ] = "none",
    samples: options.Samples = 128,
    length: options.Length = 2048,
    seed: Annotated[int, options.option(options.TEXT, "Seed of the choice of windows.")] = 0,
    batch_size: options.BatchSize = 8,
    device: options.Device = "auto",
    resume: options.Resume = False,
    dry_run: options.DryRun = False,
    max_memory: options.MaxMemory = "",
    whole: options.Whole = False,
    as_json: Annotated[
        bool,
        options.option(options.RESULT, "Print a summary as one JSON object.", "--json"),
    ] = False,
) -> None:
    """See HELP."""
    from moesparse.calibration.checkpoint import check_statistics_file
    from moesparse.calibration.statistics import check_moments

    check_moments(moments)
    count: dict[str, Any] = {"keep": keep_experts, "remove": experts, "divisible_by": divisible_by}
    chosen = _Choice.asked(expert_saliency, mix, seed, count, budget, expert_floor)
    _check_files(plan, scores, chosen)
    if resume and statistics.is_file() and chosen is None and scores is None:
        _tell_finished(statistics, seed, as_json=as_json)
        return
    check_statistics_file(statistics)
    made = demonstrations_from_model
    if (whole or made is not None) and (resume or dry_run or max_memory):
        raise UsageError(
            "--resume, --dry-run and --max-memory must be left out where the whole model is loaded: --whole and "
            "--demonstrations-from-model"
        )
    if whole or made is not None:
        refuse_several("--whole" if whole else "--demonstrations-from-model")
    target = options.resolve_device(device)
    text = TextOptions(calibration or [], samples, length, seed, made, temperature, batch_size, target, chat, pack)
    writes_origin = plan is not None or scores is not None
    run = _Run(model, statistics, moments, chosen, text, resume, dry_run, max_memory, as_json, writes_origin)
    with quiet_libraries():
        done = run.on_whole_model() if whole or made is not None else run.layer_by_layer()
    if done is not None:
        _tell(done, statistics, chosen, plan, scores, as_json)


def _tell_finished(path: Path, seed: int, *, as_json: bool) -> None:
    """What a run with --resume has to say where its file is there.

    Raises:
        CheckpointError: its text was drawn by another seed.
    """
    from moesparse.calibration.statistics import ModelStatistics
    from moesparse.system.unfinished import check_inputs

    found = ModelStatistics.load(path)
    check_inputs(f"STATISTICS is finished: {path}", {"seed": found.seed}, {"seed": seed}, resume=True)
    if as_json:
        facts = {"output": str(path), "tokens": found.tokens, "fingerprint": found.fingerprint}
        print_json("calibrate", {**facts, "text": found.text_hash, "already_finished": True})
        return
    console.print(
        f"already finished: {path}, nothing was done. {found.tokens:,} tokens, {len(found.blocks)} blocks",
        highlight=False,
        soft_wrap=True,
    )


def _check_files(plan: Path | None, scores: Path | None, chosen: _Choice | None) -> None:
    """Refuse files that cannot be written, and a plan without a choice."""
    for option, file in (("--plan", plan), ("--scores", scores)):
        if file is not None:
            options.check_output_file(option, file)
    if plan is None:
        return
    if chosen is None:
        raise UsageError("--plan must come with --experts or --keep-experts, whose choice it holds, got neither")


@dataclass(frozen=True)
class _Choice:
    """A choice of experts that is shown beside the statistics."""

    criterion: str
    mix: str
    seed: int
    rule: dict[str, Any]

    @classmethod
    def asked(
        cls,
        criterion: str,
        mix: str,
        seed: int,
        count: dict[str, Any],
        budget: str,
        floor: int | None,
    ) -> _Choice | None:
        """What the options say, None where no choice is asked for; refused where it cannot be."""
        from moesparse.experts.criteria import check_from_sums
        from moesparse.experts.domains import check_mix
        from moesparse.pruning.recipe_checks import check_removal

        check_from_sums(criterion)  # type: ignore[arg-type]
        check_mix(mix)
        check_removal(count["remove"], count["keep"])
        chooses = count["remove"] is not None or count["keep"] is not None
        given_beside = {
            "--budget global": budget != "per-layer",
            "--expert-floor": floor is not None,
            "--divisible-by": count["divisible_by"] is not None,
        }
        for option, given in given_beside.items():
            if given and not chooses:
                raise UsageError(
                    f"{option} must come with --experts or --keep-experts, whose choice it shows, got neither"
                )
        rule = {**count, "budget": budget, "floor": floor}
        return cls(criterion, mix, seed, rule) if chooses else None

    def for_blocks(self, blocks: Any) -> Callable[[Tensor], list[Tensor]]:
        """From scores to kept ids, with all else fixed; refused where it cannot be."""
        import torch

        from moesparse.experts.choice import choose_rule

        choose = choose_rule(blocks, **self.rule)
        choose(torch.zeros(len(blocks), blocks[0].num_experts))
        return choose

    def shown(self, done: _Done) -> dict[str, Any]:
        """Who would stay, and how the domains agree."""
        from moesparse.experts.criteria import check_sums
        from moesparse.experts.domains import mixed_scores, split_windows, survey

        criterion: Any = self.criterion
        assert done.choose is not None
        check_sums(done.statistics, criterion)
        parts = split_windows(done.by_window, done.text.domains)
        totals = {name: {key: value.sum(0) for key, value in part.items()} for name, part in parts.items()}
        kept = done.choose(mixed_scores(totals, criterion, self.mix, seed=self.seed))
        return {
            "criterion": self.criterion,
            "kept": dict(zip(done.statistics.blocks, (ids.tolist() for ids in kept), strict=True)),
            "domains": survey(parts, criterion, done.choose, self.mix, seed=self.seed).to_dict(),
        }


@dataclass(frozen=True)
class _Done:
    """What a run gives.

    Attributes:
        statistics: of the model.
        by_window: the sums of every window, [windows, blocks, E].
        text: that was read.
        choose: the rule of the choice that is to be shown, or None.
        origin: what a plan and scores say of the model; None where neither is written.
    """

    statistics: ModelStatistics
    by_window: dict[str, Tensor]
    text: CalibrationText
    choose: Callable[[Tensor], list[Tensor]] | None
    origin: Origin | None


@dataclass(frozen=True)
class _Run:
    """What is to be done."""

    model: str
    statistics: Path
    moments: str
    chosen: _Choice | None
    text: TextOptions
    resume: bool
    dry_run: bool
    max_memory: str
    as_json: bool
    writes_origin: bool

    def layer_by_layer(self) -> _Done | None:
        """One layer in memory at a time; None where there is no more to tell."""
        from moesparse.calibration.checkpoint import calibrate_checkpoint, unfinished_folder
        from moesparse.calibration.plan import plan_pass
        from moesparse.experts.origin import Origin
        from moesparse.system.unfinished import what_is_kept

        limit = options.parse_limit(self.max_memory)
        model = ModelOnDisk(self.model)
        network, blocks = model.network, model.layers.blocks
        if self.writes_origin:
            # what cannot be written is refused before the text is run
            Origin.of(network, blocks, {})
        if not self.dry_run:
            self.text.check(model.source)
        plan = plan_pass(network, blocks, self.moments, **planned_windows(network, self.text))
        if tell_plan(plan, self.text.device, None, dry_run=self.dry_run, as_json=self.as_json):
            return None
        kept = unfinished_folder(self.statistics)
        with at_work(self.statistics, lambda: what_is_kept(kept), self.text.device, whole=False) as progress:
            choose = None if self.chosen is None else self.chosen.for_blocks(blocks)
            text, by_window, routers = model.read(self.text, progress), dict[str, Any](), dict[str, Any]()
            result = calibrate_checkpoint(
                model.layers,
                self.statistics,
                text.windows,
                moments=self.moments,
                batch_size=self.text.batch_size,
                device=self.text.device,
                seed=self.text.seed,
                by_window=by_window,
                routers=routers,
                resume=self.resume,
                max_memory=limit,
                progress=progress,
            )
        if job.rank:
            return None
        origin = Origin.of(network, blocks, routers) if self.writes_origin else None
        return _Done(result, by_window, text, choose, origin)

    def on_whole_model(self) -> _Done:
        """Load the model."""
        from moesparse.calibration.whole import calibrate
        from moesparse.checkpoints.hub import local_folder
        from moesparse.experts.origin import Origin
        from moesparse.models.blocks import find_moe_blocks
        from moesparse.models.look import sketches

        self.text.check(str(local_folder(self.model)))
        with at_work(self.statistics, lambda: "", self.text.device, whole=True) as progress:
            model = WholeModel(self.model)
            choose = None if self.chosen is None else self.chosen.for_blocks(find_moe_blocks(model.network))
            text, by_window = model.read(self.text, progress), dict[str, Any]()
            result = calibrate(
                model.network,
                text.windows,
                moments=self.moments,
                batch_size=self.text.batch_size,
                device=self.text.device,
                progress=progress,
                seed=self.text.seed,
                by_window=None if choose is None else by_window,
            )
            result.save(self.statistics)
            blocks = find_moe_blocks(model.network)
            origin = Origin.of(model.network, blocks, sketches(blocks)) if self.writes_origin else None
        return _Done(result, by_window, text, choose, origin)


def _tell(
    done: _Done, path: Path, chosen: _Choice | None, plan: Path | None, scores: Path | None, as_json: bool
) -> None:
    from moesparse.experts.criteria import dead_experts
    from moesparse.experts.plan_file import ExpertPlan
    from moesparse.experts.scores_file import ExpertScores

    result, dead = done.statistics, dead_experts(done.statistics)
    choice = {} if chosen is None else chosen.shown(done)
    if plan is not None and done.origin is not None:
        kept = tuple(map(tuple, choice["kept"].values()))
        ExpertPlan(done.origin, kept, choice["criterion"], result.text_hash).save(plan)
    if scores is not None and done.origin is not None:
        ExpertScores.of(done.origin, result).save(scores)
    if as_json:
        print_json(
            "calibrate",
            {
                "output": str(path),
                "tokens": result.tokens,
                "fingerprint": result.fingerprint,
                "text": result.text_hash,
                **done.text.noted,
                "blocks": dict(zip(result.blocks, ({"dead": ids} for ids in dead), strict=True)),
            }
            | {name: str(file) for name, file in (("plan", plan), ("scores", scores)) if file is not None}
            | ({"choice": choice} if choice else {}),
        )
        return
    console.print(
        f"wrote {path}: {result.tokens:,} tokens, {len(result.blocks)} blocks", highlight=False, soft_wrap=True
    )
    for file, what in ((plan, "the choice, for moesparse prune --plan"), (scores, "for moesparse prune --scores")):
        if file is not None:
            console.print(f"wrote {file}: {what}", highlight=False, soft_wrap=True)
    for name, ids in zip(result.blocks, dead, strict=True):
        if ids:
            console.print(f"[yellow]no calibration tokens:[/] {name} experts {' '.join(map(str, ids))}", soft_wrap=True)
    for name, ids in choice.get("kept", {}).items():
        console.print(f"{name} would keep {len(ids)}: {' '.join(map(str, ids))}", highlight=False, soft_wrap=True)
    if choice:
        show_domains(choice["domains"], choice["criterion"])
