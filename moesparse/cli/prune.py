"""`moesparse prune MODEL OUT`."""

from __future__ import annotations

from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moesparse.cli import options
from moesparse.cli.console import print_json, quiet_libraries
from moesparse.cli.prune_run import PruneRun
from moesparse.cli.push import check_push, pushed
from moesparse.cli.recipe import Asked
from moesparse.cli.show import show_pruned
from moesparse.cli.text import TextOptions
from moesparse.cli.unfinished import tell_finished
from moesparse.errors import UsageError

if TYPE_CHECKING:
    from moesparse.pruning.report import Report

HELP = """Prune the experts of a Mixture-of-Experts model and write an ordinary transformers checkpoint.

MODEL is calibrated on a small text, block by block; every expert matrix is pruned to the pattern, its kept weights
are re-solved, and the result is saved dense with zeros under the standard names: plain transformers loads it.
Router, attention, norms, embeddings and shared experts stay as they were.

A quantised checkpoint stays in its format: experts that stay are copied byte for byte, with --update none the codes
of pruned weights alone change, and a rule that solves for weights has them quantised again. --output-dtype bfloat16
makes a plain checkpoint of it.

Weights are pruned and experts removed layer by layer from the checkpoint's files: the model need not fit in memory,
and a run that was stopped goes on with --resume. --target-bytes, --refine-experts and --demonstrations-from-model
load the whole model, and so does --whole. Magnitude without an update needs no text and runs nothing.

Which experts stay is written to moesparse_plan.json beside the result, and --plan carries it out on any copy of the
model without text: in another dtype, or a GGUF file, from which experts are removed as blocks of bytes.

With torchrun several processes share the work: the batches of the text and the experts of a block. What loads the
whole model does not.

Examples:

  moesparse prune demo out/demo-2to4

  moesparse prune allenai/OLMoE-1B-7B-0924 out/olmoe --weights 2:4 --calibration c4.jsonl

  moesparse prune mixtral/ out/paper --recipe paper --calibration c4.jsonl

  moesparse prune demo out/demo-int4 --values int4:64

  moesparse prune demo out/twelve-experts --keep-experts 12

  moesparse prune demo out/by-rank --experts 0.25 --budget global --allow-non-uniform

  moesparse prune demo out/merged --experts 0.25 --expert-method ream

  moesparse prune demo out/again --plan out/twelve-experts/moesparse_plan.json

  moesparse prune model-Q4_K_M.gguf out/model-Q4_K_M.gguf --plan out/olmoe/moesparse_plan.json

  moesparse prune demo out/demo-0.7 --target-bytes 0.7

  moesparse prune allenai/OLMoE-1B-7B-0924 out/olmoe --calibration c4.jsonl --push-to-hub olmoe-2to4

  torchrun --nproc-per-node 8 -m moesparse prune mixtral/ out/mixtral --calibration c4.jsonl
"""
_SEED_HELP = "Seed of the choice of windows, 0 when left out; with --statistics it must be theirs."
_REPORT_HELP = "Also write the report as JSON to this file."


def prune(
    model: options.PrunedModel,
    out: Annotated[
        Path, typer.Argument(help="A new or empty folder for the pruned checkpoint; a file for a GGUF file.")
    ],
    recipe: options.Recipe = "",
    weights: options.Weights = "",
    saliency: options.Saliency = "",
    update: options.Update = "",
    experts: options.Experts = None,
    keep_experts: options.KeepExperts = None,
    divisible_by: options.DivisibleBy = None,
    budget: options.Budget = "",
    expert_floor: options.ExpertFloor = None,
    allow_non_uniform: options.AllowNonUniform = False,
    plan: options.Plan = None,
    scores: options.Scores = None,
    expert_saliency: options.ExpertSaliency = "",
    expert_method: options.ExpertMethod = "",
    refine_experts: options.RefineExperts = False,
    mix: options.Mix = "",
    protect_super_experts: options.ProtectSuperExperts = False,
    target_bytes: options.TargetBytes = "",
    mtp: options.Mtp = "",
    values: options.Values = "",
    value_rule: options.ValueRule = "",
    fake_quantised: options.FakeQuantised = False,
    choices: options.Choices = "",
    compare_uniform: options.CompareUniform = None,
    calibration: options.Calibration = None,
    chat: options.Chat = False,
    pack: options.Pack = True,
    statistics: options.Statistics = None,
    demonstrations_from_model: options.FromModel = None,
    temperature: options.Temperature = 0.0,
    samples: options.Samples = 128,
    length: options.Length = 2048,
    seed: Annotated[int | None, options.option(options.TEXT, _SEED_HELP)] = None,
    batch_size: options.BatchSize = 8,
    device: options.Device = "auto",
    propagate: options.Propagate = None,
    allow_pruned: options.AllowPruned = False,
    resume: options.Resume = False,
    dry_run: options.DryRun = False,
    max_memory: options.MaxMemory = "",
    whole: options.Whole = False,
    output_dtype: options.OutputDtype = "",
    report: Annotated[Path | None, options.option(options.RESULT, _REPORT_HELP)] = None,
    base_model: options.BaseModel = "",
    push_to_hub: options.PushToHub = "",
    as_json: options.AsJson = False,
) -> None:
    """See HELP."""
    asked = dict(locals())
    from moesparse.checkpoints.gguf import is_gguf

    if is_gguf(model):
        _prune_gguf(asked)
        return
    wanted = Asked.by(asked)
    written: dict[str, Any] = {"from_model": demonstrations_from_model, "temperature": temperature}
    written |= {"chat": chat, "pack": pack}
    machine: dict[str, Any] = {"batch_size": batch_size, "device": options.resolve_device(device)}
    text = TextOptions(calibration or [], samples, length, wanted.recipe.seed, **written, **machine)
    same = ("model", "out", "allow_pruned", "resume", "dry_run", "max_memory", "whole", "base_model", "as_json")
    how: dict[str, Any] = {name: asked[name] for name in same}
    how |= {"seed": wanted.seed, "names_update": wanted.names_update}
    run = PruneRun(recipe=wanted.recipe, text=text, statistics=statistics or [], **how)
    _carry_out(run, report, push_to_hub)


def _prune_gguf(asked: dict[str, Any]) -> None:
    """Of a GGUF file experts can be removed and nothing else.

    Args:
        asked: the parameters of the command.
    """
    from moesparse.cli.gguf import TAKEN, prune_gguf_file

    defaults = {name: each.default for name, each in signature(prune).parameters.items()}
    for name, value in asked.items():
        if name not in TAKEN and value != defaults[name]:
            option = f"--{name.replace('_', '-')}"
            raise UsageError(f"{option} must be left out for a GGUF model, whose experts are removed and nothing else")
    report = asked["report"]
    if report is not None:
        options.check_output_file("--report", report)
    found = prune_gguf_file(**{name: asked[name] for name in TAKEN if name != "report"})
    if report is not None:
        report.parent.mkdir(parents=True, exist_ok=True)
        report.write_text(found.to_json())


def _carry_out(run: PruneRun, report: Path | None, repository: str) -> None:
    """Prune where that is not done yet, push where that is asked for, and say what was done."""
    run.check(report)
    check_push(repository, run.base_model)
    with quiet_libraries():
        held = run.finished()
        if held is not None:
            tell_finished(held, run.out, report, pushed(run.out, repository), as_json=run.as_json)
            return
        found = run.on_whole_model() if run.loads else run.layer_by_layer()
    if found is not None:
        _tell(found, run.out, report, pushed(run.out, repository), run.as_json)


def _tell(result: Report, out: Path, report: Path | None, more: dict[str, str], as_json: bool) -> None:
    if report is not None:
        report.parent.mkdir(parents=True, exist_ok=True)
        report.write_text(result.to_json())
    if as_json:
        print_json("prune", result.to_dict() | {"output": str(out), **more})
        return
    show_pruned(result, out)
