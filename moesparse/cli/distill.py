"""`moesparse distill STUDENT --teacher MODEL -o OUT`."""

from __future__ import annotations

import dataclasses
import shutil
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from moesparse.cli.common import (
    CALIBRATION_HELP,
    TextOptions,
    console,
    embedded_texts,
    format_bytes,
    model_source,
    print_json,
    progress_bar,
    quiet_libraries,
    resolve_device,
    saying_what_is_left,
)
from moesparse.cli.processes import job, joined

_WINDOWS = 1000
_EMBEDDED_WINDOWS = 240


def distill(
    student: Annotated[str, typer.Argument(help="The pruned checkpoint: dense with zeros, or packed.")],
    teacher: Annotated[str, typer.Option(help="The model it was pruned from: a folder, a hub id, or 'demo'.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="A new or empty folder for the trained checkpoint.")],
    mode: Annotated[
        str,
        typer.Option(
            help="global: both models whole, cross-entropy and expert loss (the paper's). blockwise: expert loss "
            "alone, one layer of each model in memory at a time."
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
    logit_share: Annotated[
        float | None,
        typer.Option("--logits", help="Share of the cross-entropy that KL to the teacher's logits replaces, 0 to 1."),
    ] = None,
    train: Annotated[
        str | None,
        typer.Option(help="experts: their matrices (the paper's). all: routers, attention and the rest too."),
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
        bool,
        typer.Option(
            "--resume", help="Go on from what a stopped run has left: OUT.state, or OUT itself in blockwise mode."
        ),
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
    from moesparse.distillation import DistillWarning
    from moesparse.distillation.distributed import TrainingProcesses
    from moesparse.distillation.settings import PRESETS, check_mode, resolve_settings
    from moesparse.errors import UsageError

    if preset and preset not in PRESETS:
        raise UsageError(f"--preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    target = resolve_device(device)
    with joined(target):
        changes = {
            "learning_rate": learning_rate,
            "epochs": epochs,
            "batch_size": batch_size,
            "micro_batch": micro_batch,
            "expert_weight": expert_weight,
            "logit_share": logit_share,
            "train": train,
            "seed": seed,
        }
        sources = {name: model_source(name) for name in (student, teacher)}
        small = bool(embedded_texts("calibration", sources[teacher]))
        settings = dataclasses.replace(
            resolve_settings(preset or ("small" if small else "paper"), mode),
            **{name: value for name, value in changes.items() if value is not None},  # type: ignore[arg-type]
        )
        check_mode(mode, settings)
        TrainingProcesses.current().check(mode, settings)
        wanted: dict[str, Any] = {
            "samples": samples or (_EMBEDDED_WINDOWS if small and not calibration else _WINDOWS),
            "length": length,
            "seed": seed,
        }
        run = _Run(student, teacher, output, settings, target, calibration or [], wanted, resume, logs)
        # a packed student is small enough to be unpacked: only what is stored dense is read layer by layer
        folders = mode == "blockwise" and not packed and not _is_packed(sources[student])
        with quiet_libraries(), warnings.catch_warnings():
            # they are in the report, and shown from there
            warnings.simplefilter("ignore", DistillWarning)
            if folders and cache is None and not checkpointing:
                report = run.by_layer()
            else:
                report = run.whole(mode, packed, checkpointing=checkpointing, cache=cache, save_every=save_every)
    if report is None:
        return
    if as_json:
        print_json(report.to_dict() | {"output": str(output)})
        return
    _show(report, output)


@dataclasses.dataclass
class _Run:
    """What both ways to run need."""

    student: str
    teacher: str
    output: Path
    settings: Any
    device: Any
    calibration: list[str]
    wanted: dict[str, Any]
    resume: bool
    logs: Path | None

    def whole(self, mode: str, packed: bool, **options: Any) -> Any:
        """Load both models; None in every process but the first."""
        from moesparse.checkpoints.card import card_in_form
        from moesparse.checkpoints.pretrained import CONFIG_KEY, load_pretrained, save_pretrained
        from moesparse.distillation import distill
        from moesparse.distillation.card import distilled_card
        from moesparse.errors import CheckpointError
        from moesparse.packed.model import packed_blocks
        from moesparse.system.folders import check_output_folder

        check_output_folder(self.output)
        state = self.output.with_name(self.output.name + ".state")
        source = Path(model_source(self.student))
        with saying_what_is_left(lambda: _kept_state(state)), progress_bar() as progress:
            network, tokenizer = load_pretrained(source)
            dense, _ = load_pretrained(model_source(self.teacher))
            wanted = TextOptions(self.calibration, **self.wanted)
            text = wanted.read(tokenizer, model_source(self.teacher), network, progress)
            report = distill(
                network,
                dense,
                text.windows,
                mode,
                settings=self.settings,
                device=self.device,
                state=state,
                resume=self.resume,
                logs=self.logs,
                progress=progress,
                **options,
            )
        if job.rank:
            return None
        noted: dict[str, Any] = getattr(network.config, CONFIG_KEY, None) or {}
        stays_packed = packed or any(True for _ in packed_blocks(network))
        card = distilled_card(_card(source), self.teacher, report, *text.ids.shape)
        try:
            save_pretrained(
                network,
                self.output,
                tokenizer=tokenizer,
                source=source,
                recipe={**(noted.get("recipe") or {}), "distillation": report.summary(len(text.ids))},
                packed=stays_packed,
                card=card_in_form(card, stays_packed),
                report=report.beside(source),
            )
        except CheckpointError as error:
            kept = f"The trained state is kept in {state}: make room and run the same again with --resume"
            raise CheckpointError(f"{error}. {kept}") from error
        shutil.rmtree(state)
        return report

    def by_layer(self) -> Any:
        """One layer of each model in memory at a time."""
        from moesparse.checkpoints.hub import local_folder
        from moesparse.checkpoints.pretrained import load_tokenizer
        from moesparse.distillation import distill_checkpoint
        from moesparse.distillation.card import distilled_card
        from moesparse.models.meta import meta_model
        from moesparse.system.run_folder import check_run_folder, what_is_kept

        check_run_folder(self.output)
        source, dense = (local_folder(model_source(name)) for name in (self.student, self.teacher))
        tokenizer = load_tokenizer(source)
        with saying_what_is_left(lambda: what_is_kept(self.output)), progress_bar() as progress:
            text = TextOptions(self.calibration, **self.wanted).read(tokenizer, str(dense), meta_model(dense))
            return distill_checkpoint(
                source,
                dense,
                self.output,
                text.windows,
                settings=self.settings,
                tokenizer=tokenizer,
                card=lambda report: distilled_card(_card(source), self.teacher, report, *text.ids.shape),
                device=self.device,
                resume=self.resume,
                logs=self.logs,
                progress=progress,
            )


def _kept_state(state: Path) -> str:
    return f"the state is kept in {state}" if any(state.glob("*.pt")) else ""


def _card(folder: Path) -> str:
    file = folder / "README.md"
    return file.read_text() if file.is_file() else ""


def _is_packed(folder: str) -> bool:
    from moesparse.system.shards import read_json

    file = Path(folder) / "config.json"
    return file.is_file() and "quantization_config" in read_json(file)


def _show(report: Any, output: Path) -> None:
    rows = report.rows
    for text in report.warnings:
        console.print(f"[yellow]warning:[/] {text}", highlight=False, soft_wrap=True)
    if report.mode == "global":
        first, last = rows[0], rows[-1]
        parts = [f"cross-entropy {first['ce']:.3f} > {last['ce']:.3f}"]
        parts += [f"KL {first['kl']:.4g} > {last['kl']:.4g}"] if "kl" in first else []
        if report.expert_weight:
            parts += [f"expert loss {first['experts']:.4g} > {last['experts']:.4g}, lambda {report.expert_weight:.3g}"]
        console.print(", ".join(parts), highlight=False)
    else:
        for name in dict.fromkeys(row["block"] for row in rows):
            losses = [row["experts"] for row in rows if row["block"] == name]
            console.print(f"{name}: expert loss {losses[0]:.4g} > {losses[-1]:.4g}", highlight=False)
    console.print(
        f"{len(rows)} steps in {report.seconds:.0f} s, peak memory {format_bytes(report.peak_bytes)}; "
        f"{report.zeros[0]:,} zeros of {report.weights:,} expert weights, all kept",
        highlight=False,
    )
    console.print(f"wrote {output}; next: moesparse eval {output}", highlight=False, soft_wrap=True)
