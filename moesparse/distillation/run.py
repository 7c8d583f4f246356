"""Expert-wise knowledge distillation: let a pruned model win back what its teacher knows, zeros held.

Source: MoE-Pruner (Xie et al., 2024, arXiv 2410.12013), section 3.3.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from moesparse.calibration.data import FromText
from moesparse.calibration.windows import ImageWindows, Windows, check_windows, ordered_hash
from moesparse.checkpoints.config_text import CONFIG_KEY
from moesparse.checkpoints.output import InPlace, IntoFolder
from moesparse.distillation import distributed
from moesparse.distillation.blockwise import BlockStates, train_blockwise
from moesparse.distillation.log import TrainingLog
from moesparse.distillation.matching import (
    Pair,
    check_pair,
    check_pattern,
    differs,
    is_pruned,
    match,
    pair_blocks,
    refuse_dense,
    refuse_equal,
    refuse_rounded,
    stated_pattern,
)
from moesparse.distillation.report import DistillReport, count_zeros
from moesparse.distillation.settings import Settings, resolve_settings
from moesparse.distillation.state import StateFile
from moesparse.distillation.training import router_parameters
from moesparse.distillation.whole import train_whole
from moesparse.errors import UnsupportedModelError, UsageError
from moesparse.models.fingerprint import model_fingerprint
from moesparse.models.formats.said import PACKED, said_of
from moesparse.models.layers import LayersInMemory, RunOptions
from moesparse.models.meta import vocabulary_size
from moesparse.models.on_disk import LayersOnDisk
from moesparse.packed.model import pack, packed_blocks, unpack
from moesparse.progress import ProgressEvent, ProgressLike, reporting
from moesparse.system.memory import reset_gpu_peak
from moesparse.system.processes import device_at_work

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["distill", "distill_checkpoint"]


def distill(
    student: nn.Module,
    teacher: nn.Module,
    windows: Windows,
    mode: str = "global",
    *,
    settings: Settings | str = "paper",
    device: torch.device | str | None = None,
    checkpointing: bool = False,
    cache: str | os.PathLike[str] | None = None,
    state: str | os.PathLike[str] | None = None,
    save_every: int = 50,
    resume: bool = False,
    logs: str | os.PathLike[str] | None = None,
    progress: ProgressLike = "auto",
) -> DistillReport:
    """Train the expert matrices of a pruned model towards those of the model it was made from, in place.

    Only expert matrices change, or by `Settings.train` everything, or routers alone; the zeros of expert matrices stay,
    at every step, and are counted in the end. "global" minimises CE + lambda * sum over layers and experts of
    MSE(teacher expert, student expert), both on the teacher's routing and tokens (`Settings.logit_share` puts KL to the
    teacher's logits in the place of CE), and holds both models, three float32 copies of what trains beside its
    gradients, and [b * t, vocabulary] float32 logits, with KL of both models. "blockwise" minimises each block's sum of
    MSE by itself, with routers the error of its output on the inputs of the teacher's: on the device are one layer of
    the teacher, one block of the student with its training state, and nothing else; the inputs of a block for all
    windows wait on the CPU, and for routers its outputs. Weights train in float32 and compute in the model's dtype.

    Several processes started by torchrun share the global mode by FSDP2 (see `distributed`).

    Args:
        student: pruned, dense with zeros or packed; experts may be missing if config says which are left.
        teacher: dense, or pruned less than the student; not changed.
        windows: LongTensor [n, t], or (ids, attention mask), or `ImageWindows`. The CE of global mode learns this text.
        mode: "global" or "blockwise".
        settings: `Settings`, or a name of PRESETS: "paper" (lr 2e-5, 3 epochs), "small".
        device: where to train; None is the GPU when there is one.
        checkpointing: recompute each layer in the backward instead of keeping its activations; global mode.
        cache: folder for the teacher's outputs on these windows, computed once and then read; global mode. It does not
            keep logits.
        state: folder for what a killed run goes on from; removed by nobody once it holds a state.
        save_every: steps between two states.
        resume: go on from the state in that folder, if there is one.
        logs: folder for TensorBoard.
        progress: as in `moesparse.prune`.

    Returns:
        DistillReport.

    Raises:
        UsageError: an argument that cannot be.
        MoESparseError: a student that does not match the teacher, by name; a loss that is not finite.
        UnsupportedModelError: no experts, or experts that cannot be trained.
    """
    numbers = resolve_settings(settings, mode)
    _check_arguments(mode, numbers, cache, checkpointing, state, save_every, resume)
    ids, mask = check_windows(windows, vocabulary_size(student))
    seen = windows if isinstance(windows, ImageWindows) else None
    if ids.shape[1] < 2:
        raise UsageError("windows must have at least 2 tokens to predict one, got 1")
    processes = distributed.TrainingProcesses.current()
    processes.check(mode, numbers)
    packed = any(True for _ in packed_blocks(student))
    if packed:
        unpack(student)
    try:
        refuse_rounded(student, numbers.train)
        pairs = match(student, teacher)
        if mode == "blockwise" and numbers.train == "experts":
            refuse_equal(differs(pair) for pair in pairs)
        if numbers.train == "routers":
            check_routers(pairs)
        key = {
            "student": model_fingerprint(student),
            "teacher": model_fingerprint(teacher),
            "windows": ordered_hash(ids, mask, None if seen is None else seen.marks),
            "mode": mode,
            "settings": numbers.to_dict(),
        }
        file = None if state is None else StateFile(state, key, resume, writes=processes.first)
        blocks = len(pairs) if mode == "blockwise" else 0
        steps = numbers.steps(len(ids)) * max(blocks, 1)
        rows = list(file.state["rows"]) if file is not None and file.state is not None else []
        started = time.perf_counter()
        reset_gpu_peak()
        before = count_zeros(pairs)
        place = torch.device(device) if device is not None else processes.device()
        weight: float | None = None
        with reporting(progress) as told:
            log = TrainingLog(told, steps, logs, rows, processes.first, blocks)
            try:
                if mode == "global":
                    weight = train_whole(
                        student,
                        teacher,
                        pairs,
                        (ids, mask, seen),
                        numbers,
                        processes,
                        log=log,
                        file=file,
                        save_every=save_every,
                        device=place,
                        checkpointing=checkpointing,
                        cache=cache,
                        key=key,
                    )
                else:
                    ours, theirs = LayersInMemory(student), LayersInMemory(teacher)
                    inputs = None if seen is None else seen.inputs
                    stream = theirs.stream(ids, mask, RunOptions(numbers.batch_size, place), inputs=inputs)
                    routers = numbers.train == "routers"
                    states = None if file is None else BlockStates(file, log, save_every, routers=routers)
                    train_blockwise(ours, theirs, pairs, stream, InPlace(ours), numbers, log, place, states)
            finally:
                log.close()
                if file is not None:
                    file.close()
        for pair in pairs:
            check_pattern(pair.student, stated_pattern(student))
        return DistillReport.of(
            mode, numbers, log, pairs, weight, (before, count_zeros(pairs)), time.perf_counter() - started
        )
    finally:
        if packed:
            pack(student)


def _check_arguments(
    mode: str,
    numbers: Settings,
    cache: str | os.PathLike[str] | None,
    checkpointing: bool,
    state: str | os.PathLike[str] | None,
    save_every: int,
    resume: bool,
) -> None:
    """Refuse what cannot be, or cannot go together; UsageError names it."""
    if save_every < 1:
        raise UsageError(f"save_every must be at least 1, got {save_every}")
    if resume and state is None:
        raise UsageError("resume must come with the state folder to resume from, got state=None")
    if mode == "blockwise" and (cache is not None or checkpointing):
        raise UsageError("cache and checkpointing belong to mode='global', got mode='blockwise'")
    if numbers.logit_share and cache is not None:
        raise UsageError(
            f"cache must be None with logit_share {numbers.logit_share}, got {cache}: it keeps no logits of the "
            "teacher; the settings 'paper' need none"
        )


def distill_checkpoint(
    student: str | os.PathLike[str] | LayersOnDisk,
    teacher: str | os.PathLike[str] | LayersOnDisk,
    out: str | os.PathLike[str],
    windows: Windows,
    *,
    settings: Settings | str = "paper",
    tokenizer: PreTrainedTokenizerBase | None = None,
    card: Callable[[DistillReport], str] | None = None,
    device: torch.device | str | None = None,
    resume: bool = False,
    logs: str | os.PathLike[str] | None = None,
    progress: ProgressLike = "auto",
) -> DistillReport:
    """Distil a pruned checkpoint, dense with zeros, into a new one, block by block.

    Holds what lies outside of the decoder layers of both models, one layer of each, the training state of one block,
    and for all windows the hidden states and the inputs of one block. Trains as `distill(mode="blockwise")` does.

    Args:
        student: folder of the pruned model; quantised too where routers alone train, its experts are copied then.
        teacher: folder of the model it was pruned from, quantised or not.
        out: a new or empty folder, or with `resume` one that holds an unfinished run.
        windows: LongTensor [n, t], or (ids, attention mask), or `ImageWindows`.
        settings: `Settings`, or a name of PRESETS.
        tokenizer: saved beside the weights.
        card: gives the text of README.md.
        device: where a layer trains; None is the GPU when there is one.
        resume: go on with the run in `out`, at the layer it had not finished; student, teacher, windows and settings
            must be the same.
        logs: folder for TensorBoard.
        progress: as in `moesparse.prune`.

    Returns:
        DistillReport; seconds and peak memory are those of this run.

    Raises:
        MoESparseError: as `distill`, before anything is trained.
        CheckpointError: a folder cannot be read or written, or holds another run.
    """
    numbers = resolve_settings(settings, "blockwise")
    started = time.perf_counter()
    ours, theirs = LayersOnDisk.of(student), LayersOnDisk.of(teacher)
    refuse_rounded(ours.model, numbers.train)
    pairs = pair_blocks(ours.model, theirs.model)
    _check_trained(numbers, ours.folder, pairs)
    seen = windows if isinstance(windows, ImageWindows) else None
    text = FromText(*check_windows(windows, vocabulary_size(theirs.model)), seen=seen)
    place = device_at_work(device) or torch.device("cpu")
    inputs = {
        "student": ours.signature(),
        "teacher": theirs.signature(),
        "windows": text.identity,
        "settings": numbers.to_dict(),
    }
    by_name = {pair.teacher.name: pair for pair in pairs}
    pattern, pruned, different = stated_pattern(ours.model), list[bool](), list[bool]()

    with ExitStack() as stack:
        told = stack.enter_context(reporting(progress))

        def inspect(position: int) -> None:
            told(ProgressEvent("check", position, len(theirs), "layer"))
            with ours.hold(position):
                for pair in (by_name[block.name] for block in theirs.blocks_at(position)):
                    check_pair(pair, pattern)
                    pruned.append(is_pruned(pair))
                    different.append(numbers.train == "routers" or differs(pair))

        options = RunOptions(numbers.batch_size, place, resume=resume, progress=told)
        output = stack.enter_context(IntoFolder.open(out, ours, inputs, options))
        stream = theirs.stream(text.ids, text.mask, options, inspect, inputs=text.inputs)
        refuse_dense(pruned)
        refuse_equal(different)
        rows = [row for note in output.notes for row in note["rows"]]
        log = TrainingLog(told, numbers.steps(len(text.ids)) * len(pairs), logs, rows, blocks=len(pairs))
        reset_gpu_peak()
        try:
            found = train_blockwise(ours, theirs, pairs, stream, output, numbers, log, place)
        finally:
            log.close()
        zeros = sum(before for before, _ in found), sum(after for _, after in found)
        report = DistillReport.of("blockwise", numbers, log, pairs, None, zeros, time.perf_counter() - started)
        report.surplus = output.surplus()
        noted = getattr(ours.model.config, CONFIG_KEY, None) or {}
        recipe = {**(noted.get("recipe") or {}), "distillation": report.summary(len(text.ids))}
        text_of_card = None if card is None else card(report)
        output.finish(recipe, tokenizer=tokenizer, card=text_of_card, report=report.beside(ours.folder, len(text.ids)))
    return report


def _check_trained(settings: Settings, folder: Path, pairs: Sequence[Pair]) -> None:
    """Refuse a student's folder that holds what trains in another form than can be trained."""
    if settings.train == "routers":
        check_routers(pairs)
    else:
        check_plain_student(folder)


def check_routers(pairs: Sequence[Pair]) -> None:
    """Refuse blocks whose routers cannot be trained, before any work.

    Raises:
        UnsupportedModelError: no router that can be told apart, or one that lies in the layer itself; names the block.
    """
    router_parameters([pair.student for pair in pairs])
    for block in (pair.student for pair in pairs):
        if block.moe_name == block.layer:
            raise UnsupportedModelError(
                f"{block.name} must lie in a module with its router to train that, and lies in the layer itself"
            )


def check_plain_student(folder: Path, *, packed: bool = False) -> None:
    """Refuse a student whose weights are not stored as they are: codes cannot be trained.

    Args:
        folder: of the student.
        packed: packed n:m weights are taken, for they will be unpacked.

    Raises:
        UnsupportedModelError: names the method.
    """
    method = (said_of(folder) or {}).get("quant_method")
    if method is None or (packed and method == PACKED):
        return
    cure = "make it dense with `moesparse unpack`"
    if method != PACKED:
        cure = "prune with output_dtype='bfloat16' what is to be trained"
    raise UnsupportedModelError(f"student must hold plain weights, got {folder}, quantised by {method!r}: {cure}")
