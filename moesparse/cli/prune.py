"""`moesparse prune MODEL OUT`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from moesparse.cli.common import (
    CALIBRATION_HELP,
    DRY_RUN_HELP,
    FROM_MODEL_HELP,
    MAX_MEMORY_HELP,
    MIX_HELP,
    PROTECT_HELP,
    RESUME_HELP,
    TEMPERATURE_HELP,
    WHOLE_HELP,
    TextOptions,
    check_output_file,
    console,
    format_bytes,
    model_source,
    print_json,
    progress_bar,
    quiet_libraries,
    resolve_device,
    saying_what_is_left,
    show_domains,
)
from moesparse.cli.processes import job, joined, refuse_several

_FALLBACKS_SHOWN = 10

SALIENCY_HELP = (
    "Mask rule: magnitude, wanda, moe-pruner (|W| * ||X * gate||), sparsegpt, gated-sparsegpt, admm, gated-admm (the "
    "default)."
)
UPDATE_HELP = (
    "Weight rule: none (the paper's), rescale (one scalar per expert), obs (SparseGPT's update), least-squares (kept "
    "weights re-solved; kept experts too, after others were removed), asymmetric (the same, and down answers for gate "
    "and up), or two joined by +. least-squares+rescale when left out."
)
TARGET_HELP = (
    "What the expert matrices may take once packed: a share of their dense bytes (0.4), or bytes (3.2GB, 3GiB). A "
    "search then chooses how many experts stay and a pattern for each block, by estimated loss."
)
EXPERT_SALIENCY_HELP = (
    "Expert criterion: frequency, gate-sum, ean, reap (the default), man, msan, gated-norm, gated-energy, easy-ep or "
    "random."
)


def prune(
    model: Annotated[str, typer.Argument(help="A local folder, a hub id, or 'demo' for the embedded model.")],
    out: Annotated[Path, typer.Argument(help="A new or empty folder for the pruned checkpoint.")],
    weights: Annotated[
        str,
        typer.Option(
            help="n:m (n of every m inputs stay; 2:4 is what sparse tensor cores run), the ratio removed, or none. "
            "Default: 2:4, or none when experts are removed."
        ),
    ] = "",
    saliency: Annotated[str, typer.Option(help=SALIENCY_HELP)] = "",
    update: Annotated[str, typer.Option(help=UPDATE_HELP)] = "",
    experts: Annotated[
        float | None, typer.Option(help="Remove this share of the experts of every block, for example 0.25.")
    ] = None,
    keep_experts: Annotated[int | None, typer.Option(help="Or: how many experts of every block stay.")] = None,
    expert_saliency: Annotated[str, typer.Option(help=EXPERT_SALIENCY_HELP)] = "",
    refine_experts: Annotated[
        bool, typer.Option("--refine-experts", help="Swap experts while the block's output error falls; slower.")
    ] = False,
    mix: Annotated[str, typer.Option(help=MIX_HELP)] = "pooled",
    budget: Annotated[
        str,
        typer.Option(
            help="per-layer: as many experts in every block. global, over all blocks together, is refused: no "
            "checkpoint format can say it; see moesparse calibrate --budget."
        ),
    ] = "per-layer",
    expert_floor: Annotated[int | None, typer.Option(help="Fewest experts of a block under the global budget.")] = None,
    protect_super_experts: Annotated[bool, typer.Option("--protect-super-experts", help=PROTECT_HELP)] = False,
    target_bytes: Annotated[str, typer.Option(help=TARGET_HELP)] = "",
    choices: Annotated[
        str, typer.Option(help="Of the search for --target-bytes: drop (whole experts), dense and n:m, by commas.")
    ] = "drop,2:4,3:8,4:8,5:8,6:8,dense",
    compare_uniform: Annotated[
        bool,
        typer.Option(
            "--compare-uniform/--no-compare-uniform",
            help="With --target-bytes: prune a copy to the best uniform choice at no more bytes too, measure both on "
            "calibration windows kept aside, keep the better. Twice the time, and memory for the copy.",
        ),
    ] = True,
    calibration: Annotated[list[str] | None, typer.Option(help=CALIBRATION_HELP)] = None,
    statistics: Annotated[
        list[str] | None,
        typer.Option(
            help="Instead of text, to remove experts with --update none: FILE or FILE=DOMAIN that moesparse calibrate "
            "wrote. Repeat."
        ),
    ] = None,
    demonstrations_from_model: Annotated[int | None, typer.Option(metavar="N", help=FROM_MODEL_HELP)] = None,
    temperature: Annotated[float, typer.Option(help=TEMPERATURE_HELP)] = 0.0,
    samples: Annotated[int, typer.Option(help="Calibration windows.", min=1)] = 128,
    length: Annotated[int, typer.Option(help="Tokens in a window; bounded by the model's context.", min=2)] = 2048,
    seed: Annotated[
        int | None,
        typer.Option(help="Seed of the choice of windows, 0 when left out; with --statistics it must be theirs."),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Windows in one forward.", min=1)] = 8,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1: where the layer at work goes.")] = "auto",
    propagate: Annotated[
        bool, typer.Option("--propagate/--no-propagate", help="Feed each block what the pruned blocks before it give.")
    ] = True,
    allow_pruned: Annotated[bool, typer.Option("--allow-pruned", help="Accept a model with pruned experts.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help=RESUME_HELP)] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help=DRY_RUN_HELP)] = False,
    max_memory: Annotated[str, typer.Option(metavar="SIZE", help=MAX_MEMORY_HELP)] = "",
    whole: Annotated[bool, typer.Option("--whole", help=WHOLE_HELP)] = False,
    report: Annotated[Path | None, typer.Option(help="Also write the report as JSON to this file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as one JSON object.")] = False,
) -> None:
    """Prune the experts of a Mixture-of-Experts model and write an ordinary transformers checkpoint.

    MODEL is calibrated on a small text, block by block; every expert matrix is pruned to the pattern, its kept weights
    are re-solved, and the result is saved dense with zeros under the standard names: plain transformers loads it.
    Router, attention, norms, embeddings and shared experts stay as they were.

    Weights are pruned and experts removed layer by layer from the checkpoint's files: the model need not fit in memory,
    and a run that was stopped goes on with --resume. --target-bytes, --refine-experts and --demonstrations-from-model
    load the whole model, and so does --whole. Magnitude without an update needs no text and runs nothing.

    With torchrun several processes share the work: the batches of the text and the experts of a block. What loads the
    whole model does not.

    Examples:

      moesparse prune demo out/demo-2to4

      moesparse prune allenai/OLMoE-1B-7B-0924 out/olmoe --weights 2:4 --calibration c4.jsonl

      moesparse prune mixtral/ out/paper --saliency moe-pruner --update none --calibration c4.jsonl

      moesparse prune demo out/twelve-experts --keep-experts 12

      moesparse prune demo out/demo-0.7 --target-bytes 0.7

      torchrun --nproc-per-node 8 -m moesparse prune mixtral/ out/mixtral --calibration c4.jsonl
    """
    from moesparse.checkpoints.pretrained import load_pretrained, save_pretrained
    from moesparse.errors import UsageError
    from moesparse.pruning.budget import DEFAULT_CHOICES
    from moesparse.pruning.card import model_card
    from moesparse.pruning.recipe import (
        DEFAULT_EXPERT_SALIENCY,
        DEFAULT_SALIENCY,
        DEFAULT_UPDATE,
        DEFAULT_WEIGHTS,
        Recipe,
    )
    from moesparse.pruning.run import prune as run
    from moesparse.pruning.to_budget import BudgetReport, plan_budget
    from moesparse.system.folders import check_output_folder
    from moesparse.system.run_folder import claimed

    removes = experts is not None or keep_experts is not None
    if not weights:
        weights = "none" if removes else DEFAULT_WEIGHTS
    elif target_bytes:
        raise UsageError(f"--weights must be left out with --target-bytes, which chooses patterns, got {weights}")
    if expert_saliency and not (removes or target_bytes):
        raise UsageError("--expert-saliency must come with --experts, --keep-experts or --target-bytes, got none")
    if statistics and not removes:
        raise UsageError("--statistics must come with --experts or --keep-experts, for which they choose, got neither")
    if not target_bytes and choices != ",".join(DEFAULT_CHOICES):
        raise UsageError(f"--choices must come with --target-bytes, which searches among them, got {choices} alone")
    recipe = Recipe(
        weights=None if weights == "none" else weights,
        target_bytes=target_bytes or None,
        choices=choices.split(","),
        compare_uniform=compare_uniform,
        saliency=saliency or DEFAULT_SALIENCY,
        update=update or DEFAULT_UPDATE,
        propagate=propagate,
        seed=seed or 0,
        experts=experts,
        keep_experts=keep_experts,
        expert_saliency=expert_saliency or DEFAULT_EXPERT_SALIENCY,
        refine_experts=refine_experts,
        expert_mix=mix,
        expert_budget=budget,
        expert_floor=expert_floor,
        protect_experts=protect_super_experts,
    )
    if statistics and (calibration or demonstrations_from_model is not None):
        raise UsageError("only one of --statistics and calibration text may be given, got both")
    if report is not None:
        check_output_file("--report", report)
    target = resolve_device(device)
    source = model_source(model)
    text_options = TextOptions(
        calibration or [],
        samples,
        length,
        seed or 0,
        from_model=demonstrations_from_model,
        temperature=temperature,
        batch_size=batch_size,
        device=target,
    )
    needs_data = recipe.target_bytes is not None or not recipe.reads_weights_alone
    writes = recipe.target_bytes is not None or demonstrations_from_model is not None
    streams = not whole and not writes and not refine_experts
    shows_plan = dry_run and recipe.target_bytes is not None
    if not streams and (resume or (dry_run and not shows_plan) or max_memory):
        raise UsageError(
            "--resume, --dry-run and --max-memory must be left out where the whole model is loaded: --whole, "
            "--target-bytes (but for --dry-run), --refine-experts and --demonstrations-from-model"
        )
    if not streams:
        loading = {
            "--whole": whole,
            "--target-bytes": recipe.target_bytes is not None,
            "--demonstrations-from-model": demonstrations_from_model is not None,
            "--refine-experts": refine_experts,
        }
        refuse_several(", ".join(name for name, given in loading.items() if given))
    saved = _load_statistics(statistics, seed) if statistics else None
    if streams:
        with quiet_libraries():
            result = _prune_streamed(
                model,
                out,
                recipe,
                saved,
                text_options,
                reads=needs_data and saved is None,
                resume=resume,
                dry_run=dry_run,
                max_memory=max_memory,
                allow_pruned=allow_pruned,
                as_json=as_json,
            )
        if result is not None:
            _finish(result, out, report, as_json)
        return
    check_output_folder(out)
    with quiet_libraries(), saying_what_is_left(lambda: ""), claimed(out):
        network, tokenizer = load_pretrained(source)
        with progress_bar() as progress:
            text = None
            if needs_data and not statistics:
                text = text_options.read(tokenizer, source, network, progress)
            data: Any = saved if text is None else text.windows
            options: dict[str, Any] = {
                "domains": None if text is None else text.domains,
                "batch_size": batch_size,
                "device": target,
                "progress": progress,
                "allow_pruned": allow_pruned,
            }
            if shows_plan:
                plan = BudgetReport(plan_budget(network, data, recipe, **options))
            else:
                result = run(network, data, recipe, **options)
        if shows_plan:
            show_budget(plan.to_dict()) if not as_json else print_json(plan.to_dict())
            return
        if demonstrations_from_model is not None:
            result.calibration |= {"tokens from the model": demonstrations_from_model, "temperature": temperature}
        card = model_card(model, result)
        save_pretrained(
            network,
            out,
            tokenizer=tokenizer,
            source=source,
            recipe=result.recipe,
            card=card,
            report=result.to_dict(),
        )
    _finish(result, out, report, as_json)


def _finish(result: Any, out: Path, report: Path | None, as_json: bool) -> None:
    if report is not None:
        report.parent.mkdir(parents=True, exist_ok=True)
        report.write_text(result.to_json())
    if as_json:
        print_json(result.to_dict() | {"output": str(out)})
        return
    _show(result, out)


def _prune_streamed(
    model: str,
    out: Path,
    recipe: Any,
    statistics: Any,
    text: TextOptions,
    *,
    reads: bool,
    resume: bool,
    dry_run: bool,
    max_memory: str,
    allow_pruned: bool,
    as_json: bool,
) -> Any:
    """Print the plan, then prune layer by layer; None where there is no more to tell.

    Args:
        reads: the text; without it there are statistics, or the recipe needs neither.
    """
    from moesparse.checkpoints.hub import local_folder
    from moesparse.checkpoints.pretrained import load_tokenizer
    from moesparse.cli.streamed import naming_the_whole, parse_limit, plan_for, read_text, tell_plan
    from moesparse.pruning.card import model_card
    from moesparse.pruning.streamed import prune_checkpoint
    from moesparse.pruning.streamed_experts import what_is_left
    from moesparse.system.run_folder import check_run_folder

    limit = parse_limit(max_memory)
    if not dry_run:
        check_run_folder(out)
    folder = local_folder(model_source(model))
    plan = plan_for(folder, recipe, text if reads else replace(text, samples=0, length=1))
    if tell_plan(plan, text.device, dry_run=dry_run, as_json=as_json):
        return None
    with (
        joined(text.device),
        saying_what_is_left(lambda: what_is_left(out)),
        naming_the_whole(),
        progress_bar() as progress,
    ):
        calibration, domains = statistics, None
        if reads:
            found, tokenizer = read_text(text, folder, progress)
            calibration, domains = found.windows, found.domains
        else:
            tokenizer = load_tokenizer(folder)
        report = prune_checkpoint(
            folder,
            out,
            calibration,
            recipe,
            domains=domains,
            tokenizer=tokenizer,
            card=lambda report: model_card(model, report),
            batch_size=text.batch_size,
            device=text.device,
            resume=resume,
            allow_pruned=allow_pruned,
            max_memory=limit,
            progress=progress,
        )
    return report if job.rank == 0 else None


def _load_statistics(sources: list[str], seed: int | None) -> Any:
    """Statistics by domain, or those of the one file without a name of its own; their text was drawn by the seed."""
    from moesparse.calibration.statistics import ModelStatistics
    from moesparse.errors import UsageError
    from moesparse.text import parse_source

    named = [parse_source(source) for source in sources]
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


def show_budget(budget: dict[str, Any]) -> None:
    """The plan of a target in bytes: what each block keeps, and what that is estimated to cost."""
    plan = budget[budget["kept"]]
    share = plan["bytes"] / budget["dense"]
    table = Table(
        title=f"{budget['kept']} choice: {plan['keep']} of {budget['experts']} experts, {share:.4f} of the dense bytes",
        box=SIMPLE_HEAD,
        padding=(0, 2, 0, 0),
        pad_edge=False,
    )
    matrices = list(next(iter(plan["patterns"].values())))
    for column in ("block", *matrices):
        table.add_column(column, no_wrap=True)
    for column in ("loss by removal", "by patterns"):
        table.add_column(column, justify="right")
    for block, patterns in plan["patterns"].items():
        losses = f"{plan['drop_loss'][block]:.4f}", f"{plan['pattern_loss'][block]:.4f}"
        table.add_row(block, *(patterns[name] for name in matrices), *losses)
    console.print(table)
    console.print(f"losses are estimates in nats per token, {plan['loss']:.4f} in all", highlight=False)
    if not budget["met"]:
        console.print(
            f"the target is {budget['target'] / budget['dense']:.4f}: no choice that takes more of it is estimated to "
            "lose less",
            highlight=False,
        )
    console.print(budget["summary"], highlight=False)


def _show(result: Any, out: Path) -> None:
    if result.budget is not None:
        show_budget(result.budget)
    if result.experts is not None:
        _show_experts(result)
    if result.blocks:
        _show_weights(result)
        wrote = f"wrote {out}: {100 * result.sparsity:.1f}% of the expert weights are zero"
    else:
        wrote = f"wrote {out}"
    console.print(
        f"{wrote}\nnext: moesparse eval {out}   |   moesparse inspect {out}   |   moesparse report {out}",
        highlight=False,
        soft_wrap=True,
    )


def _show_experts(result: Any) -> None:
    removed = result.experts
    table = Table(title=f"experts by {removed['criterion']}", box=SIMPLE_HEAD, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("block", no_wrap=True)
    table.add_column("kept", justify="right", no_wrap=True)
    table.add_column("removed")
    table.add_column("output error", justify="right", no_wrap=True)
    fits = {fit["name"]: f"{fit['before']:.1%} > {fit['after']:.1%}" for fit in removed["refit"]}
    for block, dead in zip(removed["blocks"], removed["dead"], strict=True):
        ids = " ".join(map(str, block["removed"])) + (f" (no tokens: {' '.join(map(str, dead))})" if dead else "")
        table.add_row(block["name"], f"{len(block['kept'])} of {block['before']}", ids, fits.get(block["name"], ""))
    console.print(table)
    for block, expert in removed["protected"]:
        console.print(f"super-expert kept: {removed['blocks'][block]['name']} {expert}", highlight=False)
    show_domains(removed["domains"], removed["criterion"])
    before, after = removed["bytes_before"], removed["bytes_after"]
    console.print(f"model: {before / 2**20:.1f} > {after / 2**20:.1f} MiB", highlight=False)


def _show_weights(result: Any) -> None:
    pattern = result.recipe["weights"] or "mixed patterns"
    table = Table(
        title=f"{result.recipe['saliency']} + {result.recipe['update']} at {pattern}",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_edge=False,
        pad_edge=False,
    )
    table.add_column("block\n  tensor", no_wrap=True)
    for column in ("shape", "zeros", "error", "s", "peak"):
        table.add_column(column, justify="right", no_wrap=True, vertical="bottom")
    for block in result.blocks:
        table.add_row(block.name, "", "", "", f"{block.seconds:.1f}", format_bytes(block.peak_bytes))
        for tensor in block.tensors:
            error = (
                ""
                if tensor.error_after is None
                else f"{_percent(tensor.error_before)} > {_percent(tensor.error_after)}"
            )
            shape = "x".join(map(str, tensor.shape))
            table.add_row(f"  {tensor.name}", shape, f"{100 * tensor.sparsity:.1f}%", error, "", "")
    console.print(table)
    for block, tensor, expert in result.fallbacks[:_FALLBACKS_SHOWN]:
        console.print(
            f"[yellow]no calibration tokens:[/] {block} expert {expert}: {tensor} was masked by magnitude",
            soft_wrap=True,
        )
    if len(result.fallbacks) > _FALLBACKS_SHOWN:
        console.print(f"and {len(result.fallbacks) - _FALLBACKS_SHOWN} more, in the report", highlight=False)


def _percent(values: list[float]) -> str:
    return f"{100 * sum(values) / len(values):.0f}%"
