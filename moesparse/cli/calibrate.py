"""`moesparse calibrate MODEL STATS`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moesparse.cli.common import (
    calibration_windows,
    console,
    model_source,
    print_json,
    progress_bar,
    quiet_libraries,
    resolve_device,
)


def calibrate(
    model: Annotated[str, typer.Argument(help="A local folder, a hub id, or 'demo' for the embedded model.")],
    statistics: Annotated[Path, typer.Argument(help="The safetensors file to write.")],
    calibration: Annotated[
        list[str] | None,
        typer.Option(
            help="Text: FILE.txt, .jsonl or .parquet (field 'text'), or a datasets name. FILE=DOMAIN names it. Repeat."
        ),
    ] = None,
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
    """
    from moesparse.calibration import calibrate as run
    from moesparse.checkpoint import load_pretrained
    from moesparse.errors import UsageError
    from moesparse.evaluate import context_length
    from moesparse.saliency.experts import dead_experts
    from moesparse.statistics import check_moments

    check_moments(moments)
    target = resolve_device(device)
    if statistics.is_dir():
        raise UsageError(f"STATISTICS must be a file to write, got the folder {statistics}")
    source = model_source(model)
    with quiet_libraries():
        network, tokenizer = load_pretrained(source)
        windows = calibration_windows(
            calibration or [],
            tokenizer,
            source,
            samples=samples,
            length=length,
            seed=seed,
            context=context_length(network),
        )
        with progress_bar() as progress:
            result = run(
                network, windows, moments=moments, batch_size=batch_size, device=target, progress=progress, seed=seed
            )
    statistics.parent.mkdir(parents=True, exist_ok=True)
    result.save(statistics)
    dead = dead_experts(result)
    if as_json:
        print_json(
            {
                "output": str(statistics),
                "tokens": result.tokens,
                "fingerprint": result.fingerprint,
                "text": result.text_hash,
                "blocks": dict(zip(result.blocks, ({"dead": ids} for ids in dead), strict=True)),
            }
        )
        return
    console.print(f"wrote {statistics}: {result.tokens:,} tokens, {len(result.blocks)} blocks", highlight=False)
    for name, ids in zip(result.blocks, dead, strict=True):
        if ids:
            console.print(f"[yellow]no calibration tokens:[/] {name} experts {' '.join(map(str, ids))}")
