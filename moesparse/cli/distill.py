"""`moesparse distill STUDENT --teacher MODEL -o OUT`."""

from __future__ import annotations

import dataclasses
import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moesparse.cli import options
from moesparse.cli.console import print_json, quiet_libraries
from moesparse.cli.job import job, joined, saying_what_is_left
from moesparse.cli.model import ModelOnDisk, WholeModel
from moesparse.cli.push import check_push, pushed
from moesparse.cli.show import show_distilled
from moesparse.cli.text import TextOptions, embedded_texts
from moesparse.cli.unfinished import finished_report, tell_finished
from moesparse.cli.voice import shown_progress
from moesparse.errors import UsageError

if TYPE_CHECKING:
    from moesparse.distillation.report import DistillReport
    from moesparse.distillation.settings import Settings

HELP = """Let a pruned model win back quality: its kept expert weights learn from the experts of the dense model.

Zeros stay zeros. With torchrun the global mode trains on several devices by FSDP2.

Examples:

  moesparse distill out/demo-2to4 --teacher demo -o out/demo-recovered

  moesparse distill olmoe-2to4 --teacher allenai/OLMoE-1B-7B-0924 -o olmoe-recovered --calibration c4.jsonl

  torchrun --nproc-per-node 8 -m moesparse distill mixtral-2to4 --teacher mixtral/ -o out --calibration c4.jsonl
"""
_WINDOWS = 1000
_EMBEDDED_WINDOWS = 240


TRAINING = "Training"


def distill(
    student: Annotated[str, typer.Argument(help="The pruned checkpoint: dense with zeros, or packed.")],
    teacher: Annotated[str, typer.Option(help="The model it was pruned from: a folder, a hub id, or 'demo'.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="A new or empty folder for the trained checkpoint.")],
    mode: Annotated[
        str,
        options.option(
            options.FIRST,
            "global: both models whole, cross-entropy and expert loss (the paper's). blockwise: expert loss alone, one "
            "layer of each model in memory at a time.",
        ),
    ] = "global",
    preset: Annotated[
        str,
        options.option(options.FIRST, "paper (lr 2e-5, 3 epochs), or small: minutes on a CPU for the embedded model."),
    ] = "",
    learning_rate: Annotated[
        float | None, options.option(TRAINING, "Of AdamW at the start; cosine to 0.", "--lr")
    ] = None,
    epochs: Annotated[int | None, options.option(TRAINING, "Times every window is seen.")] = None,
    batch_size: Annotated[int | None, options.option(TRAINING, "Windows in one step of the optimizer.")] = None,
    micro_batch: Annotated[
        int | None, options.option(TRAINING, "Windows in one forward; the rest of a batch is accumulated.")
    ] = None,
    expert_weight: Annotated[
        float | None,
        options.option(TRAINING, "Weight of the expert loss; cross-entropy / expert loss at step 0.", "--lambda"),
    ] = None,
    logit_share: Annotated[
        float | None,
        options.option(
            TRAINING, "Share of the cross-entropy that KL to the teacher's logits replaces, 0 to 1.", "--logits"
        ),
    ] = None,
    train: Annotated[
        str | None,
        options.option(
            TRAINING,
            "experts: their matrices (the paper's). all: routers, attention and the rest too. routers: those alone, on "
            "the teacher's logits (--logits 1), or blockwise on what its blocks give.",
        ),
    ] = None,
    calibration: options.Calibration = None,
    chat: options.Chat = False,
    pack: options.Pack = True,
    samples: Annotated[
        int | None,
        options.option(options.FIRST, "Windows to train on: 1000, or 240 of the embedded model's own text.", min=1),
    ] = None,
    length: options.Length = 2048,
    seed: Annotated[int, options.option(options.TEXT, "Seed of the choice and of the order of windows.")] = 0,
    device: Annotated[str, options.option(options.RUN, "auto, cpu, cuda, cuda:1: where to train.")] = "auto",
    checkpointing: Annotated[
        bool,
        options.option(options.RUN, "Recompute layers in the backward: less memory, more time.", "--checkpointing"),
    ] = False,
    cache: Annotated[
        Path | None, options.option(options.RUN, "Keep the teacher's outputs in this folder, and read them.")
    ] = None,
    resume: Annotated[
        bool,
        options.option(
            options.FIRST,
            "Go on from what a stopped run has left: OUT.state, or OUT itself in blockwise mode.",
            "--resume",
        ),
    ] = False,
    save_every: Annotated[int, options.option(options.RUN, "Steps between two states in OUT.state.", min=1)] = 50,
    logs: Annotated[
        Path | None, options.option(options.RUN, "Folder for TensorBoard (moesparse\\[tensorboard]).")
    ] = None,
    packed: Annotated[bool, options.option(options.RESULT, "Write n:m blocks packed.", "--packed")] = False,
    push_to_hub: options.PushToHub = "",
    as_json: options.AsJson = False,
) -> None:
    """See HELP."""
    check_push(push_to_hub)
    target = options.resolve_device(device)
    changes: dict[str, Any] = {"learning_rate": learning_rate, "epochs": epochs, "batch_size": batch_size}
    changes |= {"micro_batch": micro_batch, "expert_weight": expert_weight, "logit_share": logit_share}
    changes |= {"train": train, "seed": seed}
    if train == "routers":
        changes["expert_weight"] = expert_weight or 0.0
        if mode == "global" and logit_share is None:
            changes["logit_share"] = 1.0
    with joined(target):
        small = bool(embedded_texts("calibration", options.model_source(teacher)))
        settings = _settings(preset, mode, changes, small=small)
        windows = samples or (_EMBEDDED_WINDOWS if small and not calibration else _WINDOWS)
        text = TextOptions(calibration or [], windows, length, seed, device=target, chat=chat, pack=pack)
        run = _Run(student, teacher, output, mode, settings, text, resume, logs, packed)
        held = run.finished()
        if held is not None:
            tell_finished(held, output, None, pushed(output, push_to_hub), as_json=as_json)
            return
        report = run.carry_out(checkpointing=checkpointing, cache=cache, save_every=save_every)
    if report is None:
        return
    more = pushed(output, push_to_hub)
    if as_json:
        print_json("distill", report.to_dict() | {"output": str(output), **more})
        return
    show_distilled(report, output)


def _settings(preset: str, mode: str, changes: dict[str, Any], *, small: bool) -> Settings:
    """The settings of a preset with what was given instead."""
    from moesparse.distillation.distributed import TrainingProcesses
    from moesparse.distillation.settings import PRESETS, check_mode, resolve_settings

    if preset and preset not in PRESETS:
        raise UsageError(f"--preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    base = resolve_settings(preset or ("small" if small else "paper"), mode)
    settings = dataclasses.replace(base, **{name: value for name, value in changes.items() if value is not None})
    check_mode(mode, settings)
    TrainingProcesses.current().check(mode, settings)
    return settings


@dataclasses.dataclass(frozen=True)
class _Run:
    """What is to be done."""

    student: str
    teacher: str
    output: Path
    mode: str
    settings: Settings
    text: TextOptions
    resume: bool
    logs: Path | None
    packed: bool

    def finished(self) -> dict[str, Any] | None:
        """With --resume: the report in OUT, where such a training has ended; None where one is still to run.

        Raises:
            CheckpointError: OUT was trained by other settings; names those that differ.
        """
        from moesparse.system.unfinished import check_inputs

        held = finished_report(self.output) if self.resume else None
        trained = None if held is None else held["recipe"].get("distillation")
        if trained is None:
            return None
        settings = {name: value for name, value in trained.items() if name != "windows"}
        wanted = {"mode": self.mode, **self.settings.to_dict()}
        done = f"OUT is finished: {self.output}"
        check_inputs(done, {"settings": settings}, {"settings": wanted}, resume=True)
        return held

    def carry_out(self, *, checkpointing: bool, cache: Path | None, save_every: int) -> DistillReport | None:
        """Train, layer by layer where that can be; None in every process but the first."""
        from moesparse.checkpoints.hub import check_named, local_folder
        from moesparse.distillation import DistillWarning
        from moesparse.distillation.run import check_plain_student

        for argument, name in (("STUDENT", self.student), ("--teacher", self.teacher)):
            check_named(argument, name)
        folder = local_folder(options.model_source(self.student))
        if self.settings.train != "routers" or self.mode == "global":
            check_plain_student(folder, packed=True)
        self.text.check(str(local_folder(self.teacher)))
        # a packed student is small enough to be unpacked: only what is stored dense is read layer by layer
        folders = self.mode == "blockwise" and not self.packed and not _is_packed(options.model_source(self.student))
        with quiet_libraries(), warnings.catch_warnings():
            # they are in the report, and shown from there
            warnings.simplefilter("ignore", DistillWarning)
            if folders and cache is None and not checkpointing:
                return self.layer_by_layer()
            return self.on_whole_models(checkpointing=checkpointing, cache=cache, save_every=save_every)

    def layer_by_layer(self) -> DistillReport:
        """One layer of each model in memory at a time."""
        from moesparse.distillation import distill_checkpoint
        from moesparse.distillation.card import distilled_card
        from moesparse.system.run_folder import check_run_folder
        from moesparse.system.unfinished import what_is_kept

        check_run_folder(self.output)
        student, teacher = ModelOnDisk(self.student), ModelOnDisk(self.teacher)
        with saying_what_is_left(lambda: what_is_kept(self.output)), shown_progress() as progress:
            text = self.text.read(student.tokenizer, teacher.source, teacher.network)
            before = _card(student.folder)
            return distill_checkpoint(
                student.layers,
                teacher.layers,
                self.output,
                text.windows,
                settings=self.settings,
                card=lambda report: distilled_card(before, self.teacher, report, *text.ids.shape),
                device=self.text.device,
                resume=self.resume,
                logs=self.logs,
                progress=progress,
            )

    def on_whole_models(self, **more: Any) -> DistillReport | None:
        """Load both models; None in every process but the first."""
        from moesparse.checkpoints.card import card_in_form
        from moesparse.checkpoints.config_text import CONFIG_KEY
        from moesparse.checkpoints.hub import local_folder
        from moesparse.checkpoints.pretrained import save_pretrained
        from moesparse.distillation import distill
        from moesparse.distillation.card import distilled_card
        from moesparse.errors import CheckpointError
        from moesparse.packed.model import packed_blocks
        from moesparse.system.folders import check_output_folder, companions

        check_output_folder(self.output)
        companions(local_folder(options.model_source(self.student)))
        state = self.output.with_name(self.output.name + ".state")
        with saying_what_is_left(lambda: _kept_state(state)), shown_progress() as progress:
            student, teacher = WholeModel(self.student), WholeModel(self.teacher)
            network = student.network
            text = self.text.read(student.tokenizer, teacher.source, network, progress)
            report = distill(
                network,
                teacher.network,
                text.windows,
                self.mode,
                settings=self.settings,
                device=self.text.device,
                state=state,
                resume=self.resume,
                logs=self.logs,
                progress=progress,
                **more,
            )
        if job.rank:
            return None
        source = Path(student.source)
        noted: dict[str, Any] = getattr(network.config, CONFIG_KEY, None) or {}
        stays_packed = self.packed or any(True for _ in packed_blocks(network))
        card = distilled_card(_card(source), self.teacher, report, *text.ids.shape)
        try:
            report.surplus = save_pretrained(
                network,
                self.output,
                source=source,
                recipe={**(noted.get("recipe") or {}), "distillation": report.summary(len(text.ids))},
                packed=stays_packed,
                card=card_in_form(card, stays_packed),
                report=report.beside(source, len(text.ids)),
            )
        except CheckpointError as error:
            kept = f"The trained state is kept in {state}: make room and run the same again with --resume"
            raise CheckpointError(f"{error}. {kept}") from error
        shutil.rmtree(state)
        return report


def _kept_state(state: Path) -> str:
    return f"the state is kept in {state}" if any(state.glob("*.pt")) else ""


def _card(folder: Path) -> str:
    file = folder / "README.md"
    return file.read_text() if file.is_file() else ""


def _is_packed(folder: str) -> bool:
    from moesparse.system.shards import read_json

    file = Path(folder) / "config.json"
    return file.is_file() and "quantization_config" in read_json(file)
