"""Blockwise distillation from folder to folder, for models that do not fit in memory, let alone twice.

One decoder layer of each model is in memory at a time. With `prune_checkpoint` before it, a model is pruned and
recovered on a machine that could never load it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from moesparse.calibration.windows import Windows, check_windows, ordered_hash
from moesparse.checkpoints.pretrained import CONFIG_KEY
from moesparse.distillation.blockwise import run_layer, train_block
from moesparse.distillation.log import Journal
from moesparse.distillation.matching import check_pair, is_pruned, pair_blocks, refuse_dense, stated_pattern
from moesparse.distillation.report import DistillReport, count_zeros
from moesparse.distillation.settings import Settings, resolve_settings
from moesparse.models.on_disk import StreamedModel
from moesparse.progress import Progress, ProgressEvent, silent
from moesparse.pruning.streamed import assemble_checkpoint, write_layer, write_outside
from moesparse.system.memory import peak_memory, reset_peak_memory
from moesparse.system.run_folder import RunFolder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["distill_checkpoint"]


def distill_checkpoint(
    student: str | os.PathLike[str],
    teacher: str | os.PathLike[str],
    out: str | os.PathLike[str],
    windows: Windows,
    *,
    settings: Settings | str = "paper",
    tokenizer: PreTrainedTokenizerBase | None = None,
    card: Callable[[DistillReport], str] | None = None,
    device: torch.device | str | None = None,
    resume: bool = False,
    logs: str | os.PathLike[str] | None = None,
    progress: Progress = silent,
) -> DistillReport:
    """Distil a pruned checkpoint, dense with zeros, into a new one, block by block.

    Holds what lies outside of the decoder layers of both models, one layer of each, the training state of one block,
    and for all windows the hidden states and the inputs of one block. Trains as `distill(mode="blockwise")` does.

    Args:
        student: folder of the pruned model.
        teacher: folder of the model it was pruned from.
        out: a new or empty folder, or with `resume` one that holds an unfinished run.
        windows: LongTensor [n, t], or (ids, attention mask).
        settings: `Settings`, or a name of PRESETS.
        tokenizer: saved beside the weights.
        card: gives the text of README.md.
        device: where a layer trains; None is the GPU when there is one.
        resume: go on with the run in `out`, at the layer it had not finished; student, teacher, windows and settings
            must be the same.
        logs: folder for TensorBoard.
        progress: called with every step.

    Returns:
        DistillReport; seconds and peak memory are those of this run.

    Raises:
        MoESparseError: as `distill`, before anything is trained.
        CheckpointError: a folder cannot be read or written, or holds another run.
    """
    numbers = resolve_settings(settings, "blockwise")
    started = time.perf_counter()
    ours, theirs = StreamedModel(student), StreamedModel(teacher)
    pairs = pair_blocks(ours.model, theirs.model)
    embedding: Any = theirs.model.get_input_embeddings()
    ids, mask = check_windows(windows, embedding.weight.shape[0])
    place = torch.device(device) if device is not None else torch.device("cuda" if torch.cuda.is_available() else "cpu")
    inputs = {
        "student": ours.signature(),
        "teacher": theirs.signature(),
        "windows": ordered_hash(ids, mask),
        "settings": numbers.to_dict(),
    }
    at = {
        position: [pair for pair in pairs if theirs.position(pair.teacher.layer) == position]
        for position in range(len(theirs.layers))
    }
    pattern = stated_pattern(ours.model)
    pruned = []

    def inspect(position: int) -> None:
        progress(ProgressEvent("check", position, len(theirs.layers), "layer"))
        with ours.hold(position):
            for pair in at[position]:
                check_pair(pair, pattern)
                pruned.append(is_pruned(pair))

    with RunFolder.open(out, inputs, resume=resume) as run:
        stream = theirs.stream(ids, mask, numbers.batch_size, place, inspect=inspect)
        refuse_dense(pruned)
        rows = [row for part in run.parts[: len(ours.layers)] for row in part.note["rows"]]
        journal = Journal(progress, numbers.steps(len(ids)) * len(pairs), logs, rows)
        reset_peak_memory()
        last = max(position for position, here in at.items() if here)
        done = len(run.parts)
        try:
            for position in range(len(theirs.layers)):
                if position < done and position < last:
                    with stream.on_device(position):
                        for _ in stream.run(position, keep=True):
                            pass
                elif position >= done:
                    with ours.hold(position):
                        first = len(journal.rows)
                        before = count_zeros(at[position])
                        if position <= last:
                            with stream.on_device(position):
                                for pair, given in zip(
                                    at[position], run_layer(stream, position, at[position]), strict=True
                                ):
                                    train_block(pair, given, numbers, journal, place)
                                    check_pair(pair, pattern)  # the pattern holds as before
                        note = {"rows": journal.rows[first:], "zeros": [before, count_zeros(at[position])]}
                        write_layer(run, ours, position, note)
        finally:
            journal.close()
        if len(run.parts) == len(ours.layers):
            write_outside(run, ours)
        zeros = [part.note["zeros"] for part in run.parts[: len(ours.layers)]]
        report = DistillReport(
            mode="blockwise",
            settings=numbers.to_dict(),
            expert_weight=None,
            rows=journal.rows,
            warnings=journal.warnings,
            zeros=(sum(before for before, _ in zeros), sum(after for _, after in zeros)),
            weights=sum(matrix.weight.numel() for pair in pairs for matrix in pair.student.matrices),
            seconds=time.perf_counter() - started,
            peak_bytes=peak_memory(),
        )
        noted = getattr(ours.model.config, CONFIG_KEY, None) or {}
        recipe = {**(noted.get("recipe") or {}), "distillation": report.summary(len(ids))}
        text = None if card is None else card(report)
        assemble_checkpoint(run, ours, recipe, tokenizer=tokenizer, card=text, report=report.beside(student))
    return report
