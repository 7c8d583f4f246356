"""What the teacher's blocks give for a set of windows: computed when asked for, or kept on disk."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from moesparse.calibration.windows import ImageWindows
from moesparse.distillation.experts import Routed, TeacherExperts
from moesparse.distillation.matching import Pair
from moesparse.errors import CheckpointError, MoESparseError
from moesparse.models.experts_function import experts_run_by
from moesparse.models.inputs import forward_inputs
from moesparse.progress import Progress, ProgressEvent

__all__ = ["CachedTeacher", "LiveTeacher", "TrainingWindows", "cache_bytes"]

TrainingWindows = tuple[Tensor, Tensor | None, ImageWindows | None]
"""Ids [n, t], mask [n, t] bool or None, and the same windows with their images, where there are any."""

_INDEX_FILE = "teacher.json"


class LiveTeacher:
    """Runs the teacher on the windows asked for.

    Args:
        model: the teacher.
        pairs: its blocks are run by `TeacherExperts` while `installed`.
        windows: all of them, on the CPU.
        head: run the head too.

    Attributes:
        logits: [m, t, V] of the last call; None without the head.
    """

    def __init__(self, model: nn.Module, pairs: Sequence[Pair], windows: TrainingWindows, head: bool = False) -> None:
        self._model = model if head else getattr(model, "base_model", model)
        self._head = head
        self.logits: Tensor | None = None
        self._experts = [TeacherExperts(pair.teacher) for pair in pairs]
        self._ids, self._mask, self._seen = windows

    @contextmanager
    def installed(self) -> Iterator[LiveTeacher]:
        with ExitStack() as stack:
            for experts in self._experts:
                stack.enter_context(experts_run_by(experts.block, experts))
            yield self

    @torch.no_grad()
    def __call__(self, windows: Tensor) -> list[Routed]:
        """One Routed per block for `windows` [m], numbers of windows; T = m * t tokens in their order."""
        device = next(self._model.parameters()).device
        mask = None if self._mask is None else self._mask[windows].to(device)
        for experts in self._experts:
            experts.token_mask = None if mask is None else mask.flatten()
        attention = None if mask is None else mask.long()
        ids, inputs = self._ids[windows].to(device), None if self._seen is None else self._seen.inputs
        found = self._model(**forward_inputs(self._model, ids, attention, inputs, windows.tolist()))
        self.logits = found.logits if self._head else None
        routed = []
        for experts in self._experts:
            assert experts.routed is not None
            routed.append(experts.routed)
            experts.routed = None
        return routed


class CachedTeacher:
    """The teacher's outputs, one safetensors file per window; see `cache_bytes` for how large they are.

    Args:
        folder: of the files; made when it does not exist.
        blocks: MoE blocks of the teacher.
        key: what the files belong to, the fingerprints of teacher and windows.

    Raises:
        MoESparseError: the folder holds the outputs of another teacher or of other windows.
    """

    def __init__(self, folder: str | os.PathLike[str], blocks: int, key: dict[str, Any]) -> None:
        self._folder, self._blocks = Path(folder), blocks
        self._folder.mkdir(parents=True, exist_ok=True)
        index = self._folder / _INDEX_FILE
        if index.is_file():
            held = json.loads(index.read_text())
            if held != key:
                what = next(name for name in key if held.get(name) != key[name])
                raise MoESparseError(
                    f"cache must hold outputs of the same {what}, got those of others in {self._folder}; "
                    "remove the folder or name another"
                )
        else:
            _replace_with(index, lambda path: path.write_text(json.dumps(key)))

    def missing(self, windows: int) -> list[int]:
        """Numbers of the windows whose outputs are not there yet."""
        return [number for number in range(windows) if not self._file(number).is_file()]

    def fill(self, teacher: LiveTeacher, windows: int, batch_size: int, progress: Progress) -> None:
        """Compute and write what is missing; a run that is stopped goes on from there."""
        from safetensors.torch import save_file

        todo = self.missing(windows)
        for start in range(0, len(todo), batch_size):
            progress(ProgressEvent("teacher outputs", start, len(todo), "window"))
            batch = todo[start : start + batch_size]
            routed = teacher(torch.tensor(batch))
            for row, number in enumerate(batch):
                tensors = {}
                for block, one in enumerate(routed):
                    for name, tensor in vars(one).items():
                        part = tensor.unflatten(0, (len(batch), -1))[row]
                        tensors[f"{block}.{name}"] = part.to(torch.int32) if name == "index" else part
                held = {key: tensor.cpu().contiguous() for key, tensor in tensors.items()}
                _replace_with(self._file(number), lambda path, held=held: save_file(held, path))
        progress(ProgressEvent("teacher outputs", len(todo), len(todo), "window"))

    def __call__(self, windows: Tensor) -> list[Routed]:
        """As `LiveTeacher`, from the files; on the CPU."""
        from safetensors.torch import load_file

        files = [load_file(self._file(number)) for number in windows.tolist()]

        def joined(key: str) -> Tensor:
            return torch.cat([file[key] for file in files])

        return [
            Routed(joined(f"{block}.hidden"), joined(f"{block}.index").long(), joined(f"{block}.outputs"))
            for block in range(self._blocks)
        ]

    def _file(self, number: int) -> Path:
        return self._folder / f"window-{number:06d}.safetensors"


def cache_bytes(pairs: Sequence[Pair], tokens: int) -> int:
    """Bytes on disk of the outputs for so many tokens: (1 + K) * H values and K ids a token and block."""
    total = 0
    for pair in pairs:
        block = pair.teacher
        K, size = block.top_k or block.num_experts, block.matrices[0].parameter.element_size()
        total += tokens * ((1 + K) * block.hidden_size * size + 4 * K)
    return total


def _replace_with(path: Path, write: Any) -> None:
    """Write a file under another name first: a file that is there is whole."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        write(partial)
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise CheckpointError(
            f"cannot write {path}: {error}. What the cache holds is kept: make room there and run the same again"
        ) from error
