"""`moesparse calibrate MODEL STATS`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moesparse.cli.common import (
    CALIBRATION_HELP,
    DRY_RUN_HELP,
    FROM_MODEL_HELP,
    MAX_MEMORY_HELP,
    MIX_HELP,
    RESUME_HELP,
    TEMPERATURE_HELP,
    WHOLE_HELP,
    TextOptions,
    console,
    model_source,
    print_json,
    progress_bar,
    quiet_libraries,
    resolve_device,
    saying_what_is_left,
    show_domains,
)
from moesparse.cli.processes import job, joined, refuse_several

if TYPE_CHECKING:
    from torch import Tensor

    from moesparse.calibration.statistics import ModelStatistics

    Done = tuple[ModelStatistics, dict[str, Tensor], list[str], Callable[[Tensor], list[Tensor]] | None]


def calibrate(
    model: Annotated[str, typer.Argument(help="A local folder, a hub id, or 'demo' for the embedded model.")],
    statistics: Annotated[Path, typer.Argument(help="The safetensors file to write.")],
    calibration: Annotated[list[str] | None, typer.Option(help=CALIBRATION_HELP)] = None,
    demonstrations_from_model: Annotated[int | None, typer.Option(metavar="N", help=FROM_MODEL_HELP)] = None,
    temperature: Annotated[float, typer.Option(help=TEMPERATURE_HELP)] = 0.0,
    experts: Annotated[
        float | None, typer.Option(help="Also show which experts would stay if this share went, per domain too.")
    ] = None,
    keep_experts: Annotated[int | None, typer.Option(help="Or: if this many of every block stayed.")] = None,
    expert_saliency: Annotated[str, typer.Option(help="Criterion of that choice, see moesparse prune.")] = "reap",
    mix: Annotated[str, typer.Option(help=MIX_HELP)] = "pooled",
    budget: Annotated[
        str, typer.Option(help="Of that choice: per-layer, or global, over all blocks together (to look at only).")
    ] = "per-layer",
    expert_floor: Annotated[int | None, typer.Option(help="Fewest experts of a block under the global budget.")] = None,
    moments: Annotated[str, typer.Option(help="Second moments to keep too: none, plain, gated or both.")] = "none",
    samples: Annotated[int, typer.Option(help="Calibration windows.", min=1)] = 128,
    length: Annotated[int, typer.Option(help="Tokens in a window; bounded by the model's context.", min=2)] = 2048,
    seed: Annotated[int, typer.Option(help="Seed of the choice of windows.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Windows in one forward.", min=1)] = 8,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1: where the layer at work goes.")] = "auto",
    resume: Annotated[bool, typer.Option("--resume", help=RESUME_HELP)] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help=DRY_RUN_HELP)] = False,
    max_memory: Annotated[str, typer.Option(metavar="SIZE", help=MAX_MEMORY_HELP)] = "",
    whole: Annotated[bool, typer.Option("--whole", help=WHOLE_HELP)] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a summary as one JSON object.")] = False,
) -> None:
    """Run text through a dense model once and save the sums that every criterion is computed from.

    The checkpoint is read layer by layer: it need not fit in memory, and a run that was stopped goes on with --resume
    from what it has left in STATISTICS.unfinished. --demonstrations-from-model and --whole load the whole model. A file
    that is there is neither used again nor written over. With torchrun several processes share the text.

    From Python, moesparse.ModelStatistics.load reads the file, and files of the same model add up.

    Examples:

      moesparse calibrate demo out/demo.stats

      moesparse calibrate mixtral/ out/law.stats --calibration law.jsonl=law

      moesparse calibrate demo out/demo.stats --experts 0.5 --budget global --expert-floor 4
    """
    from moesparse.calibration.checkpoint import check_statistics_file
    from moesparse.calibration.statistics import check_moments
    from moesparse.errors import UsageError
    from moesparse.experts.criteria import check_criterion, dead_experts, stack_sums
    from moesparse.experts.domains import check_mix, mixed_scores, split_windows, survey
    from moesparse.pruning.recipe import check_removal

    check_moments(moments)
    check_criterion(expert_saliency)
    check_mix(mix)
    check_statistics_file(statistics)
    check_removal(experts, keep_experts)
    rule = {"keep": keep_experts, "remove": experts, "budget": budget, "floor": expert_floor}
    chooses = experts is not None or keep_experts is not None
    for option, given in (("--budget global", budget != "per-layer"), ("--expert-floor", expert_floor is not None)):
        if given and not chooses:
            raise UsageError(f"{option} must come with --experts or --keep-experts, whose choice it shows, got neither")
    if (whole or demonstrations_from_model is not None) and (resume or dry_run or max_memory):
        raise UsageError(
            "--resume, --dry-run and --max-memory must be left out where the whole model is loaded: --whole and "
            "--demonstrations-from-model"
        )
    if whole or demonstrations_from_model is not None:
        refuse_several("--whole" if whole else "--demonstrations-from-model")
    run = _Run(
        model,
        statistics,
        moments,
        rule if chooses else None,
        TextOptions(
            calibration or [],
            samples,
            length,
            seed,
            from_model=demonstrations_from_model,
            temperature=temperature,
            batch_size=batch_size,
            device=resolve_device(device),
        ),
    )
    with quiet_libraries():
        loads = whole or demonstrations_from_model is not None
        options: dict[str, Any] = {"resume": resume, "dry_run": dry_run, "max_memory": max_memory, "as_json": as_json}
        done = run.whole() if loads else run.by_layer(**options)
    if done is None:
        return
    result, by_window, domains, choose = done
    dead = dead_experts(result)
    choice: dict[str, Any] = {}
    if choose is not None:
        stack_sums(result, expert_saliency)  # names the sum that is missing
        parts = split_windows(by_window, domains)
        totals = {name: {key: value.sum(0) for key, value in part.items()} for name, part in parts.items()}
        kept = choose(mixed_scores(totals, expert_saliency, mix, seed=seed))
        choice = {
            "criterion": expert_saliency,
            "kept": dict(zip(result.blocks, (ids.tolist() for ids in kept), strict=True)),
            "domains": survey(parts, expert_saliency, choose, mix, seed=seed).to_dict(),
        }
    if as_json:
        print_json(
            {
                "output": str(statistics),
                "tokens": result.tokens,
                "fingerprint": result.fingerprint,
                "text": result.text_hash,
                "blocks": dict(zip(result.blocks, ({"dead": ids} for ids in dead), strict=True)),
            }
            | ({"choice": choice} if choice else {})
        )
        return
    console.print(
        f"wrote {statistics}: {result.tokens:,} tokens, {len(result.blocks)} blocks", highlight=False, soft_wrap=True
    )
    for name, ids in zip(result.blocks, dead, strict=True):
        if ids:
            console.print(f"[yellow]no calibration tokens:[/] {name} experts {' '.join(map(str, ids))}", soft_wrap=True)
    for name, ids in choice.get("kept", {}).items():
        console.print(f"{name} would keep {len(ids)}: {' '.join(map(str, ids))}", highlight=False, soft_wrap=True)
    if choice:
        show_domains(choice["domains"], expert_saliency)


@dataclass(frozen=True)
class _Run:
    """What both ways to run need, and give: the statistics, sums by window, domains, and the rule of the choice."""

    model: str
    statistics: Path
    moments: str
    rule: dict[str, Any] | None
    text: TextOptions

    def by_layer(self, *, resume: bool, dry_run: bool, max_memory: str, as_json: bool) -> Done | None:
        """One layer in memory at a time; None where there is no more to tell."""
        from moesparse.calibration.checkpoint import calibrate_checkpoint, unfinished_folder
        from moesparse.checkpoints.hub import local_folder
        from moesparse.cli.streamed import calibration_plan_for, naming_the_whole, parse_limit, read_text, tell_plan
        from moesparse.models.meta import meta_model
        from moesparse.system.run_folder import what_is_kept

        limit = parse_limit(max_memory)
        folder = local_folder(model_source(self.model))
        plan = calibration_plan_for(folder, self.moments, self.text)
        if tell_plan(plan, self.text.device, dry_run=dry_run, as_json=as_json):
            return None
        kept = unfinished_folder(self.statistics)
        with (
            joined(self.text.device),
            saying_what_is_left(lambda: what_is_kept(kept)),
            naming_the_whole(),
            progress_bar() as progress,
        ):
            choose = self._choose(meta_model(folder))
            text, _ = read_text(self.text, folder, progress)
            by_window: dict[str, Tensor] = {}
            result = calibrate_checkpoint(
                folder,
                self.statistics,
                text.windows,
                moments=self.moments,
                batch_size=self.text.batch_size,
                device=self.text.device,
                seed=self.text.seed,
                by_window=by_window,
                resume=resume,
                max_memory=limit,
                progress=progress,
            )
        return (result, by_window, text.domains, choose) if job.rank == 0 else None

    def whole(self) -> Done:
        """Load the model."""
        from moesparse.calibration.whole import calibrate as run
        from moesparse.checkpoints.pretrained import load_pretrained
        from moesparse.system.run_folder import claimed

        source = model_source(self.model)
        with saying_what_is_left(lambda: ""), claimed(self.statistics), progress_bar() as progress:
            network, tokenizer = load_pretrained(source)
            choose = self._choose(network)
            text = self.text.read(tokenizer, source, network, progress)
            by_window: dict[str, Tensor] = {}
            result = run(
                network,
                text.windows,
                moments=self.moments,
                batch_size=self.text.batch_size,
                device=self.text.device,
                progress=progress,
                seed=self.text.seed,
                by_window=by_window if choose else None,
            )
            result.save(self.statistics)
        return result, by_window, text.domains, choose

    def _choose(self, network: Any) -> Callable[[Tensor], list[Tensor]] | None:
        """The rule of the choice that is to be shown, refused where it cannot be."""
        import torch

        from moesparse.experts.choice import choose_rule
        from moesparse.models.blocks import find_moe_blocks

        if self.rule is None:
            return None
        blocks = find_moe_blocks(network)
        choose = choose_rule(blocks, **self.rule)
        choose(torch.zeros(len(blocks), blocks[0].num_experts))
        return choose
