"""`moesparse distill STUDENT --teacher MODEL -o OUT`."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from moesparse.cli.common import (
    CALIBRATION_HELP,
    calibration_text,
    console,
    embedded_texts,
    format_bytes,
    model_source,
    print_json,
    progress_bar,
    quiet_libraries,
    resolve_device,
)

_WINDOWS = 1000
_EMBEDDED_WINDOWS = 240


def distill(
    student: Annotated[str, typer.Argument(help="The pruned checkpoint: dense with zeros, or packed.")],
    teacher: Annotated[str, typer.Option(help="The model it was pruned from: a folder, a hub id, or 'demo'.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="A new or empty folder for the trained checkpoint.")],
    mode: Annotated[
        str,
        typer.Option(
            help="global: both models whole, cross-entropy and expert loss (the paper's). blockwise: one block of each "
            "on the device at a time, expert loss alone."
        ),
    ] = "global",
    preset: Annotated[
        str, typer.Option(help="paper (lr 2e-5, 3 epochs), or small: minutes on a CPU for the embedded model.")
    ] = "",
    learning_rate: Annotated[float | None, typer.Option("--lr", help="Of AdamW at the start; cosine to 0.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Times every window is seen.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Windows in one step of the optimizer.")] = None,
    micro_batch: Annotated[
        int | None, typer.Option(help="Windows in one forward; the rest of a batch is accumulated.")
    ] = None,
    expert_weight: Annotated[
        float | None, typer.Option("--lambda", help="Weight of the expert loss; cross-entropy / expert loss at step 0.")
    ] = None,
    calibration: Annotated[list[str] | None, typer.Option(help=CALIBRATION_HELP)] = None,
    samples: Annotated[
        int | None, typer.Option(help="Windows to train on: 1000, or 240 of the embedded model's own text.", min=1)
    ] = None,
    length: Annotated[int, typer.Option(help="Tokens in a window; bounded by the model's context.", min=2)] = 2048,
    seed: Annotated[int, typer.Option(help="Seed of the choice and of the order of windows.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1: where to train.")] = "auto",
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Recompute layers in the backward: less memory, more time.")
    ] = False,
    cache: Annotated[
        Path | None, typer.Option(help="Keep the teacher's outputs in this folder, and read them.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from OUT.state, which a stopped run has left there.")
    ] = False,
    save_every: Annotated[int, typer.Option(help="Steps between two states in OUT.state.", min=1)] = 50,
    logs: Annotated[Path | None, typer.Option(help="Folder for TensorBoard (moesparse\\[tensorboard]).")] = None,
    packed: Annotated[bool, typer.Option("--packed", help="Write n:m blocks packed.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as one JSON object.")] = False,
) -> None:
    """Let a pruned model win back quality: its kept expert weights learn from the experts of the dense model.

    Zeros stay zeros. With torchrun the global mode trains on several devices by FSDP2.

    Examples:

      moesparse distill out/demo-2to4 --teacher demo -o out/demo-recovered

      moesparse distill olmoe-2to4 --teacher allenai/OLMoE-1B-7B-0924 -o olmoe-recovered --calibration c4.jsonl

      torchrun --nproc-per-node 8 -m moesparse distill mixtral-2to4 --teacher mixtral/ -o out --calibration c4.jsonl
    """
    from moesparse.checkpoint import CONFIG_KEY, REPORT_FILE, check_output_folder, load_pretrained, save_pretrained
    from moesparse.distillation import DistillWarning
    from moesparse.distillation import distill as run
    from moesparse.distillation.distributed import Processes
    from moesparse.distillation.settings import resolve_settings
    from moesparse.model_card import card_in_form, distilled_card
    from moesparse.packing import packed_blocks

    started = _join_processes()
    try:
        check_output_folder(output)
        target = resolve_device(device)
        sources = {name: model_source(name) for name in (student, teacher)}
        small = bool(embedded_texts("calibration", sources[teacher]))
        changes = {
            "learning_rate": learning_rate,
            "epochs": epochs,
            "batch_size": batch_size,
            "micro_batch": micro_batch,
            "expert_weight": expert_weight,
            "seed": seed,
        }
        settings = dataclasses.replace(
            resolve_settings(preset or ("small" if small else "paper")),
            **{name: value for name, value in changes.items() if value is not None},  # type: ignore[arg-type]
        )
        speaks = Processes.current().first
        with quiet_libraries(), progress_bar(quiet=not speaks) as progress, warnings.catch_warnings():
            # they are in the report, and shown from there
            warnings.simplefilter("ignore", DistillWarning)
            network, tokenizer = load_pretrained(sources[student])
            dense, _ = load_pretrained(sources[teacher])
            text = calibration_text(
                calibration or [],
                tokenizer,
                sources[teacher],
                network,
                samples=samples or (_EMBEDDED_WINDOWS if small and not calibration else _WINDOWS),
                length=length,
                seed=seed,
                progress=progress,
            )
            state = output.with_name(output.name + ".state")
            report = run(
                network,
                dense,
                text.windows,
                mode,
                settings=settings,
                device=target,
                checkpointing=checkpointing,
                cache=cache,
                state=state,
                save_every=save_every,
                resume=resume,
                logs=logs,
                progress=progress,
            )
            if not speaks:
                return
            noted: dict[str, Any] = getattr(network.config, CONFIG_KEY, None) or {}
            recipe = dict(noted.get("recipe") or {})
            recipe["distillation"] = {"mode": mode, **settings.to_dict(), "windows": len(text.ids)}
            folder = Path(sources[student])
            held = {name: folder / name for name in ("README.md", REPORT_FILE)}
            card = held["README.md"].read_text() if held["README.md"].is_file() else ""
            run_before = json.loads(held[REPORT_FILE].read_text()) if held[REPORT_FILE].is_file() else None
            stays_packed = packed or any(True for _ in packed_blocks(network))
            save_pretrained(
                network,
                output,
                tokenizer=tokenizer,
                source=sources[student],
                recipe=recipe,
                packed=stays_packed,
                card=card_in_form(distilled_card(card, teacher, report, *text.ids.shape), stays_packed),
                report=None if run_before is None else run_before | {"distillation": report.to_dict()},
            )
            shutil.rmtree(state)
    finally:
        if started:
            import torch.distributed

            torch.distributed.destroy_process_group()
    if as_json:
        print_json(report.to_dict() | {"output": str(output)})
        return
    _show(report, output)


def _join_processes() -> bool:
    """Under torchrun: start the process group; True when this call has."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return False
    import torch
    import torch.distributed as dist

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return True


def _show(report: Any, output: Path) -> None:
    rows = report.rows
    for text in report.warnings:
        console.print(f"[yellow]warning:[/] {text}", highlight=False, soft_wrap=True)
    if report.mode == "global":
        first, last = rows[0], rows[-1]
        console.print(
            f"cross-entropy {first['ce']:.3f} > {last['ce']:.3f}, expert loss {first['experts']:.4g} > "
            f"{last['experts']:.4g}, lambda {report.expert_weight:.3g}",
            highlight=False,
        )
    else:
        for name in dict.fromkeys(row["block"] for row in rows):
            losses = [row["experts"] for row in rows if row["block"] == name]
            console.print(f"{name}: expert loss {losses[0]:.4g} > {losses[-1]:.4g}", highlight=False)
    console.print(
        f"{len(rows)} steps in {report.seconds:.0f} s, peak memory {format_bytes(report.peak_bytes)}; "
        f"{report.zeros[0]:,} zeros of {report.weights:,} expert weights, all kept",
        highlight=False,
    )
    console.print(f"wrote {output}; next: moesparse eval {output}", highlight=False)
