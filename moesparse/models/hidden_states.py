"""The hidden states of a calibration set between two layers, batch by batch: in memory, or in a file when told so."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, MutableSequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["HiddenStates"]


class HiddenStates(MutableSequence[Tensor]):
    """A list of tensors; a batch stays on the device of the one it replaces.

    With a folder each batch is a file there, mapped into memory (on the CPU then): the system keeps as much of them in
    RAM as is free and writes the rest out. The files lose their names once they are mapped: however the process ends,
    none is left. A disk without room for one is an OSError; a mapping of what is not there would kill the process.

    Args:
        folder: existing, for the files; None keeps all in memory.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._batches: list[Tensor] = []

    def fresh(self) -> HiddenStates:
        """An empty one that keeps its batches in the same way."""
        return HiddenStates(self._folder)

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._batches)

    def __getitem__(self, number: Any) -> Any:
        return self._batches[number]

    def __setitem__(self, number: Any, batch: Any) -> None:
        held = self._batches[number]
        if self._folder is not None and held.shape == batch.shape and held.dtype == batch.dtype:
            held.copy_(batch)
        else:
            self._batches[number] = self._kept(batch.to(held.device))

    def __delitem__(self, number: Any) -> None:
        del self._batches[number]

    def insert(self, index: int, value: Tensor) -> None:
        self._batches.insert(index, self._kept(value))

    def _kept(self, batch: Tensor) -> Tensor:
        if self._folder is None:
            return batch
        # a name of its own: other processes may keep theirs in the same folder
        with tempfile.NamedTemporaryFile(
            "wb", dir=self._folder, prefix="hidden-", suffix=".partial", delete=False
        ) as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, batch.nbytes)
            else:  # macOS
                file.truncate(batch.nbytes)
        mapped = torch.from_file(file.name, shared=True, size=batch.numel(), dtype=batch.dtype).view(batch.shape)
        # the mapping keeps it
        os.unlink(file.name)
        return mapped.copy_(batch)
