"""Pieces of a part that a run has not finished: results that took long, on the disk until the part is whole.

A piece is a tensor with a note, found again by its name and a key of all that it depends on. Pieces that come quickly
share a file: one is written when `FLUSH_SECONDS` of work wait, and where an error or a signal ends the work. A file has
its name only when it is whole and flushed; what does not read back as it was written counts as not there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moesparse.errors import CheckpointError
from moesparse.system.folders import flush
from moesparse.system.shard_writer import MAX_SHARD_BYTES, ShardWriter
from moesparse.system.shards import SINGLE_FILE, TensorSpec, read_header

__all__ = ["BESIDE", "FLUSH_SECONDS", "Pieces", "count_pieces", "pieces_folder", "pieces_folders"]

FLUSH_SECONDS = 30.0
"""Of work that a kill may cost, and less than a batch system leaves to a job that it ends."""

BESIDE = ".beside"
"""End of the name of a piece that goes with another one, and is not counted."""

_SUFFIX = ".pieces"
_NOTES = "pieces"


class Pieces:
    """Those of one part. As a context manager it writes what waits where the body is left by an error or a signal.

    A body that ends well has its pieces written only where some were before: work of less than FLUSH_SECONDS is done
    again. What waits is not copied, so it must stay as it is until the body is left.

    Args:
        folder: an existing folder; None keeps and finds nothing.
        rank: of this process; each writes files of its own.
    """

    def __init__(self, folder: Path | None, rank: int = 0) -> None:
        self._folder, self._rank = folder, rank
        self._found: dict[str, tuple[Path, dict[str, Any]]] = {}
        self._waiting: list[tuple[dict[str, Any], Tensor]] = []
        self._began = time.monotonic()
        files = [] if folder is None else sorted(folder.glob("*.safetensors"))
        for file in files:
            for note in _notes(file):
                self._found[note["name"]] = (file, note)
        self._written = len(files)

    def find(self, name: str, key: str) -> tuple[Tensor, Any] | None:
        """The tensor, on the CPU, and the note of a piece that was kept under this name and key; None without one."""
        file, held = self._found.get(name, (None, {}))
        if file is None or held["key"] != key:
            return None
        with contextlib.suppress(OSError, SafetensorError), safe_open(file, "pt") as tensors:
            tensor = tensors.get_tensor(name)
            if _hash(tensor) == held["sha256"]:
                return tensor, held["note"]
        return None

    def keep(self, name: str, key: str, tensor: Tensor, note: Any) -> None:
        """A piece is done.

        Args:
            name: of the piece, one of its own in the part.
            key: of what it depends on.
            tensor: its first dim counts what it holds.
            note: JSON.
        """
        if self._folder is None:
            return
        self._waiting.append(({"name": name, "key": key, "note": note}, tensor))
        if time.monotonic() - self._began >= FLUSH_SECONDS:
            self._write()

    def _write(self) -> None:
        if self._folder is None or not self._waiting:
            return
        stem = f"{self._rank:04d}-{self._written:06d}"
        work, home = self._folder / f"{stem}.partial", self._folder / f"{stem}.safetensors"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        notes = [{**note, "sha256": _hash(tensor)} for note, tensor in self._waiting]
        specs = [TensorSpec.of(note["name"], tensor.dtype, tensor.shape) for note, tensor in self._waiting]
        room = max(MAX_SHARD_BYTES, sum(spec.nbytes for spec in specs))
        with ShardWriter(work, specs, room, {"format": "pt", _NOTES: json.dumps(notes)}) as writer:
            for note, tensor in self._waiting:
                writer.write(note["name"], tensor.cpu())
        os.replace(work / SINGLE_FILE, home)
        work.rmdir()
        flush(self._folder)
        self._waiting, self._written, self._began = [], self._written + 1, time.monotonic()

    def __enter__(self) -> Pieces:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            if self._written:
                self._write()
            return
        # the error that ends the work is the one to tell
        with contextlib.suppress(OSError):
            self._write()


def _hash(tensor: Tensor) -> str:
    data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
    return hashlib.sha256(data.numpy().data).hexdigest()


def _notes(file: Path) -> list[dict[str, Any]]:
    with contextlib.suppress(OSError, SafetensorError, ValueError), safe_open(file, "pt") as tensors:
        return json.loads((tensors.metadata() or {}).get(_NOTES, "[]"))
    return []


def pieces_folder(run: Path, part: str) -> Path:
    """Where the pieces of a part lie in the folder of a run."""
    return run / f"{part}{_SUFFIX}"


def pieces_folders(run: Path) -> dict[str, Path]:
    """Part -> the folder of its pieces, of every part that has one."""
    return {path.name.removesuffix(_SUFFIX): path for path in sorted(run.glob(f"*{_SUFFIX}"))}


def count_pieces(run: Path) -> int:
    """How much the pieces in the folder of a run hold: the first dims of their tensors, added up, without `BESIDE`."""
    total = 0
    for folder in pieces_folders(run).values():
        for file in sorted(folder.glob("*.safetensors")):
            with contextlib.suppress(CheckpointError):
                total += sum(info.shape[0] for name, info in read_header(file).items() if not name.endswith(BESIDE))
    return total
