"""Safetensors shards written in a stream: the header first, and then each tensor as it comes.

safetensors' own library writes whole dictionaries; this keeps a model out of memory.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moesparse.system.file_bytes import FileBytes, HashQueue, drop_from_cache, write_bytes
from moesparse.system.manifest import file_hash
from moesparse.system.memory import available_memory
from moesparse.system.shards import INDEX_FILE, SINGLE_FILE, Shards, TensorInfo, TensorSpec, copy_part

__all__ = ["MAX_SHARD_BYTES", "ShardWriter", "write_shards"]

MAX_SHARD_BYTES = 5 * 10**9
"""Of one file of the output, as transformers writes them."""

# what is copied is read by the system meanwhile, so that the disk does not wait for the hash
_AHEAD_BYTES = 64 * 2**20


class ShardWriter:
    """Writes tensors of known shapes as safetensors shards: header first, then each tensor when it comes, in any order.

    Nothing is held between calls. A shard is flushed to the disk and closed when its last byte is written. A context
    manager: leaving it makes sure that all was written; the index comes after that.

    Args:
        folder: an existing folder without weights.
        specs: all tensors, in the order in which they are shared out to shards.
        max_shard_bytes: of the tensors in one file; a larger tensor has a file of its own.
        metadata: of every file; None says that they are of torch, as transformers does.
        passing: what is copied and written is more than fits in memory, and does not stay in the system's cache.

    Raises:
        ValueError: two tensors have one name.
    """

    def __init__(
        self,
        folder: Path,
        specs: Sequence[TensorSpec],
        max_shard_bytes: int,
        metadata: Mapping[str, str] | None = None,
        *,
        passing: bool = False,
    ) -> None:
        self._folder = folder
        self._metadata = {"format": "pt"} if metadata is None else dict(metadata)
        groups: list[list[TensorSpec]] = [[]]
        room = max_shard_bytes
        for spec in specs:
            if groups[-1] and spec.nbytes > room:
                groups.append([])
                room = max_shard_bytes
            groups[-1].append(spec)
            room -= spec.nbytes
        self._places: dict[str, TensorInfo] = {}
        self._headers: dict[Path, bytes] = {}
        for number, group in enumerate(groups, start=1):
            name = SINGLE_FILE if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
            self._lay_out(folder / name, group)
        if len(self._places) < len(specs):
            raise ValueError("specs must name every tensor once")
        self._missing = {name: info.nbytes for name, info in self._places.items()}
        self._left = dict.fromkeys(self._headers, 0)
        for info in self._places.values():
            self._left[info.file] += info.nbytes
        self._open: dict[Path, FileIO] = {}
        self._passing, self._queue = passing, HashQueue(drop=passing)
        # of what has come so far without a gap, and how many bytes that are
        self._digests = {path: hashlib.sha256(header) for path, header in self._headers.items()}
        self._hashed = {path: len(header) for path, header in self._headers.items()}

    @property
    def files(self) -> list[Path]:
        return list(self._headers)

    def batches(self, nbytes: int) -> list[list[str]]:
        """Names of the tensors as they lie in the files, about so many bytes together.

        Written in this order they are hashed on the way.
        """
        found: list[list[str]] = [[]]
        room = nbytes
        for name, info in self._places.items():
            if room <= 0:
                found.append([])
                room = nbytes
            found[-1].append(name)
            room -= info.nbytes
        return found

    def hash_of(self, file: Path) -> str:
        """sha256 of a finished shard: of the bytes that were written, or of the file where they came in another order.

        Args:
            file: one of `files`.
        """
        self._queue.finish()
        return self._digests[file].hexdigest() if self._hashed[file] == file.stat().st_size else file_hash(file)

    def _lay_out(self, file: Path, specs: Sequence[TensorSpec]) -> None:
        # as safetensors does it: larger items first, so that each tensor starts at a multiple of its item
        ordered = sorted(specs, key=lambda spec: -spec.bits)
        entries: dict[str, Any] = {"__metadata__": self._metadata}
        at = 0
        for spec in ordered:
            entries[spec.name] = {
                "dtype": spec.dtype,
                "shape": list(spec.shape),
                "data_offsets": [at, at + spec.nbytes],
            }
            at += spec.nbytes
        header = json.dumps(entries, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
        self._headers[file] = len(header).to_bytes(8, "little") + header
        for spec in ordered:
            start = 8 + len(header) + entries[spec.name]["data_offsets"][0]
            self._places[spec.name] = TensorInfo(spec.name, spec.dtype, spec.shape, file, start)

    def write(self, name: str, tensor: Tensor, entry: int | None = None) -> None:
        """Write a tensor, or its entry along the first dim; each exactly once.

        Raises:
            ValueError: another shape or dtype than announced, or more than there is room for.
        """
        info = self._places[name]
        shape = info.shape if entry is None else info.shape[1:]
        if tuple(tensor.shape) != shape or not info.holds(tensor):
            raise ValueError(f"{name} must be {info.dtype} {shape}, got {tensor.dtype} {tuple(tensor.shape)}")
        data = tensor.detach().contiguous().view(-1).view(torch.uint8)
        self._put(info, (entry or 0) * data.numel(), data.numpy().data)

    def copy(self, name: str, parts: Iterator[FileBytes | bytes]) -> None:
        """Write a tensor of any dtype from its bytes.

        Raises:
            CheckpointError: the file in which they lie has gone or changed.
        """
        at = 0
        for data in parts:
            self._put(self._places[name], at, data)
            at += len(data)

    def _put(self, info: TensorInfo, at: int, data: FileBytes | bytes | memoryview) -> None:
        if not len(data):
            return
        if len(data) > self._missing[info.name]:
            raise ValueError(
                f"{info.name} must be written once, got {len(data) - self._missing[info.name]} bytes too many"
            )
        file = self._file(info.file)
        file.seek(info.offset + at)
        if isinstance(data, FileBytes):
            copy_part(data, info.name, file)
        else:
            write_bytes(data, file)
        if self._hashed[info.file] == info.offset + at:
            self._queue.update(self._digests[info.file], data)
            self._hashed[info.file] += len(data)
        self._missing[info.name] -= len(data)
        self._left[info.file] -= len(data)
        if not self._left[info.file]:
            self._close(info.file)

    def _file(self, path: Path) -> FileIO:
        if path not in self._open:
            self._open[path] = FileIO(path, "xb")
            write_bytes(self._headers[path], self._open[path])
        return self._open[path]

    def _close(self, path: Path) -> None:
        file = self._open.pop(path)
        os.fsync(file.fileno())
        if self._passing:
            drop_from_cache(file)
        file.close()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Close the shards.

        Raises:
            ValueError: a tensor was not written in full.
        """
        try:
            if kind is None:
                self._queue.finish()
        finally:
            self._queue.close()
        if kind is not None:
            for file in self._open.values():
                file.close()
            return
        for name, missing in self._missing.items():
            if missing:
                raise ValueError(f"{name} must be written in full, {missing} bytes are missing")
        for path, left in self._left.items():
            # a shard of tensors without bytes
            if not left and not path.exists():
                self._file(path)
                self._close(path)

    def write_index(self) -> None:
        """Write the index, where there are several shards: the last file of a checkpoint."""
        if len(self._headers) > 1:
            total = sum(info.nbytes for info in self._places.values())
            weight_map: Mapping[str, str] = {name: info.file.name for name, info in sorted(self._places.items())}
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (self._folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def _passes(source: Shards | None) -> bool:
    """Whether shards and their copy are more than the memory that is there."""
    available = available_memory()
    return source is not None and available is not None and 2 * source.nbytes > available


def write_shards(
    folder: Path,
    tensors: Mapping[str, Tensor],
    max_shard_bytes: int,
    copies: tuple[Mapping[str, str], Shards] | None = None,
) -> ShardWriter:
    """Write tensors one after the other as they lie in the files, without an index.

    Args:
        folder: to write to.
        tensors: name -> tensor on any device, strided in any way.
        max_shard_bytes: of one file.
        copies: name -> name in other shards, of tensors to be copied as bytes behind those; and those shards.

    Returns:
        The writer, finished.
    """
    names, source = copies or ({}, None)
    specs = [TensorSpec.of(name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()]
    if source is not None:
        specs += [dataclasses.replace(source.tensors[other], name=name) for name, other in names.items()]
    with ShardWriter(folder, specs, max_shard_bytes, passing=_passes(source)) as writer:
        batches = writer.batches(_AHEAD_BYTES)
        for batch, following in zip(batches, [*batches[1:], []], strict=True):
            if source is not None:
                source.read_ahead(names[name] for name in following if name in names)
            for name in batch:
                if name in tensors:
                    writer.write(name, tensors[name].cpu())
                elif source is not None:
                    writer.copy(name, source.parts(names[name]))
    return writer
