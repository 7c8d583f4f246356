"""`moesparse calibrate MODEL STATS`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from moesparse.cli.common import (
    CALIBRATION_HELP,
    FROM_MODEL_HELP,
    MIX_HELP,
    TEMPERATURE_HELP,
    calibration_text,
    console,
    model_source,
    print_json,
    progress_bar,
    quiet_libraries,
    resolve_device,
    show_domains,
)


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
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1: where the model runs.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print a summary as one JSON object.")] = False,
) -> None:
    """Run text through a dense model once and save the sums that every criterion is computed from.

    From Python, moesparse.ModelStatistics.load reads the file, and files of the same model add up.

    Examples:

      moesparse calibrate demo out/demo.stats

      moesparse calibrate mixtral/ out/law.stats --calibration law.jsonl=law

      moesparse calibrate demo out/demo.stats --experts 0.5 --budget global --expert-floor 4
    """
    import torch

    from moesparse.blocks import find_moe_blocks
    from moesparse.calibration import calibrate as run
    from moesparse.checkpoint import load_pretrained
    from moesparse.domains import check_mix, mixed_scores, split_windows, survey
    from moesparse.errors import UsageError
    from moesparse.expert_pruning import choose_rule
    from moesparse.saliency.experts import check_criterion, dead_experts, stack_sums
    from moesparse.statistics import check_moments

    check_moments(moments)
    check_criterion(expert_saliency)
    check_mix(mix)
    chooses = experts is not None or keep_experts is not None
    target = resolve_device(device)
    if statistics.is_dir():
        raise UsageError(f"STATISTICS must be a file to write, got the folder {statistics}")
    source = model_source(model)
    with quiet_libraries():
        network, tokenizer = load_pretrained(source)
        blocks = find_moe_blocks(network)
        choose = None
        if chooses:
            choose = choose_rule(blocks, keep=keep_experts, remove=experts, budget=budget, floor=expert_floor)
            choose(torch.zeros(len(blocks), blocks[0].num_experts))
        with progress_bar() as progress:
            text = calibration_text(
                calibration or [],
                tokenizer,
                source,
                network,
                samples=samples,
                length=length,
                seed=seed,
                from_model=demonstrations_from_model,
                temperature=temperature,
                batch_size=batch_size,
                device=target,
                progress=progress,
            )
            by_window: dict[str, torch.Tensor] = {}
            result = run(
                network,
                text.windows,
                moments=moments,
                batch_size=batch_size,
                device=target,
                progress=progress,
                seed=seed,
                by_window=by_window if choose else None,
            )
    statistics.parent.mkdir(parents=True, exist_ok=True)
    result.save(statistics)
    dead = dead_experts(result)
    choice: dict[str, Any] = {}
    if choose is not None:
        stack_sums(result, expert_saliency)  # names the sum that is missing
        parts = split_windows(by_window, text.domains)
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
    console.print(f"wrote {statistics}: {result.tokens:,} tokens, {len(result.blocks)} blocks", highlight=False)
    for name, ids in zip(result.blocks, dead, strict=True):
        if ids:
            console.print(f"[yellow]no calibration tokens:[/] {name} experts {' '.join(map(str, ids))}")
    for name, ids in choice.get("kept", {}).items():
        console.print(f"{name} would keep {len(ids)}: {' '.join(map(str, ids))}", highlight=False)
    if choice:
        show_domains(choice["domains"], expert_saliency)
