"""Expert-wise knowledge distillation: let a pruned model win back what its teacher knows, zeros held.

Source: MoE-Pruner (Xie et al., 2024, arXiv 2410.12013), section 3.3.
"""

from __future__ import annotations

import os
import time
from typing import Any

import torch
from torch import nn

from moesparse.calibration.windows import Windows, check_windows, ordered_hash
from moesparse.distillation import distributed
from moesparse.distillation.blockwise import train_blockwise
from moesparse.distillation.log import Journal
from moesparse.distillation.matching import match
from moesparse.distillation.report import DistillReport, count_zeros
from moesparse.distillation.settings import Settings, resolve_settings
from moesparse.distillation.state import StateFile
from moesparse.distillation.whole import train_whole
from moesparse.errors import UsageError
from moesparse.models.fingerprint import model_fingerprint
from moesparse.models.meta import vocabulary_size
from moesparse.packed.model import pack, packed_blocks, unpack
from moesparse.progress import Progress, silent
from moesparse.system.memory import peak_memory, reset_peak_memory

__all__ = ["distill"]


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
    progress: Progress = silent,
) -> DistillReport:
    """Train the expert matrices of a pruned model towards those of the model it was made from, in place.

    Only expert matrices change, or with `Settings.train` everything; the zeros of expert matrices stay, at every step,
    and are counted in the end. "global" minimises CE + lambda * sum over layers and experts of MSE(teacher expert,
    student expert), both on the teacher's routing and tokens (`Settings.logit_share` puts KL to the teacher's logits in
    the place of CE), and holds both models, three float32 copies of what trains beside its gradients, and
    [b * t, vocabulary] float32 logits, with KL of both models. "blockwise" minimises each block's sum of MSE by itself:
    on the device are one layer of the teacher, one block of the student with its training state, and nothing else; the
    inputs of a block for all windows wait on the CPU. Weights train in float32 and compute in the model's dtype.

    Several processes started by torchrun share the global mode by FSDP2 (see `distributed`).

    Args:
        student: pruned, dense with zeros or packed; experts may be missing if config says which are left.
        teacher: dense, or pruned less than the student; not changed.
        windows: LongTensor [n, t], or (ids, attention mask). The CE of global mode learns this text.
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
        progress: called with every step.

    Returns:
        DistillReport.

    Raises:
        UsageError: an argument that cannot be.
        MoESparseError: a student that does not match the teacher, by name; a loss that is not finite.
        UnsupportedModelError: no experts, or experts that cannot be trained.
    """
    numbers = resolve_settings(settings, mode)
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
    ids, mask = check_windows(windows, vocabulary_size(student))
    if ids.shape[1] < 2:
        raise UsageError("windows must have at least 2 tokens to predict one, got 1")
    processes = distributed.TrainingProcesses.current()
    processes.check(mode, numbers)
    packed = any(True for _ in packed_blocks(student))
    if packed:
        unpack(student)
    try:
        pairs = match(student, teacher)
        key = {
            "student": model_fingerprint(student),
            "teacher": model_fingerprint(teacher),
            "windows": ordered_hash(ids, mask),
            "mode": mode,
            "settings": numbers.to_dict(),
        }
        file = None if state is None else StateFile(state, key, resume, writes=processes.first)
        resumed = file.state if file is not None else None
        steps = numbers.steps(len(ids)) * (len(pairs) if mode == "blockwise" else 1)
        rows = list(resumed["rows"]) if resumed else []
        journal = Journal(progress, steps, logs, rows, speaks=processes.first)
        started = time.perf_counter()
        reset_peak_memory()
        before = count_zeros(pairs)
        place = torch.device(device) if device is not None else processes.device()
        common: dict[str, Any] = {"journal": journal, "file": file, "save_every": save_every, "device": place}
        try:
            if mode == "global":
                weight: float | None = train_whole(
                    student,
                    teacher,
                    pairs,
                    ids,
                    mask,
                    numbers,
                    processes,
                    checkpointing=checkpointing,
                    cache=cache,
                    key=key,
                    **common,
                )
            else:
                weight = None
                train_blockwise(teacher, pairs, ids, mask, numbers, **common)
        finally:
            journal.close()
            if file is not None:
                file.close()
        match(student, teacher)  # the pattern holds as before
        return DistillReport(
            mode=mode,
            settings=numbers.to_dict(),
            expert_weight=weight,
            rows=journal.rows,
            warnings=journal.warnings,
            zeros=(before, count_zeros(pairs)),
            weights=sum(matrix.weight.numel() for pair in pairs for matrix in pair.student.matrices),
            seconds=time.perf_counter() - started,
            peak_bytes=peak_memory(),
        )
    finally:
        if packed:
            pack(student)
